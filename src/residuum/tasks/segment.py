"""Segmentation: a class for every pixel, cross entropy, intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from residuum.data.masks import VOID, Masked
from residuum.data.samples import Draw, mirrored
from residuum.evaluation.masks import MaskJudgement, judge
from residuum.models.dense_file import build
from residuum.models.values import Segmenter
from residuum.runtime import to_device
from residuum.tasks.dense import DenseTask, Plan, begin


class Sample(NamedTuple):
    """A square of a training picture, uint8 (size, size, 3), and its mask, uint8 (size, size)."""

    pixels: Tensor
    mask: Tensor


def sample(picture: Masked, draw: Draw, *, size: int, sides: tuple[int, ...]) -> Sample:
    """A square of `size`, from the picture with its shorter side brought to one of `sides`; void where the picture ends."""
    pixels, mask = picture.read()
    side = sides[int(draw.scale * len(sides))]
    scale = side / min(mask.shape)
    height, width = (max(1, round(length * scale)) for length in mask.shape)
    x = F.interpolate(pixels.permute(2, 0, 1)[None].contiguous(), (height, width), mode="bilinear", antialias=True)
    y = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")
    down, right = max(0, size - height), max(0, size - width)
    x, y = F.pad(x, (0, right, 0, down)), F.pad(y, (0, right, 0, down), value=VOID)
    top, left = (int(d * (length - size + 1)) for d, length in ((draw.top, x.shape[2]), (draw.left, x.shape[3])))
    window = (..., slice(top, top + size), slice(left, left + size))
    return Sample(
        mirrored(x[window][0].permute(1, 2, 0), draw).contiguous(), mirrored(y[window][0, 0], draw).contiguous()
    )


def _pixels(picture: Masked) -> Tensor:
    return picture.read()[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment(DenseTask[Masked, Sample]):
    """A segmenter, the pictures it learns from and is judged on (`tasks.task`)."""

    task = "segment"
    option = "--on-bad-mask"

    values: Segmenter

    def loss(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats over the pixels that have a class, and the share of them that is wrong; scalars."""
        logits = self.net(to_device(torch.stack([s.pixels for s in batch]), self.engine))  # (B, classes, h, w)
        masks = to_device(torch.stack([s.mask for s in batch]), self.engine).long()
        known = (masks != VOID).sum().clamp_min(1)
        wrong = ((logits.detach().argmax(1) != masks) & (masks != VOID)).sum() / known
        return F.cross_entropy(logits, masks, ignore_index=VOID, reduction="sum") / known, wrong

    def judge(self, pictures: Sequence[Masked]) -> MaskJudgement:
        """Judges the network as it is now."""
        return judge(self.net, pictures, self.classes, self.values, self.engine, self.on_bad, self.skipped)

    def judge_held_out(self) -> dict[str, float] | None:
        """Mean intersection over union on the held-out pictures."""
        return {"mean_iou": self.judge(self.held_out).mean_iou} if self.held_out else None


def prepare(plan: Plan[Masked], values: Mapping[str, Any]) -> Segment:
    """Holds pictures out, takes statistics, and builds the network; arguments and errors as `tasks.detect.prepare`."""
    begun = begin(plan, _pixels, values["bn"])
    chosen = Segmenter(mean=begun.start.mean, std=begun.start.std, **values)
    network = build(begun.start.net, chosen, len(plan.data.classes), seed=plan.seed)
    return begun.task(
        Segment, plan, chosen, network, partial(sample, size=chosen.size, sides=(chosen.size, *plan.sides))
    )
