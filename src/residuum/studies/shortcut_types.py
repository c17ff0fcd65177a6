"""Shortcut types: what becomes of a net whose shortcut is anything but the identity (2016 §3, Table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from residuum.studies import paper
from residuum.studies.orderings import WARM
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting
from residuum.studies.variants import Variant, side_by_side
from residuum.studies.verdicts import compare

TYPES: dict[str, tuple[Mapping[str, Any], paper.Printed]] = {
    "identity": ({}, paper.SHORTCUT_TYPES["original"]),
    "none (scaled by 0)": ({"shortcut": "none"}, paper.FAILS),
    "scaled, 0.5 and 0.5": ({"shortcut": "constant"}, paper.SHORTCUT_TYPES["constant"]),
    "exclusive gate, -6": ({"shortcut": "exclusive-gate"}, paper.SHORTCUT_TYPES["exclusive-gate"]),
    "shortcut-only gate, -6": ({"shortcut": "shortcut-gate"}, paper.SHORTCUT_TYPES["shortcut-gate"]),
    "1x1 convolution": ({"shortcut": "conv"}, paper.SHORTCUT_TYPES["conv"]),
    "dropout 0.5": ({"shortcut": "dropout"}, paper.FAILS),
}


def variants(setting: Setting) -> list[Variant]:
    """The seven shortcuts, at the deepest of the chosen depths."""
    depth = setting.chosen(smoke=(8,), quick=(20,), paper=(110,))[-1]
    return [Variant(label, f"resnet{depth}", values, printed, WARM) for label, (values, printed) in TYPES.items()]


def answer(setting: Setting, outcomes: Outcomes, chosen: Sequence[Variant]) -> tuple[str, str]:
    """How many of the six others test worse than the identity, by the rule."""
    base = outcomes.by_seed("identity", "test_error")
    found = {v.label: compare(outcomes.by_seed(v.label, "test_error"), base) for v in chosen[1:]}
    shown = [label for label, c in found.items() if c.strength == "shown"]
    hints = [label for label, c in found.items() if c.strength == "points to"]
    better = [v.label for v in chosen[1:] if found[v.label].reversed.strength == "shown"]
    first = f"Of six other shortcuts in {chosen[0].net}, {len(shown)} are shown to test worse than the identity."
    parts = [f"Shown: {', '.join(shown)}." if shown else "", f"Pointing that way: {', '.join(hints)}." if hints else ""]
    parts.append(f"Shown to test BETTER, against the paper: {', '.join(better)}." if better else "")
    return first, " ".join(part for part in parts if part)


STUDY = side_by_side(
    name="shortcut-types",
    question="Does anything but the identity do as a shortcut?",
    place="2016 Table 1, Fig. 3",
    variants=variants,
    answer=answer,
    caption="As 2016 Fig. 3, all shortcuts in one panel.",
    remarks=["The paper calls a run failed where its error is above 20 %; it gives those rows no other number."],
)
