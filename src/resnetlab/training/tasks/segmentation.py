"""Segmentation: a class for every pixel, cross entropy loss, intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.data.annotated_sampler import AugmentationDraw, flip_image
from resnetlab.data.mask_dataset import VOID, MaskedImage
from resnetlab.device import to_device
from resnetlab.evaluation.segmentation import SegmentationMetrics, compute_segmentation_metrics
from resnetlab.models.annotated_model import build_annotated_net
from resnetlab.models.head_spec import SegmenterSpec
from resnetlab.training.tasks.annotated import AnnotatedTask, Plan, prepare_data


class SegmentationSample(NamedTuple):
    """A square of a training image, uint8 (size, size, 3), and its mask, uint8 (size, size)."""

    pixels: Tensor
    mask: Tensor


def make_segmentation_sample(
    image: MaskedImage, draw: AugmentationDraw, *, size: int, sides: tuple[int, ...]
) -> SegmentationSample:
    """A square crop of `size` from the image resized to a shorter side among `sides`; padded with VOID."""
    pixels, mask = image.read()
    side = sides[int(draw.scale * len(sides))]
    scale = side / min(mask.shape)
    height, width = (max(1, round(length * scale)) for length in mask.shape)
    x = F.interpolate(pixels.permute(2, 0, 1)[None].contiguous(), (height, width), mode="bilinear", antialias=True)
    y = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")
    bottom, right = max(0, size - height), max(0, size - width)
    x, y = F.pad(x, (0, right, 0, bottom)), F.pad(y, (0, right, 0, bottom), value=VOID)
    top, left = (int(d * (length - size + 1)) for d, length in ((draw.top, x.shape[2]), (draw.left, x.shape[3])))
    window = (..., slice(top, top + size), slice(left, left + size))
    return SegmentationSample(
        flip_image(x[window][0].permute(1, 2, 0), draw).contiguous(), flip_image(y[window][0, 0], draw).contiguous()
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentationTask(AnnotatedTask[MaskedImage, SegmentationSample]):
    """A segmenter with its training and evaluation images (`tasks.base`)."""

    task = "segment"

    head_spec: SegmenterSpec

    def loss(self, batch: list[SegmentationSample]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats over the pixels that are not VOID, and the fraction of them that is wrong; scalars."""
        logits = self.net(
            to_device(torch.stack([s.pixels for s in batch]), self.device_config.device)
        )  # (B, classes, h, w)
        masks = to_device(torch.stack([s.mask for s in batch]), self.device_config.device).long()
        valid = (masks != VOID).sum().clamp_min(1)
        wrong = ((logits.detach().argmax(1) != masks) & (masks != VOID)).sum() / valid
        return F.cross_entropy(logits, masks, ignore_index=VOID, reduction="sum") / valid, wrong

    def evaluate(self, images: Sequence[MaskedImage]) -> SegmentationMetrics:
        """Evaluates the network in its present state."""
        return compute_segmentation_metrics(
            self.net, images, self.classes, self.head_spec, self.device_config, self.errors
        )

    def evaluate_held_out(self) -> dict[str, float] | None:
        """Mean intersection over union on the held-out images."""
        return {"mean_iou": self.evaluate(self.held_out).mean_iou} if self.held_out else None


def prepare_segmentation_task(plan: Plan[MaskedImage], values: Mapping[str, Any]) -> SegmentationTask:
    """Holds images out, computes statistics, and builds the network; see `tasks.detection.prepare_detection_task`."""
    prepared = prepare_data(plan, MaskedImage.read_pixels, values["bn"])
    spec = SegmenterSpec(mean=prepared.start.mean, std=prepared.start.std, **values)
    net = build_annotated_net(prepared.start.net, spec, len(plan.data.classes), seed=plan.seed)
    make_sample = partial(make_segmentation_sample, size=spec.image_size, sides=(spec.image_size, *plan.sides))
    return prepared.build_task(SegmentationTask, plan, spec, net, make_sample)
