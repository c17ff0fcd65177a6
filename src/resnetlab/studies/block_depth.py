"""Block depth: F of one, two or three layers, in nets of equally many layers (2015 §3.2; 2016 Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

from resnetlab.studies.runs import RunOutcomes
from resnetlab.studies.setting import Setting
from resnetlab.studies.variants import WARMUP_2016, SideBySide, Variant, assess_claim


class BlockDepth(SideBySide):
    """A plain net, and shortcuts over one, two and three of its layers."""

    name = "block-depth"
    question = "Over how many layers should a shortcut lead?"
    place = "2015 §3.2; 2016 Table 3"
    caption = (
        "The papers have no figure of this; laid out as 2015 Fig. 6. Every net has equally many layers and parameters."
    )
    remarks = ("F of three is left out where its layers do not fill a stage evenly.",)

    def variants(self, setting: Setting) -> list[Variant]:
        """At the deepest of the depths."""
        depth = setting.pick_basic_depth(smoke=8, quick=20, paper=110)
        layers = (depth - 2) // 3  # of one stage
        variants = [Variant("plain", f"resnet{depth}", {"shortcut": "none"}, WARMUP_2016)]
        for over in (1, 2, 3):
            if layers % over == 0:
                values = {"layers": over, "depths": (layers // over,) * 3} if over != 2 else {}
                variants.append(Variant(f"F of {over}", f"resnet{depth}", values, WARMUP_2016))
        return variants

    def answer(self, setting: Setting, outcomes: RunOutcomes, variants: Sequence[Variant]) -> tuple[str, str]:
        """Two layers compared with one, and one with none."""
        verdict, details = assess_claim(
            setting, outcomes, "F of 1", "F of 2", "shortcuts over two layers beat shortcuts over one"
        )
        gain = assess_claim(setting, outcomes, "plain", "F of 1", "")[1]
        paper_says = "The paper saw no advantage of one layer, where y = W1x + x is nearly linear (2015 §3.2)."
        return verdict, f"{details} {gain} {paper_says}"
