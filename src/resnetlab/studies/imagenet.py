"""The papers' ImageNet experiments, complete: they run where ImageNet is, and are tried on any folder with --budget smoke."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import ClassVar

from resnetlab.data import sources
from resnetlab.errors import UsageError
from resnetlab.studies.protocols import ENSEMBLE, Errors, Protocols
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import StudyResult
from resnetlab.studies.variants import Variant, describe_errors, draw_curves_and_ends, error_rows
from resnetlab.studies.verdicts import PairedDifference, compare_by_seed

SIDES = (224, 256, 384, 480, 640)  # of 2015 Table 4, for a training crop of 224 pixels


class ImageNet(Protocols):
    """2015: plain and residual nets of 18 and 34 layers, options A, B and C, 50 to 152 layers; crops, scales, the ensemble."""

    name = "imagenet"
    question = (
        "On ImageNet: are deeper residual nets better, plain ones not, and what do shortcuts, crops and scales bring?"
    )
    place = "2015 Tables 2 to 5, Fig. 4"
    on_imagenet = True
    remarks: ClassVar[tuple[str, ...]] = (
        "The paper's training and single-crop curves are Fig. 4's; Tables 2 and 3 are of 10 crops, Table 4 of several scales.",
        "Our ensemble has the five models of Table 4; the paper names of its six only that two have 152 layers.",
    )
    recipe: ClassVar[str] = "paper-imagenet"
    networks: ClassVar[tuple[Variant, ...]] = (
        Variant("plain18", "plain18"),
        Variant("plain34", "plain34"),
        Variant("resnet18, A", "resnet18", {"shortcut": "A"}),
        Variant("resnet34, A", "resnet34", {"shortcut": "A"}),
        Variant("resnet34, B", "resnet34"),
        Variant("resnet34, C", "resnet34", {"shortcut": "C"}),
        Variant("resnet50", "resnet50"),
        Variant("resnet101", "resnet101"),
        Variant("resnet152", "resnet152"),
    )
    better: ClassVar[Mapping[str, str]] = {  # network -> a better one, by the paper
        "plain34": "plain18",
        "resnet18, A": "resnet34, A",
        "resnet34, A": "resnet34, B",
        "resnet34, B": "resnet34, C",
        "resnet34, C": "resnet50",
        "resnet50": "resnet101",
        "resnet101": "resnet152",
    }
    evaluated: ClassVar[Mapping[str, tuple[str, ...]]] = {  # protocol -> networks; none: all
        "10crop": (),
        "1crop": ("resnet50", "resnet101", "resnet152"),  # the released models' README
        "multiscale": ("resnet34, B", "resnet34, C", "resnet50", "resnet101", "resnet152"),
        "dense": ("resnet152",),  # 2016 Table 5
    }

    def adapt(self, setting: Setting) -> Setting:
        """The paper's training on ImageNet; raises UsageError for small images, or depths."""
        if setting.data in sources.BUILTIN:
            raise UsageError(f"the study {self.name} is of 224 pixels: give --data a folder laid out as ImageNet.")
        if setting.depths:
            raise UsageError(f"the study {self.name} has the paper's own networks; leave --depths out.")
        return replace(setting, recipe=self.recipe)

    def plan(self, setting: Setting) -> list[Trial]:
        """Every network."""
        return [t for v in self.networks for t in setting.trials(v.label, v.net, v.values, **v.changes)]

    def models(self, setting: Setting, protocol: str) -> list[str]:
        """Those that the paper evaluates so."""
        return list(self.evaluated[protocol] or (v.label for v in self.networks))

    def protocols(self, setting: Setting) -> dict[str, str]:
        """The paper's, in proportion where a trial run's images are smaller."""
        size = setting.base.image_size
        sides = ",".join(str(round(side * size / SIDES[0])) for side in SIDES)
        every = {
            "1crop": "1crop",
            "10crop": "10crop",
            "multiscale": f"multiscale:{sides}",
            "dense": f"dense:{round(320 * size / 224)}",
        }
        return {label: every[label] for label in self.evaluated}

    def ensembles(self, setting: Setting) -> Collection[str]:
        """2015 Table 5."""
        return ("multiscale",)

    def compare(self, errors: Errors, model: str, protocol: str) -> tuple[str, tuple[str, PairedDifference] | None]:
        """With the network that the paper says is better; the ensemble with its deepest member."""
        other = "resnet152" if model == ENSEMBLE else self.better.get(model)
        if other is None or protocol not in errors.get(other, {}):
            return "what others are compared with", None
        difference = compare_by_seed(errors[model][protocol], errors[other][protocol])
        return describe_errors(difference, model, other, "tests"), (other, difference)

    def answer(self, errors: Errors, setting: Setting) -> tuple[str, str]:
        """How many of the paper's orders of two networks are shown, each by the first protocol that both have."""
        orders = {}
        for worse, better in self.better.items():
            both = [p for p in self.evaluated if p in errors.get(worse, {}) and p in errors.get(better, {})]
            if both:
                orders[worse, better] = compare_by_seed(errors[worse][both[0]], errors[better][both[0]])
        strengths = [difference.strength for difference in orders.values()]
        texts = [describe_errors(difference, *pair, "tests") for pair, difference in orders.items()]
        verdict = (
            f"Of {len(self.better)} orders of two networks that the paper prints, {strengths.count('shown')} are shown, "
            f"{strengths.count('points to')} pointed to, no more{setting.condition}."
        )
        return verdict, "; ".join(texts) + "."

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """The errors by every protocol, then those of training and of one crop at its end, with their curves."""
        result = super().read(setting, outcomes, on_progress)
        references = {v.label: self.better.get(v.label, v.label) for v in self.networks}
        rows = [row for label, other in references.items() for row in error_rows(setting, outcomes, label, other)[:1]]
        curves = draw_curves_and_ends(
            self.name, references, outcomes, "As 2015 Fig. 4: each network beside a better one."
        )
        return replace(result, rows=[*result.rows, *rows], figures=[curves, *result.figures])


class ImageNetPreact(ImageNet):
    """2016: 152 and 200 layers, original and pre-activated, with aspect-ratio augmentation; BN after addition in 101."""

    name = "imagenet-preact"
    question = "On ImageNet: does full pre-activation test better at 200 layers?"
    place = "2016 Table 5, §4.1"
    remarks = (
        "One crop of 320 pixels; of 224 for 101 layers.",
        "The original net of 152 layers in Table 5 is 2015's: the study imagenet has it.",
    )
    recipe = "preact-imagenet"
    networks = (
        Variant("preresnet152", "preresnet152"),
        Variant("resnet200", "resnet200"),
        Variant("preresnet200", "preresnet200"),
        Variant("preresnet200, aspect ratio", "preresnet200", {}, {"crop": "resized"}),
        Variant("resnet101", "resnet101"),
        Variant("resnet101, BN after addition", "resnet101", {"activation_order": "bn-after-add"}),
    )
    better: ClassVar[Mapping[str, str]] = {
        "resnet200": "preresnet200",
        "preresnet152": "preresnet200",
        "preresnet200": "preresnet200, aspect ratio",
        "resnet101, BN after addition": "resnet101",
    }
    evaluated: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "dense": ("preresnet152", "resnet200", "preresnet200", "preresnet200, aspect ratio"),
        "1crop": ("resnet101", "resnet101, BN after addition"),
    }

    def ensembles(self, setting: Setting) -> Collection[str]:
        """None."""
        return ()
