"""Detection: boxes with classes, torchvision's losses of both stages, COCO's mean average precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnetlab.data import box_dataset
from resnetlab.data.annotated_dataset import AnnotatedDataset
from resnetlab.data.annotated_sampler import AugmentationDraw, flip_boxes, flip_image
from resnetlab.data.annotations import AnnotatedImage
from resnetlab.errors import DataError
from resnetlab.evaluation import overlays
from resnetlab.evaluation.detection import DetectionMetrics, compute_detection_metrics, predict_boxes, require_coco_eval
from resnetlab.formatting import format_count, format_split
from resnetlab.models.head_spec import DetectionOptions, DetectorSpec, HeadSpec
from resnetlab.training.annotated_recipes import DetectionRecipe
from resnetlab.training.report import MAX_IMAGES, EvaluationSummary
from resnetlab.training.result import DetectionResult
from resnetlab.training.tasks.annotated import AnnotatedTask, StartingNetwork

COLUMNS = (("class", "class"), ("n", "boxes"), ("ap_50", "AP@.5"), ("ap", "AP@[.5:.95]"), ("voc_ap", "VOC AP"))
MIN_SCORE = 0.5  # of the boxes that the report shows


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
    """A detector with its training and evaluation images."""

    name = "detect"
    command = "resnetlab detect train"
    recipe_type = DetectionRecipe
    result_type = DetectionResult
    nondeterministic_on_gpu = "the gradients of region features (ROI align)"
    skipped_one, skipped_many = "box or image was invalid", "boxes or images were invalid"
    metrics = ("map", "map_50", "voc_map", "per_class")
    held_out_metrics = ("map_50", "map")

    recipe: DetectionRecipe
    head_spec: DetectorSpec

    @classmethod
    def load_data(cls, recipe: DetectionRecipe, path: Path) -> AnnotatedDataset[AnnotatedImage]:
        data = box_dataset.load_boxes(path, recipe.on_bad_box)
        require_coco_eval()
        return data

    @classmethod
    def choose_head(cls, recipe: DetectionRecipe, start: StartingNetwork, train: Sequence[AnnotatedImage]) -> HeadSpec:
        """The detector's specification; its anchors are chosen from the training boxes unless the recipe gives them."""
        anchors = recipe.anchors or choose_anchors(train, recipe.image_size, recipe.longest, recipe.form)
        return super().choose_head(replace(recipe, anchors=anchors), start, train)

    @classmethod
    def head_options(cls, recipe: DetectionRecipe) -> dict[str, Any]:
        return {"sides": recipe.sides, "regions": recipe.regions}

    @classmethod
    def sample_maker(cls, recipe: DetectionRecipe) -> Callable[[AnnotatedImage, AugmentationDraw], DetectionSample]:
        return make_detection_sample

    @property
    def title(self) -> str:
        return f"{self.recipe.net} ({self.recipe.form})"

    def describe_data(self) -> str:
        count, anchors = sum(len(image.boxes) for image in self.train), ", ".join(map(str, self.head_spec.anchors))
        images, boxes = format_count(len(self.train), "image"), format_count(count, "box")
        return f"{images}, {boxes} of {format_count(len(self.classes), 'class')} (anchors {anchors} px)"

    def loss(self, batch: list[DetectionSample]) -> tuple[Tensor, Tensor]:
        """The sum of both stages' four losses, and the fraction of regions whose class is wrong; scalars."""
        images = [s.pixels.permute(2, 0, 1) / 255 for s in batch]
        targets = [{"boxes": s.boxes, "labels": s.labels} for s in batch]
        losses: dict[str, Tensor] = self.net(images, targets)
        error = losses.pop("error")
        return torch.stack(list(losses.values())).sum(), error

    def evaluate(self, images: Sequence[AnnotatedImage]) -> DetectionMetrics:
        """Evaluates the network with its current weights."""
        truth, detections = predict_boxes([self.net], images, self.device_config, DetectionOptions(), self.errors)
        return compute_detection_metrics(truth, detections, self.classes)

    def summarise_evaluation(self, result: DetectionResult, metrics: DetectionMetrics) -> EvaluationSummary:
        count = sum(row["n"] for row in result.per_class)
        counts = f"{format_count(result.n, 'image')} with {format_count(count, 'box')}"
        scope = f"On the {format_split(self.evaluated_split)} split, {counts}"
        images = []
        for truth, found in list(zip(metrics.truth, metrics.detections, strict=True))[:MAX_IMAGES]:
            overlay = overlays.draw_boxes(truth.read_pixels(), found.at_least(MIN_SCORE), self.classes, truth)
            images.append((truth.name, overlays.jpeg_data_uri(overlay)))
        return EvaluationSummary(
            merit=f"{result.map_50:.3f} mAP@.5, {result.map:.3f} mAP",
            lead=f"{scope}; Pascal VOC's mAP is {result.voc_map:.3f}.",
            columns=COLUMNS,
            images=images,
            curve=overlays.precision_recall_svg(metrics),
            caption=f"Boxes of score {MIN_SCORE:g} or more in their class's colour, true boxes thin and white; "
            "the first images.",
        )


def choose_anchors(images: Sequence[AnnotatedImage], size: int, longest: int, form: str) -> tuple[int, ...]:
    """Anchor side lengths in pixels of the resized image, from quantiles of the square roots of the training boxes' areas.

    "fpn": five lengths, each twice the one before; one is the median, and the first is at most the 5 % quantile. "c4": the
    10 %, 50 % and 90 % quantiles (the paper's 128, 256 and 512, at a shorter side of 600, suit VOC's objects).
    """
    sides = []
    for image in images:
        height, width = image.size if image.size != (0, 0) else tuple(image.read_pixels().shape[:2])
        scale = min(size / min(height, width), longest / max(height, width))
        boxes = image.boxes[~image.ignored]
        extents = boxes[:, 2:] - boxes[:, :2]
        sides.append(extents.double().prod(1).sqrt() * scale)
    lengths = torch.cat(sides)
    if not len(lengths):
        raise DataError("no training image has a box; there is nothing to train on.")
    low, tenth, median, high = (float(lengths.quantile(q)) for q in (0.05, 0.1, 0.5, 0.9))
    if form == "c4":
        return tuple(sorted({max(8, round(side)) for side in (tenth, median, high)}))
    finest = max(8.0, median / 2 ** math.ceil(math.log2(max(1.0, median / max(low, 1.0)))))
    return tuple(round(finest * 2**i) for i in range(5))
