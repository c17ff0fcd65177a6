"""Shortcuts: options A, B and C, with what they cost (2015 §4.1, Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

from resnetlab.models.cost import compute_cost
from resnetlab.models.spec import get_specification
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.study import Row
from resnetlab.studies.variants import SideBySide, Variant, assess_claim, count_cost, warmup_2015

OPTIONS = {"plain": "none", "A": "A", "B": "B", "C": "C"}


class Shortcuts(SideBySide):
    """The plain net and the three options."""

    name = "shortcuts"
    question = "Do projections do better than shortcuts without parameters?"
    place = "2015 Table 3"
    caption = "2015 Table 3 has no figure; laid out as its Fig. 6."
    remarks = ("The paper's errors are of 34 layers on ImageNet; the nets here are of the 6n+2 family.",)

    def variants(self, setting: Setting) -> list[Variant]:
        """At the deepest of the depths."""
        depth = setting.pick_basic_depth(smoke=8, quick=20, paper=56)
        return [
            Variant(label, f"resnet{depth}", {"shortcut": option}, warmup_2015(setting, depth))
            for label, option in OPTIONS.items()
        ]

    def count_rows(self, setting: Setting, variant: Variant) -> list[Row]:
        """Parameters and multiply-adds of the trained net, and of the paper's 34 layers."""
        small = count_cost(setting, variant)
        large = compute_cost(get_specification("resnet34", **variant.values))
        text = f"the paper's 34 layers with this option: {large.parameters:,} parameters, {large.multiply_adds:,} multiply-adds"
        return [
            Row(variant.label, "parameters", (small.parameters,), text, unit="count"),
            Row(variant.label, "multiply-adds", (small.multiply_adds,), "of one image; as above", unit="count"),
        ]

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """All options compared with the plain net, and C with A."""
        gains = [assess_claim(setting, outcomes, "plain", option, f"option {option} helps")[1] for option in "ABC"]
        claim = f"projections everywhere (C) beat none (A) in {variants[0].net}"
        verdict, details = assess_claim(setting, outcomes, "A", "C", claim)
        return verdict, " ".join([details, *gains])
