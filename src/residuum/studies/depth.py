"""Depth: residual nets from 20 layers to 110, and 1202 (2015 §4.2, Table 6, Fig. 6 middle and right)."""

from __future__ import annotations

from collections.abc import Sequence

from residuum.studies import paper
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting
from residuum.studies.variants import DEEP, Variant, side_by_side, verdict


def variants(setting: Setting) -> list[Variant]:
    """Residual nets of rising depth, the deep ones with the paper's warm-up."""
    depths = setting.chosen(smoke=(8, 14), quick=(8, 20, 32, 56), paper=(20, 32, 44, 56, 110, 1202))
    return [
        Variant(
            f"resnet{d}",
            f"resnet{d}",
            {},
            paper.CIFAR10.get(f"resnet{d}"),
            {"warmup": "train-error" if d >= DEEP else setting.base.warmup},
        )
        for d in depths
    ]


def answer(setting: Setting, outcomes: Outcomes, chosen: Sequence[Variant]) -> tuple[str, str]:
    """The deepest beside the shallowest."""
    if len(chosen) < 2:
        return "One depth alone has nothing to be compared with; give several with --depths.", ""
    shallow, deep = chosen[0].label, chosen[-1].label
    return verdict(outcomes, shallow, deep, "test error", f"{deep} tests better than {shallow}")


STUDY = side_by_side(
    name="depth",
    question="Do residual networks gain from depth?",
    place="2015 Table 6, Fig. 6",
    variants=variants,
    answer=answer,
    caption="As 2015 Fig. 6 (middle and right), with the test errors of Table 6 beside.",
)
