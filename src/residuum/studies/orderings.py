"""Orderings: five orders of BN, ReLU and convolution in a unit (2016 §4.1, Table 2, Fig. 6)."""

from __future__ import annotations

from collections.abc import Sequence

from residuum.nn.blocks import ORDERS
from residuum.studies import paper
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting
from residuum.studies.variants import Variant, side_by_side, verdict

WARM = {"warmup": "steps"}  # 2016, appendix: 0.01 for the first 400 steps of all CIFAR runs


def variants(setting: Setting) -> list[Variant]:
    """The five orders, at the deepest of the chosen depths."""
    depth = setting.chosen(smoke=(8,), quick=(20,), paper=(110,))[-1]
    return [Variant(order, f"resnet{depth}", {"order": order}, paper.ORDERS_110[order], WARM) for order in ORDERS]


def answer(setting: Setting, outcomes: Outcomes, chosen: Sequence[Variant]) -> tuple[str, str]:
    """Full pre-activation beside the original order, and beside the others."""
    first, more = verdict(
        outcomes, "original", "preact", "test error", f"full pre-activation tests better in {chosen[0].net}"
    )
    return first, f"{more} The paper's gain grows with depth: 0.24 points at 110 layers, 2.69 at 1001 (2016 Table 3)."


STUDY = side_by_side(
    name="orderings",
    question="In which order should BN, ReLU and convolution stand?",
    place="2016 Table 2, Fig. 6",
    variants=variants,
    answer=answer,
    caption="As 2016 Fig. 6, with all five orders in one panel: training dashed, held-out pictures bold.",
)
