"""Shortcut types: the error of a net whose shortcut is anything but the identity (2016 §3, Table 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.variants import WARMUP_2016, SideBySide, Variant
from resnetlab.studies.verdicts import compare_by_seed

TYPES: dict[str, Mapping[str, Any]] = {
    "identity": {},
    "none (scaled by 0)": {"shortcut": "none"},
    "scaled, 0.5 and 0.5": {"shortcut": "constant"},
    "exclusive gate, -6": {"shortcut": "exclusive-gate"},
    "shortcut-only gate, -6": {"shortcut": "shortcut-gate"},
    "1x1 convolution": {"shortcut": "conv"},
    "dropout 0.5": {"shortcut": "dropout"},
}
REST: dict[str, Mapping[str, Any]] = {  # of Table 1, which prints two of the shortcut-only gate's biases
    "scaled, 0.5 and 1": {"shortcut": "constant", "shortcut_scale": 0.5, "residual_scale": 1.0},
    **{
        f"{gate} gate, {b}": {"shortcut": f"{gate.removesuffix('-only')}-gate", "gate_bias": float(b)}
        for gate in ("exclusive", "shortcut-only")
        for b in (0, -1, -2, -3, -4, -5, -7)
    },
}


class ShortcutTypes(SideBySide):
    """The identity and six others; at the paper's length all rows of its table, and both gates with each bias."""

    name = "shortcut-types"
    question = "Does anything but the identity do as a shortcut?"
    place = "2016 Table 1, Fig. 3"
    caption = "As 2016 Fig. 3: each shortcut beside the identity. Its panel (c) has the shortcut-only gate of bias 0."
    remarks = ("The paper calls a run failed where its error is above 20 %; it gives those rows no other number.",)

    def variants(self, setting: Setting) -> list[Variant]:
        """At the deepest of the depths."""
        depth = setting.pick_depths(smoke=(8,), quick=(20,), paper=(110,))[-1]
        types = TYPES | REST if setting.budget == "paper" else TYPES
        return [Variant(label, f"resnet{depth}", values, WARMUP_2016) for label, values in types.items()]

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """How many of the others test worse than the identity, by the rule."""
        base = outcomes.by_seed("identity", "test_error")
        differences = {v.label: compare_by_seed(outcomes.by_seed(v.label, "test_error"), base) for v in variants[1:]}
        worse = [label for label, d in differences.items() if d.strength == "shown"]
        hints = [label for label, d in differences.items() if d.strength == "points to"]
        better = [label for label, d in differences.items() if d.reversed.strength == "shown"]
        verdict = (
            f"Of {len(differences)} other shortcuts in {variants[0].net}, {len(worse)} are shown to test worse than the "
            f"identity{setting.condition}."
        )
        titles = ("Shown", "Pointing that way, no more", "Shown to test BETTER, against the paper")
        details = [
            f"{title}: {', '.join(f'{label} ({differences[label].describe()})' for label in each)}."
            for title, each in zip(titles, (worse, hints, better), strict=True)
            if each
        ]
        return verdict, " ".join(details)
