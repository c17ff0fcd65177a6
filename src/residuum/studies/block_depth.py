"""Block depth: F of one, two or three layers, in nets of equally many layers (2015 §3.2; 2016 Table 3)."""

from __future__ import annotations

from collections.abc import Sequence

from residuum.studies import paper
from residuum.studies.runs import Outcomes
from residuum.studies.setting import Setting
from residuum.studies.variants import Variant, side_by_side, verdict


def variants(setting: Setting) -> list[Variant]:
    """A plain net, and shortcuts over one, two and three of its layers; the depth is the deepest that all three divide."""
    depth = setting.chosen(smoke=(8,), quick=(20,), paper=(56,))[-1]
    layers = (depth - 2) // 3  # of one stage
    found = [Variant("plain", f"resnet{depth}", {"shortcut": "none"})]
    for over in (1, 2, 3):
        if layers % over == 0:
            values = {"layers": over, "depths": (layers // over,) * 3} if over != 2 else {}
            printed = {1: paper.ONE_LAYER, 2: paper.CIFAR10["resnet110"]}.get(over)
            found.append(Variant(f"F of {over}", f"resnet{depth}", values, printed))
    return found


def answer(setting: Setting, outcomes: Outcomes, chosen: Sequence[Variant]) -> tuple[str, str]:
    """Two layers beside one, and one beside none."""
    first, more = verdict(
        outcomes, "F of 1", "F of 2", "test error", "shortcuts over two layers beat shortcuts over one"
    )
    gain = verdict(outcomes, "plain", "F of 1", "test error", "")[1]
    return (
        first,
        f"{more} {gain} The paper saw no advantage of one layer, where y = W1x + x is nearly linear (2015 §3.2).",
    )


STUDY = side_by_side(
    name="block-depth",
    question="Over how many layers should a shortcut lead?",
    place="2015 §3.2; 2016 Table 3",
    variants=variants,
    answer=answer,
    caption="The papers have no figure of this; laid out as 2015 Fig. 6. Every net has equally many layers and parameters.",
    remarks=[
        "The paper's numbers are of 110 layers. F of three is left out where its layers do not fill a stage evenly."
    ],
)
