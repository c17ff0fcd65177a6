"""Orderings: five orders of BN, ReLU and convolution in a unit (2016 §4.1, Table 2, Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence

from resnetlab.nn.blocks import ACTIVATION_ORDERS
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.variants import WARMUP_2016, SideBySide, Variant, assess_claim


class Orderings(SideBySide):
    """The five orders."""

    name = "orderings"
    question = "In which order should BN, ReLU and convolution be applied?"
    place = "2016 Table 2, Fig. 6"
    claimed = ("original", "preact")
    caption = "As 2016 Fig. 6, each order beside the original: training dashed, held-out images bold."

    def variants(self, setting: Setting) -> list[Variant]:
        """At the deepest of the depths."""
        depth = setting.pick_depths(smoke=(8,), quick=(20,), paper=(110,))[-1]
        return [
            Variant(order, f"resnet{depth}", {"activation_order": order}, WARMUP_2016) for order in ACTIVATION_ORDERS
        ]

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """Full pre-activation compared with the original order."""
        claim = f"full pre-activation tests better in {variants[0].net}"
        verdict, details = assess_claim(setting, outcomes, "original", "preact", claim)
        gain = "The paper's gain grows with depth: 0.24 points at 110 layers, 2.69 at 1001 (2016 Table 3)."
        return verdict, f"{details} {gain}"
