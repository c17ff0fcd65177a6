"""Protocols: one crop, ten crops, several scales and ensembles of the same models (2015 §3.4, Tables 3 to 5)."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar

from resnetlab.evaluation.evaluate import evaluate
from resnetlab.evaluation.protocols import parse_protocol
from resnetlab.studies import figures
from resnetlab.studies.runs import RunOutcome, RunOutcomes
from resnetlab.studies.setting import Setting, Trial
from resnetlab.studies.study import Row, Study, StudyResult
from resnetlab.studies.variants import beside_paper, describe_errors, network_trials
from resnetlab.studies.verdicts import PairedDifference, compare_by_seed

Errors = dict[str, dict[str, dict[int, float]]]  # model -> protocol -> seed -> top-1 error
ENSEMBLE = "ensemble of depths"
TOP5 = ", top-5"  # behind a protocol's name


class Protocols(Study):
    """Residual nets of several depths, evaluated by every protocol and as an ensemble."""

    name = "protocols"
    question = "What do more crops, more scales and more models bring?"
    place = "2015 Tables 3 to 5"
    remarks: ClassVar[tuple[str, ...]] = (
        "The paper's figures are of ImageNet, whose images are larger than the crop.",
    )

    def models(self, setting: Setting, protocol: str) -> list[str]:
        """Labels of the models that are evaluated by a protocol, and form an ensemble."""
        return [f"resnet{depth}" for depth in self.depths(setting)]

    def depths(self, setting: Setting) -> tuple[int, ...]:
        """The depths whose models are evaluated and form the ensemble."""
        return setting.pick_depths(smoke=(8, 14), quick=(8, 20), paper=(20, 32, 44, 56))

    def plan(self, setting: Setting) -> list[Trial]:
        """The residual nets, as the study of degradation has them."""
        return network_trials(setting, *(f"resnet{depth}" for depth in self.depths(setting)))

    def protocols(self, setting: Setting) -> dict[str, str]:
        """label -> protocol; without mirrored views where training never mirrors."""
        size, step = setting.base.image_size, max(1, setting.base.image_size // 8)
        sides = ",".join(str(size + i * step) for i in (0, 1, 2))
        if not setting.base.flip:
            return {"1crop": "1crop", "multiscale": f"multiscale:{sides}+noflip"}
        return {
            "1crop": "1crop",
            "flip": "flip",
            "10crop": f"10crop:{size + step}",
            "multiscale": f"multiscale:{sides}",
        }

    def ensembles(self, setting: Setting) -> Collection[str]:
        """The protocols by which the models are an ensemble too."""
        return self.protocols(setting)

    def count_views(self, setting: Setting, label: str) -> float:
        """Those of every protocol that the label's models are evaluated by."""
        size, found = setting.base.image_size, self.protocols(setting)
        chosen = [parse_protocol(text) for name, text in found.items() if label in self.models(setting, name)]
        return sum(protocol.count_views(size) for protocol in chosen)

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """Every model by every protocol, each seed's depths as an ensemble."""
        errors, protocols = self._measure(setting, outcomes, on_progress), self.protocols(setting)
        rows = []
        for model, by_protocol in errors.items():
            for protocol, by_seed in by_protocol.items():
                text, compared = self.compare(errors, model, protocol)
                name, rank = protocols[protocol.removesuffix(TOP5)], "top5" if protocol.endswith(TOP5) else "top1"
                figure = f"{'top-5 ' if rank == 'top5' else ''}test error, {name}"
                row = Row(model, figure, tuple(by_seed.values()), text, None, setting.share, compared=compared)
                rows += beside_paper(row, setting, outcomes.of(model), name, rank)
        answer, details = self.answer(errors, setting)
        return StudyResult(
            answer=answer,
            details=details,
            rows=rows,
            figures=[draw_protocols(errors)],
            remarks=[
                *self.remarks,
                *setting.measuring_remarks,
                "An ensemble's score is the mean of its members'. The paper's six models: 3.57 % top-5, test (Table 5).",
            ],
        )

    def compare(self, errors: Errors, model: str, protocol: str) -> tuple[str, tuple[str, PairedDifference] | None]:
        """A row's verdict, and what it is compared with: the same model by one crop."""
        if protocol == "1crop":
            return "what the other protocols are compared with", None
        difference = compare_by_seed(errors[model][protocol], errors[model]["1crop"])
        return describe_errors(difference, protocol, "1crop", "tests"), ("1crop", difference)

    def answer(self, errors: Errors, setting: Setting) -> tuple[str, str]:
        """The ensemble compared with the best of its members, and the protocols with one crop."""
        models = [model for model in errors if model != ENSEMBLE]
        tallies = []
        for protocol in [p for p in errors[models[-1]] if p != "1crop"] if models else []:
            difference = compare_by_seed(errors[models[-1]][protocol], errors[models[-1]]["1crop"])
            tallies.append(describe_errors(difference, protocol, "1crop", "tests"))
        details = f"Of {models[-1]}: {'; '.join(tallies)}." if tallies else ""
        if ENSEMBLE not in errors:
            if len(self.depths(setting)) > 1:
                return "In no seed did every depth end with weights: there is no ensemble.", details
            return "One depth alone makes no ensemble of depths; give several with --depths.", details
        best = min(models, key=lambda m: sum(errors[m]["1crop"].values()) / len(errors[m]["1crop"]))
        difference = compare_by_seed(errors[best]["1crop"], errors[ENSEMBLE]["1crop"])
        text = describe_errors(difference, best, f"the ensemble of {len(models)} depths", "tests")
        opening = {
            "shown": "An ensemble is shown to beat its best member",
            "points to": "The runs point to an ensemble beating its best member, no more,",
            "not shown": "That an ensemble beats its best member is not shown",
        }[difference.strength]
        return f"{opening}{setting.condition}: {text}.", details

    def _measure(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> Errors:
        """Evaluates the models seed by seed, all of a seed at once."""
        jobs = []
        for label, protocol in self.protocols(setting).items():
            by_seed: dict[int, list[RunOutcome]] = {}
            for outcome in (o for model in self.models(setting, label) for o in outcomes.trained(model)):
                by_seed.setdefault(outcome.seed, []).append(outcome)
            jobs += [(seed, runs, label, protocol) for seed, runs in by_seed.items()]
        errors: Errors = {}
        for done, (seed, runs, label, protocol) in enumerate(jobs, 1):
            evaluation = evaluate(
                [run.load_model() for run in runs],
                setting.data,
                protocol=protocol,
                data_dir=setting.data_dir,
                precision=setting.measuring_precision,
                device=setting.device,
            )
            found = {
                run.trial.label: e for run, e in zip(runs, evaluation.members or [evaluation.metrics], strict=True)
            }
            if len(runs) == len(self.models(setting, label)) > 1 and label in self.ensembles(setting):
                found[ENSEMBLE] = evaluation.metrics
            for model, metrics in found.items():
                of_model = errors.setdefault(model, {})
                of_model.setdefault(label, {})[seed] = metrics.top1_error
                if self.on_imagenet and len(metrics.classes) > 5:
                    of_model.setdefault(label + TOP5, {})[seed] = metrics.top5_error
            on_progress(done, len(jobs))
        return dict(sorted(errors.items(), key=lambda item: item[0] == ENSEMBLE))


def draw_protocols(errors: Errors) -> figures.StudyFigure:
    """One panel for each protocol, a line for each model."""
    labels = list(dict.fromkeys(p for each in errors.values() for p in each if not p.endswith(TOP5)))

    def draw(panels: figures.Panels) -> None:
        for axes, label in zip(panels, labels, strict=True):
            groups = {model: list(each[label].values()) for model, each in errors.items() if label in each}
            figures.plot_dots(axes, label, groups)

    return figures.draw_study_figure(
        "protocols",
        draw,
        figures.FigureText(
            "The same models by every protocol",
            "Test error, every seed, mean ± sd.",
            "Test error of each model by each protocol.",
        ),
        figures.PanelLayout(panels=len(labels), rows=-(-len(labels) // 2), height=90 + 30 * len(errors)),
    )
