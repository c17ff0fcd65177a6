"""Bottleneck: units of 1x1, 3x3, 1x1 beside basic ones at equal cost (2015 §4.1, Fig. 5)."""

from __future__ import annotations

from collections.abc import Sequence

from residuum.models.accounting import cost
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting
from residuum.studies.study import Row
from residuum.studies.variants import Variant, side_by_side, verdict


def variants(setting: Setting) -> list[Variant]:
    """As many basic units as bottlenecks, which have one layer more each: 6n+2 layers beside 9n+2."""
    depth = setting.chosen(smoke=(8,), quick=(20,), paper=(56,))[-1]
    deeper = 9 * (depth - 2) // 6 + 2
    return [
        Variant(f"basic, {depth} layers", f"resnet{depth}", {"shortcut": "B"}),
        Variant(f"bottleneck, {deeper} layers", f"resnet{depth}", {"shortcut": "B", "block": "bottleneck"}),
    ]


def counts(setting: Setting, variant: Variant) -> list[Row]:
    """Parameters and multiply-adds of the net that was trained."""
    counted = cost(
        setting.spec(setting.trials(variant.label, variant.net, variant.values)[0].recipe), (setting.base.size,) * 2
    )
    words = f"{counted.depth} layers; option B, because a bottleneck widens in the first stage too"
    return [
        Row(variant.label, "parameters", (counted.parameters,), words, unit="count"),
        Row(variant.label, "multiply-adds", (counted.multiply_adds,), "of one picture", unit="count"),
    ]


def answer(setting: Setting, outcomes: Outcomes, chosen: Sequence[Variant]) -> tuple[str, str]:
    """The bottleneck beside the basic net."""
    basic, bottleneck = (variant.label for variant in chosen)
    work = [counts(setting, variant)[1].values[0] for variant in chosen]
    claim = f"the bottleneck tests better, at {work[1] / work[0]:.2f} times the multiply-adds"
    first, more = verdict(outcomes, basic, bottleneck, "test error", claim)
    return first, f"{more} The paper's motive is training time, not error: 50 layers cost what 34 do (3.8 and 3.6e9)."


STUDY = side_by_side(
    name="bottleneck",
    question="What do bottlenecks bring at equal cost?",
    place="2015 Fig. 5, Table 1",
    variants=variants,
    answer=answer,
    extra=counts,
    caption="The paper has no figure of this; laid out as 2015 Fig. 6.",
)
