"""Shortcut types: the error of a net whose shortcut is anything but the identity (2016 §3, Table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resnetlab.studies import paper
from resnetlab.studies.orderings import WARMUP
from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.variants import SideBySide, Variant
from resnetlab.studies.verdicts import compare_by_seed

TYPES: dict[str, tuple[Mapping[str, Any], paper.PublishedFigure]] = {
    "identity": ({}, paper.SHORTCUT_TYPES["original"]),
    "none (scaled by 0)": ({"shortcut": "none"}, paper.FAILS),
    "scaled, 0.5 and 0.5": ({"shortcut": "constant"}, paper.SHORTCUT_TYPES["constant"]),
    "exclusive gate, -6": ({"shortcut": "exclusive-gate"}, paper.SHORTCUT_TYPES["exclusive-gate"]),
    "shortcut-only gate, -6": ({"shortcut": "shortcut-gate"}, paper.SHORTCUT_TYPES["shortcut-gate"]),
    "1x1 convolution": ({"shortcut": "conv"}, paper.SHORTCUT_TYPES["conv"]),
    "dropout 0.5": ({"shortcut": "dropout"}, paper.FAILS),
}


class ShortcutTypes(SideBySide):
    """The seven shortcuts."""

    name = "shortcut-types"
    question = "Does anything but the identity do as a shortcut?"
    place = "2016 Table 1, Fig. 3"
    caption = "As 2016 Fig. 3, all shortcuts in one panel."
    remarks = ("The paper calls a run failed where its error is above 20 %; it gives those rows no other number.",)

    def variants(self, setting: Setting) -> list[Variant]:
        """At the deepest of the depths."""
        depth = setting.pick_depths(smoke=(8,), quick=(20,), paper=(110,))[-1]
        return [Variant(label, f"resnet{depth}", values, printed, WARMUP) for label, (values, printed) in TYPES.items()]

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """How many of the six others test worse than the identity, by the rule."""
        base = outcomes.by_seed("identity", "test_error")
        differences = {v.label: compare_by_seed(outcomes.by_seed(v.label, "test_error"), base) for v in variants[1:]}
        worse = [label for label, d in differences.items() if d.strength == "shown"]
        hints = [label for label, d in differences.items() if d.strength == "points to"]
        better = [label for label, d in differences.items() if d.reversed.strength == "shown"]
        verdict = (
            f"Of six other shortcuts in {variants[0].net}, {len(worse)} are shown to test worse than the identity."
        )
        titles = ("Shown", "Pointing that way", "Shown to test BETTER, against the paper")
        details = [
            f"{title}: {', '.join(each)}." for title, each in zip(titles, (worse, hints, better), strict=True) if each
        ]
        return verdict, " ".join(details)
