"""Segmentation: a class for every pixel, cross entropy loss, intersection over union."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.data import mask_dataset
from resnetlab.data.annotated_dataset import AnnotatedDataset
from resnetlab.data.annotated_sampler import AugmentationDraw, flip_image
from resnetlab.data.mask_dataset import MaskedImage
from resnetlab.data.mask_files import VOID
from resnetlab.device import eval_mode
from resnetlab.evaluation import overlays
from resnetlab.evaluation.segmentation import SegmentationMetrics, compute_segmentation_metrics, segment_image
from resnetlab.formatting import format_count, format_split
from resnetlab.models.head_spec import SegmenterSpec
from resnetlab.training.annotated_recipes import SegmentationRecipe
from resnetlab.training.report import MAX_IMAGES, EvaluationSummary
from resnetlab.training.result import SegmentationResult
from resnetlab.training.tasks.annotated import AnnotatedTask

COLUMNS = (("class", "class"), ("pixels", "pixels"), ("iou", "IoU"))


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
    """A segmenter with its training and evaluation images."""

    name = "segment"
    command = "resnetlab segment train"
    recipe_type = SegmentationRecipe
    result_type = SegmentationResult
    skipped_one, skipped_many = "mask or image was invalid", "masks or images were invalid"
    metrics = ("mean_iou", "pixel_error", "per_class")
    held_out_metrics = ("mean_iou",)

    recipe: SegmentationRecipe
    head_spec: SegmenterSpec

    @classmethod
    def load_data(cls, recipe: SegmentationRecipe, path: Path) -> AnnotatedDataset[MaskedImage]:
        return mask_dataset.load_masks(path, recipe.on_bad_mask, recipe.class_255)

    @classmethod
    def sample_maker(cls, recipe: SegmentationRecipe) -> Callable[[MaskedImage, AugmentationDraw], SegmentationSample]:
        size = recipe.image_size
        return partial(make_segmentation_sample, size=size, sides=(size, *recipe.sides))

    @property
    def title(self) -> str:
        return f"{self.recipe.net} ({self.recipe.head})"

    def describe_data(self) -> str:
        return f"{format_count(len(self.train), 'image')} of {format_count(len(self.classes), 'class')}"

    def loss(self, batch: list[SegmentationSample]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats over the pixels that are not VOID, and the fraction of them that is wrong; scalars."""
        logits = self.net(torch.stack([s.pixels for s in batch]))  # (B, classes, h, w)
        masks = torch.stack([s.mask for s in batch]).long()
        valid = (masks != VOID).sum().clamp_min(1)
        wrong = ((logits.detach().argmax(1) != masks) & (masks != VOID)).sum() / valid
        if logits.device.type != "cuda":
            return F.cross_entropy(logits, masks, ignore_index=VOID, reduction="sum") / valid, wrong
        # torch's loss of maps adds in no fixed order there
        each = F.cross_entropy(
            logits.permute(0, 2, 3, 1).flatten(0, 2), masks.flatten(), ignore_index=VOID, reduction="none"
        )
        return each.sum() / valid, wrong

    def evaluate(self, images: Sequence[MaskedImage]) -> SegmentationMetrics:
        """Evaluates the network with its current weights."""
        with eval_mode(self.net):
            return compute_segmentation_metrics(self.segment, images, self.classes, self.errors, self.device_config)

    def segment(self, pixels: Tensor) -> Tensor:
        """The class of every pixel of an image by the current weights, uint8 (H, W, 3) -> int64 (H, W)."""
        return segment_image(self.net, pixels, self.head_spec, self.device_config)

    def summarise_evaluation(self, result: SegmentationResult, metrics: SegmentationMetrics) -> EvaluationSummary:
        images = []
        for image in metrics.images[:MAX_IMAGES]:
            pixels = image.read_pixels()
            overlay = overlays.draw_mask(pixels, self.segment(pixels))
            images.append((image.name, overlays.jpeg_data_uri(overlay)))
        return EvaluationSummary(
            merit=f"{result.mean_iou:.3f} mean IoU",
            lead=f"On the {format_split(self.evaluated_split)} split, {format_count(result.n, 'image')}; "
            f"{100 * result.pixel_error:.2f} % of pixels are wrong.",
            columns=COLUMNS,
            images=images,
            caption="Each class in its colour, the background unchanged; the first images of the split.",
        )
