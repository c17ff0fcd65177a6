"""Bottleneck: units of 1x1, 3x3, 1x1 compared with basic ones at equal cost (2015 §4.1, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.study import Row
from resnetlab.studies.variants import SideBySide, Variant, assess_claim, count_cost, warmup_2015


class Bottleneck(SideBySide):
    """As many basic units as bottlenecks, which have one layer more each: 6n+2 layers and 9n+2."""

    name = "bottleneck"
    question = "What do bottlenecks bring at equal cost?"
    place = "2015 Fig. 5, Table 1"
    caption = "The paper has no figure of this; laid out as 2015 Fig. 6."

    def variants(self, setting: Setting) -> list[Variant]:
        """At the deepest of the depths."""
        depth = setting.pick_basic_depth(smoke=8, quick=20, paper=56)
        deeper = 9 * (depth - 2) // 6 + 2
        warmup = warmup_2015(setting, depth)
        return [
            Variant(f"basic, {depth} layers", f"resnet{depth}", {"shortcut": "B"}, warmup),
            Variant(f"bottleneck, {deeper} layers", f"resnet{depth}", {"shortcut": "B", "block": "bottleneck"}, warmup),
        ]

    def count_rows(self, setting: Setting, variant: Variant) -> list[Row]:
        """Parameters and multiply-adds of the trained net."""
        counts = count_cost(setting, variant)
        text = f"{counts.depth} layers; option B, because a bottleneck widens in the first stage too"
        return [
            Row(variant.label, "parameters", (counts.parameters,), text, unit="count"),
            Row(variant.label, "multiply-adds", (counts.multiply_adds,), "of one image", unit="count"),
        ]

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """The bottleneck compared with the basic net."""
        basic, bottleneck = (variant.label for variant in variants)
        work = [self.count_rows(setting, variant)[1].values[0] for variant in variants]
        claim = f"the bottleneck tests better, at {work[1] / work[0]:.2f} times the multiply-adds"
        verdict, details = assess_claim(setting, outcomes, basic, bottleneck, claim)
        motive = "The paper's motive is training time, not error: 50 layers cost what 34 do (3.8 and 3.6e9)."
        return verdict, f"{details} {motive}"
