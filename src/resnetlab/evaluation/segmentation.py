"""Masks that a segmenter predicts, and their metrics: intersection over union of each class, over all pixels of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.mask_dataset import MaskedImage
from resnetlab.data.mask_files import VOID
from resnetlab.data.prefetch import default_workers, read_in_threads
from resnetlab.device import DeviceConfig, eval_mode, to_device
from resnetlab.evaluation.metrics import mean_of_known
from resnetlab.models.head_spec import SegmenterSpec


@dataclass(frozen=True, eq=False)
class SegmentationMetrics:
    """Metrics of a segmenter on a split.

    Attributes:
        confusion: numbers of pixels, int64 (classes, classes); rows are true classes, VOID pixels are left out.
        images: the images that were evaluated.
    """

    classes: tuple[str, ...]
    confusion: Tensor
    images: Sequence[MaskedImage]

    @property
    def iou(self) -> list[float | None]:
        """Intersection over union of each class: right pixels over true or predicted ones; None if there are neither."""
        right = self.confusion.diag().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - self.confusion.diag()
        return [float(r / u) if u else None for r, u in zip(right, union.tolist(), strict=True)]

    @property
    def mean_iou(self) -> float:
        """The mean over the classes that occur, including the background."""
        return mean_of_known(self.iou)

    @property
    def pixel_error(self) -> float:
        """The fraction of pixels whose class is wrong."""
        total = int(self.confusion.sum())
        return 1 - int(self.confusion.diag().sum()) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        counts = self.confusion.sum(1).tolist()
        rows = zip(self.classes, counts, self.iou, strict=True)
        return {
            "mean_iou": self.mean_iou,
            "pixel_error": self.pixel_error,
            "n": len(self.images),
            "per_class": [{"class": name, "pixels": n, "iou": iou} for name, n, iou in rows],
        }


def resize_bounded(pixels: Tensor, size: int, longest: int) -> Tensor:
    """uint8 (H, W, 3) -> uint8 (h, w, 3): the shorter side is `size` pixels, the longer at most `longest`."""
    height, width = pixels.shape[:2]
    scale = min(size / min(height, width), longest / max(height, width))
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    x = pixels.permute(2, 0, 1)[None].contiguous()
    return F.interpolate(x, shape, mode="bilinear", antialias=True, align_corners=False)[0].permute(1, 2, 0)


def segment_image(net: nn.Module, pixels: Tensor, spec: SegmenterSpec, device_config: DeviceConfig) -> Tensor:
    """The class of every pixel of an image, uint8 (H, W, 3) -> int64 (H, W)."""
    with eval_mode(net), device_config.autocast():
        x = resize_bounded(pixels, spec.image_size, spec.longest)[None]
        logits = net(to_device(x, device_config.device))  # (1, classes, h, w)
        logits = F.interpolate(logits.float(), pixels.shape[:2], mode="bilinear", align_corners=False)
    return logits[0].argmax(0).cpu()


def compute_segmentation_metrics(
    segment: Callable[[Tensor], Tensor],
    images: Sequence[MaskedImage],
    classes: tuple[str, ...],
    errors: ErrorPolicy,
    device_config: DeviceConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> SegmentationMetrics:
    """Evaluates a segmenter on images at their own size; `errors` handles those that cannot be read.

    Args:
        segment: the segmenter, uint8 (H, W, 3) -> int64 (H, W), the class of every pixel; its network is in eval mode, since
            several threads call it.
    """
    confusion, evaluated = torch.zeros(len(classes), len(classes), dtype=torch.int64), []

    def count(read: tuple[MaskedImage, tuple[Tensor, Tensor]]) -> tuple[MaskedImage, Tensor]:
        image, (pixels, mask) = read
        predicted, valid = segment(pixels), mask != VOID
        pairs = mask[valid].long() * len(classes) + predicted[valid]
        return image, torch.bincount(pairs, minlength=len(classes) ** 2).view_as(confusion)

    with (
        read_in_threads(MaskedImage.read, images, default_workers(device_config)) as read,
        device_config.side_by_side_map(len(images)) as side_by_side,
    ):
        for image, pairs in side_by_side(count, errors.read_each(images, read)):
            confusion += pairs
            evaluated.append(image)
            on_progress(len(evaluated), len(images))
    return SegmentationMetrics(classes, confusion, evaluated)
