"""Detection: boxes with classes, torchvision's losses of both stages, COCO's mean average precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residuum.data.annotated import Annotated
from residuum.data.samples import Draw, mirrored, mirrored_boxes
from residuum.errors import DataError
from residuum.evaluation import boxes
from residuum.evaluation.boxes import BoxJudgement
from residuum.evaluation.detections import find
from residuum.models.dense_file import build
from residuum.models.values import Additions, Detector
from residuum.runtime import to_device
from residuum.tasks.dense import DenseTask, Plan, begin


class Sample(NamedTuple):
    """A training picture, uint8 (H, W, 3), with its boxes (n, 4) and labels (n,), 1 for the first class."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor


def sample(picture: Annotated, draw: Draw) -> Sample:
    """A picture with the boxes that are trained on, mirrored."""
    pixels, own = picture.pixels(), ~picture.ignored
    placed = mirrored_boxes(picture.boxes[own], (pixels.shape[0], pixels.shape[1]), draw)
    return Sample(mirrored(pixels, draw), placed, picture.labels[own] + 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class Detect(DenseTask[Annotated, Sample]):
    """A detector, the pictures it learns from and is judged on (`tasks.task`)."""

    task = "detect"
    option = "--on-bad-box"

    values: Detector

    def loss(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """The sum of the four losses of both stages, and the share of trained regions whose class is wrong; scalars."""
        pictures = [to_device(s.pixels, self.engine).permute(2, 0, 1) / 255 for s in batch]
        targets = [
            {"boxes": to_device(s.boxes, self.engine), "labels": to_device(s.labels, self.engine)} for s in batch
        ]
        losses: dict[str, Tensor] = self.net(pictures, targets)
        wrong = losses.pop("error")
        return torch.stack(list(losses.values())).sum(), wrong

    def judge(self, pictures: Sequence[Annotated]) -> BoxJudgement:
        """Judges the network as it is now."""
        readable, found = find(self.net, pictures, self.engine, Additions(), self.on_bad, self.skipped)
        return boxes.judge(readable, found, self.classes)

    def judge_held_out(self) -> dict[str, float] | None:
        """mAP@.5 and mAP on the held-out pictures."""
        if not self.held_out:
            return None
        judgement = self.judge(self.held_out)
        return {"map_50": judgement.map_50, "map": judgement.map}


def prepare(plan: Plan[Annotated], values: Mapping[str, Any], anchors: tuple[int, ...], regions: int) -> Detect:
    """Holds pictures out, finds anchors and statistics, and builds the network.

    Args:
        values: the detector's, but for what is found here: `mean`, `std` and `anchors`.
        anchors: sides in pixels at the network's scale; () takes them from the training boxes.
        regions: see `models.dense.detector`.

    Raises:
        DataError, UsageError: what the data, the network's name or a value cannot be.
    """
    boxes.needed()
    begun = begin(plan, Annotated.pixels, values["bn"])
    found = anchors or anchor_sides(begun.train, values["size"], values["longest"], values["form"])
    chosen = Detector(mean=begun.start.mean, std=begun.start.std, anchors=found, **values)
    network = build(begun.start.net, chosen, len(plan.data.classes), seed=plan.seed, sides=plan.sides, regions=regions)
    return begun.task(Detect, plan, chosen, network, sample)


def anchor_sides(pictures: Sequence[Annotated], size: int, longest: int, form: str) -> tuple[int, ...]:
    """Sides of anchors in pixels at the network's scale, from the square roots of the training boxes' areas.

    "fpn": five that double, one of them the median, the finest at most the smallest twentieth. "c4": a tenth, the median, nine
    tenths of the boxes (the paper's three, 128, 256 and 512 at a shorter side of 600, are for VOC's objects).
    """
    sides = []
    for picture in pictures:
        height, width = picture.size if picture.size != (0, 0) else tuple(picture.pixels().shape[:2])
        scale = min(size / min(height, width), longest / max(height, width))
        spans = picture.boxes[:, 2:] - picture.boxes[:, :2]
        sides.append(spans.double().prod(1).sqrt() * scale)
    found = torch.cat(sides)
    if not len(found):
        raise DataError("no training picture has a box; there is nothing to learn.")
    low, tenth, median, most = (float(found.quantile(q)) for q in (0.05, 0.1, 0.5, 0.9))
    if form == "c4":
        return tuple(sorted({max(8, round(side)) for side in (tenth, median, most)}))
    finest = max(8.0, median / 2 ** math.ceil(math.log2(max(1.0, median / max(low, 1.0)))))
    return tuple(round(finest * 2**i) for i in range(5))
