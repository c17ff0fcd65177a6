"""Detection: boxes with classes, torchvision's losses of both stages, COCO's mean average precision."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnetlab.data.annotated_sampler import AugmentationDraw, flip_boxes, flip_image
from resnetlab.data.annotations import AnnotatedImage
from resnetlab.device import to_device
from resnetlab.errors import DataError
from resnetlab.evaluation.detection import (
    DetectionMetrics,
    compute_detection_metrics,
    predict_boxes,
    require_coco_eval,
)
from resnetlab.models.annotated_model import build_annotated_net
from resnetlab.models.head_spec import DetectionOptions, DetectorSpec
from resnetlab.training.tasks.annotated import AnnotatedTask, Plan, prepare_data


class DetectionSample(NamedTuple):
    """A training image, uint8 (H, W, 3), with its boxes (n, 4) and labels (n,), 1 for the first class."""

    pixels: Tensor
    boxes: Tensor
    labels: Tensor


def make_detection_sample(image: AnnotatedImage, draw: AugmentationDraw) -> DetectionSample:
    """An image with the boxes to train on, flipped."""
    pixels, trained = image.read_pixels(), ~image.ignored
    boxes = flip_boxes(image.boxes[trained], (pixels.shape[0], pixels.shape[1]), draw)
    return DetectionSample(flip_image(pixels, draw), boxes, image.labels[trained] + 1)


@dataclass(frozen=True, eq=False, kw_only=True)
class DetectionTask(AnnotatedTask[AnnotatedImage, DetectionSample]):
    """A detector with its training and evaluation images (`tasks.base`)."""

    task = "detect"

    head_spec: DetectorSpec

    def loss(self, batch: list[DetectionSample]) -> tuple[Tensor, Tensor]:
        """The sum of both stages' four losses, and the fraction of regions whose class is wrong; scalars."""
        images = [to_device(s.pixels, self.device_config.device).permute(2, 0, 1) / 255 for s in batch]
        targets = [
            {
                "boxes": to_device(s.boxes, self.device_config.device),
                "labels": to_device(s.labels, self.device_config.device),
            }
            for s in batch
        ]
        losses: dict[str, Tensor] = self.net(images, targets)
        error = losses.pop("error")
        return torch.stack(list(losses.values())).sum(), error

    def evaluate(self, images: Sequence[AnnotatedImage]) -> DetectionMetrics:
        """Evaluates the network in its present state."""
        truth, detections = predict_boxes(self.net, images, self.device_config, DetectionOptions(), self.errors)
        return compute_detection_metrics(truth, detections, self.classes)

    def evaluate_held_out(self) -> dict[str, float] | None:
        """mAP@.5 and mAP on the held-out images."""
        if not self.held_out:
            return None
        metrics = self.evaluate(self.held_out)
        return {"map_50": metrics.map_50, "map": metrics.map}


def prepare_detection_task(
    plan: Plan[AnnotatedImage], values: Mapping[str, Any], anchors: tuple[int, ...], regions: int
) -> DetectionTask:
    """Holds images out, chooses anchors, computes statistics, and builds the network.

    Args:
        values: values of `DetectorSpec` except `mean`, `std` and `anchors`.
        anchors: side lengths in pixels of the resized image; () chooses them from the training boxes.
        regions: see `models.detection.build_detector`.

    Raises:
        DataError, UsageError: the data, the network's name or a value is invalid.
    """
    require_coco_eval()
    prepared = prepare_data(plan, AnnotatedImage.read_pixels, values["bn"])
    anchors = anchors or choose_anchors(prepared.train, values["image_size"], values["longest"], values["form"])
    start, classes = prepared.start, len(plan.data.classes)
    spec = DetectorSpec(mean=start.mean, std=start.std, anchors=anchors, **values)
    net = build_annotated_net(start.net, spec, classes, seed=plan.seed, sides=plan.sides, regions=regions)
    return prepared.build_task(DetectionTask, plan, spec, net, make_detection_sample)


def choose_anchors(images: Sequence[AnnotatedImage], size: int, longest: int, form: str) -> tuple[int, ...]:
    """Anchor side lengths in pixels of the resized image, from quantiles of the square roots of the training boxes' areas.

    "fpn": five lengths, each twice the one before; one is the median, and the first is at most the 5 % quantile. "c4": the
    10 %, 50 % and 90 % quantiles (the paper's 128, 256 and 512, at a shorter side of 600, suit VOC's objects).
    """
    sides = []
    for image in images:
        height, width = image.size if image.size != (0, 0) else tuple(image.read_pixels().shape[:2])
        scale = min(size / min(height, width), longest / max(height, width))
        extents = image.boxes[:, 2:] - image.boxes[:, :2]
        sides.append(extents.double().prod(1).sqrt() * scale)
    lengths = torch.cat(sides)
    if not len(lengths):
        raise DataError("no training image has a box; there is nothing to train on.")
    low, tenth, median, high = (float(lengths.quantile(q)) for q in (0.05, 0.1, 0.5, 0.9))
    if form == "c4":
        return tuple(sorted({max(8, round(side)) for side in (tenth, median, high)}))
    finest = max(8.0, median / 2 ** math.ceil(math.log2(max(1.0, median / max(low, 1.0)))))
    return tuple(round(finest * 2**i) for i in range(5))
