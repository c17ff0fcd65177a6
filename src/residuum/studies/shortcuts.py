"""Shortcuts: options A, B and C, with what they cost (2015 §4.1, Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

from residuum.models.accounting import cost
from residuum.models.spec import specification
from residuum.studies import paper
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting
from residuum.studies.study import Row
from residuum.studies.variants import Variant, side_by_side, verdict

OPTIONS = {"plain": "none", "A": "A", "B": "B", "C": "C"}


def variants(setting: Setting) -> list[Variant]:
    """The plain net and the three options, at the deepest of the chosen depths."""
    depth = setting.chosen(smoke=(8,), quick=(20,), paper=(56,))[-1]
    return [
        Variant(label, f"resnet{depth}", {"shortcut": option}, paper.SHORTCUTS_TOP1[label])
        for label, option in OPTIONS.items()
    ]


def counts(setting: Setting, variant: Variant) -> list[Row]:
    """Parameters and multiply-adds of the net that was trained, and of the paper's 34 layers."""
    size = (setting.base.size,) * 2
    small = cost(setting.spec(setting.trials(variant.label, variant.net, variant.values)[0].recipe), size)
    large = cost(specification("resnet34", **variant.values))
    words = f"the paper's 34 layers with this option: {large.parameters:,} parameters, {large.multiply_adds:,} multiply-adds"
    return [
        Row(variant.label, "parameters", (small.parameters,), words, unit="count"),
        Row(variant.label, "multiply-adds", (small.multiply_adds,), "of one picture; as above", unit="count"),
    ]


def answer(setting: Setting, outcomes: Outcomes, chosen: Sequence[Variant]) -> tuple[str, str]:
    """All options beside the plain net, and C beside A."""
    gains = [verdict(outcomes, "plain", option, "test error", f"option {option} helps")[1] for option in "ABC"]
    first, more = verdict(
        outcomes, "A", "C", "test error", f"projections everywhere (C) beat none (A) in {chosen[0].net}"
    )
    return first, " ".join([more, *gains])


STUDY = side_by_side(
    name="shortcuts",
    question="Do projections do better than shortcuts without parameters?",
    place="2015 Table 3",
    variants=variants,
    answer=answer,
    extra=counts,
    caption="2015 Table 3 has no figure; laid out as its Fig. 6.",
    remarks=["The paper's errors are of 34 layers on ImageNet; the nets here are of the 6n+2 family."],
)
