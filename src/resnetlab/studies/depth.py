"""Depth: residual nets from 20 layers to 110, and 1202 (2015 §4.2, Table 6, Fig. 6 middle and right)."""

from __future__ import annotations

from collections.abc import Sequence

from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.variants import SideBySide, Variant, assess_claim, warmup_2015


class Depth(SideBySide):
    """Residual nets of rising depth, the deep ones with the paper's warm-up."""

    name = "depth"
    question = "Do residual networks gain from depth?"
    place = "2015 Table 6, Fig. 6"
    caption = "As 2015 Fig. 6 (middle and right), with the test errors of Table 6 beside it."

    def variants(self, setting: Setting) -> list[Variant]:
        """Shallow to deep."""
        depths = setting.pick_depths(smoke=(8, 14), quick=(8, 20, 32, 56), paper=(20, 32, 44, 56, 110, 1202))
        return [Variant(f"resnet{n}", f"resnet{n}", {}, warmup_2015(setting, n)) for n in depths]

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """The deepest compared with the shallowest."""
        if len(variants) < 2:
            return "One depth alone has nothing to be compared with; give several with --depths.", ""
        shallow, deep = variants[0].label, variants[-1].label
        answer, details = assess_claim(setting, outcomes, shallow, deep, f"{deep} tests better than {shallow}")
        if deep == "resnet1202":
            details += (
                " The paper's tests worse than ResNet-110, at a training error below 0.1 %: it overfits (2015 §4.2)."
            )
        return answer, details
