"""Pre-activation: the original units and full pre-activation at every depth (2016 §4.2, Tables 3 and 4, Fig. 1 and 6)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.study import Row, StudyResult
from resnetlab.studies.variants import WARMUP_2016, SideBySide, Variant, assess_claim
from resnetlab.studies.verdicts import compare_by_seed, describe

ONE_LAYER = "1-layer skip"


class Preactivation(SideBySide):
    """At each depth a net of original units and one with full pre-activation; at 110 layers those of F of one layer too."""

    name = "preactivation"
    question = "Does full pre-activation train a little worse and test better, the more so the deeper?"
    place = "2016 Tables 3 and 4, Fig. 1 and 6"
    caption = "As 2016 Fig. 1 and Fig. 6 (right): training dashed, held-out images bold."
    remarks = ("The paper's curves are of training LOSS: its rows are the loss over the last tenth of the steps.",)

    def variants(self, setting: Setting) -> list[Variant]:
        """Original and pre-activated, shallow to deep."""
        depths = setting.pick_depths(smoke=(14,), quick=(20,), paper=(110, 164))
        variants = []
        for depth in depths:
            if depth == 110:
                layers = {"layers": 1, "depths": (36,) * 3}
                variants += [
                    Variant(f"{net}, {ONE_LAYER}", net, layers, WARMUP_2016) for net in ("resnet110", "preresnet110")
                ]
            variants += [Variant(net, net, {}, WARMUP_2016) for net in (f"resnet{depth}", f"preresnet{depth}")]
        return variants

    def pairs(self, setting: Setting) -> list[tuple[str, str]]:
        """Labels of the original net and its pre-activated twin."""
        labels = [v.label for v in self.variants(setting)]
        return list(zip(labels[::2], labels[1::2], strict=True))

    def reference(self, label: str, variants: Sequence[Variant]) -> str:
        """The original net, of a pre-activated one."""
        return label.removeprefix("pre")

    def read(self, setting: Setting, outcomes: RunOutcomes, on_progress: Callable[[int, int], None]) -> StudyResult:
        """The errors, then the training loss of every pair."""
        result = super().read(setting, outcomes, on_progress)
        rows: list[Row] = []
        for original, preact in self.pairs(setting):
            losses = {label: outcomes.by_seed(label, "training_loss") for label in (original, preact)}
            difference = compare_by_seed(losses[preact], losses[original])
            words = {"larger": "has a larger training loss than", "smaller": "has a smaller training loss than"}
            text = describe(difference, preact, original, **words, unit="number")
            for label, against in ((original, None), (preact, (original, difference))):
                rows.append(
                    Row(label, "training loss", tuple(losses[label].values()), text, None, setting.share, "number",
                        compared=against)
                )  # fmt: skip
        return replace(result, rows=[*result.rows, *rows])

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """Of the deepest pair: "slightly higher training loss … but lower test error" (2016 §4.2); how the others compare."""
        *others, (original, preact) = self.pairs(setting)
        losses = [outcomes.by_seed(label, "training_loss") for label in (preact, original)]
        loss = compare_by_seed(*losses)
        verdict, details = assess_claim(setting, outcomes, original, preact, f"{preact} tests better than {original}")
        half = {"shown": "is shown", "points to": "is pointed to, no more", "not shown": "is not shown"}[loss.strength]
        claim = f" That it has the larger training loss, as in the paper's Fig. 6, {half}{setting.condition}"
        gains = [assess_claim(setting, outcomes, b, a, "")[1] for a, b in others]
        return f"{verdict}{claim}: {loss.describe('number')}.", " ".join([details, *gains])
