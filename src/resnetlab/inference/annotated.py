"""Evaluation and predictions of detectors and segmenters, from their model files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnetlab.data import box_dataset, mask_dataset
from resnetlab.data.annotated_dataset import AnnotatedDataset, AnnotatedItem
from resnetlab.data.decode import decode
from resnetlab.device import DeviceConfig, select_device
from resnetlab.errors import DataError, UsageError, unknown_name_error
from resnetlab.evaluation import overlays
from resnetlab.evaluation.detection import (
    Detections,
    compute_detection_metrics,
    predict_boxes,
    predict_image_boxes,
    require_coco_eval,
)
from resnetlab.evaluation.segmentation import compute_segmentation_metrics, segment_image
from resnetlab.models.annotated_model import AnnotatedModel, load_annotated
from resnetlab.models.head_spec import DetectionOptions, DetectorSpec, SegmenterSpec

P = TypeVar("P", bound=AnnotatedItem)


def open_annotated_model(path: Path, task: str, precision: str, device: str) -> tuple[AnnotatedModel, DeviceConfig]:
    """Loads a model file of a task onto the device; raises ModelFileError, UsageError."""
    model = load_annotated(path, task)
    device_config = select_device(precision, device)
    model.net = device_config.place(model.net)
    return model, device_config


def select_split(data: AnnotatedDataset[P], split: str) -> tuple[str, Sequence[P]]:
    """A split by its name, "test" for the one to evaluate on: (its own name, images). Raises UsageError."""
    splits = data.splits | {"test": data.test}
    if split not in splits:
        raise unknown_name_error("split", split, splits)
    return data.evaluated_split if split == "test" else split, splits[split]


def evaluate_detector(
    path: Path,
    data: Path,
    *,
    split: str = "test",
    testing: DetectionOptions | None = None,
    on_bad: str = "stop",
    precision: str = "auto",
    device: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates a detector on a split of boxes; classes are matched by name. Returns what `detect evaluate --json` prints.

    Args:
        split: "test" is the split to evaluate on, whatever its name is.
        testing: the paper's additions; None for none.

    Raises:
        ModelFileError, DataError, UsageError: see resnetlab.errors.
    """
    testing = testing or DetectionOptions()
    require_coco_eval()
    model, device_config = open_annotated_model(path, "detect", precision, device)
    dataset = box_dataset.load_boxes(data, on_bad)
    indices = torch.tensor(_match_classes(dataset.classes, model.classes, data, path))
    name, images = select_split(dataset, split)
    truth = [box_dataset.relabel_boxes(image, indices) for image in images]
    truth, detections = predict_boxes(model.net, truth, device_config, testing, dataset.errors, on_progress)
    options = {
        "model": str(path),
        "data": str(data),
        "split": name,
        "scales": list(testing.sides),
        "refine": testing.refine,
        "context": cast(DetectorSpec, model.head_spec).context,
    }
    metrics = compute_detection_metrics(truth, detections, model.classes).to_json()
    return options | metrics | _skipped_to_json(dataset)


def evaluate_segmenter(
    path: Path,
    data: Path,
    *,
    split: str = "test",
    on_bad: str = "stop",
    precision: str = "auto",
    device: str = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates a segmenter on a split of masks. Returns what `segment evaluate --json` prints.

    Raises:
        ModelFileError, DataError, UsageError: see resnetlab.errors.
    """
    model, device_config = open_annotated_model(path, "segment", precision, device)
    dataset = mask_dataset.load_masks(data, on_bad)
    if dataset.classes != model.classes:
        raise DataError(
            f"{data} has the classes {', '.join(dataset.classes)}, {path} has {', '.join(model.classes)}; "
            "give the same names, in the same order, to both."
        )
    name, images = select_split(dataset, split)
    spec = cast(SegmenterSpec, model.head_spec)
    metrics = compute_segmentation_metrics(
        model.net, images, model.classes, spec, device_config, dataset.errors, on_progress
    )
    options = {"model": str(path), "data": str(data), "split": name}
    return options | metrics.to_json() | _skipped_to_json(dataset)


def _skipped_to_json(data: AnnotatedDataset[Any]) -> dict[str, Any]:
    return {"skipped": data.errors.skipped} if data.errors.skipped else {}


def _match_classes(theirs: Sequence[str], ours: Sequence[str], data: Path, path: Path) -> list[int]:
    """The indices of the data's classes among the model's; raises DataError for a class that it does not have."""
    if unknown := [name for name in theirs if name not in ours]:
        raise DataError(f"{data} has the class {unknown[0]}, {path} has only {', '.join(ours)}.")
    return [list(ours).index(name) for name in theirs]


@dataclass(frozen=True)
class AnnotatedPrediction:
    """The prediction for one image, or why there is none.

    Attributes:
        overlay: the image with the prediction drawn on it.
    """

    name: str
    result: dict[str, Any] = field(default_factory=dict)
    overlay: Image.Image | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return {"image": self.name} | ({"error": self.error} if self.error else self.result)


def predict_detections(
    model: AnnotatedModel,
    device_config: DeviceConfig,
    files: Sequence[Path],
    testing: DetectionOptions,
    min_score: float,
) -> Iterator[AnnotatedPrediction]:
    """The boxes of each image with a score of at least `min_score`; an unreadable image gives its error."""
    if not 0 <= min_score <= 1:
        raise UsageError(f"--score must be from 0 to 1, not {min_score}.")
    for file in files:
        try:
            pixels = image_to_pixels(decode(file))
        except DataError as error:
            yield AnnotatedPrediction(str(file), error=str(error))
            continue
        detections = predict_image_boxes(model.net, pixels, device_config, testing).at_least(min_score)
        overlay = overlays.draw_boxes(pixels, detections, model.classes)
        yield AnnotatedPrediction(str(file), {"boxes": boxes_to_json(detections, model.classes)}, overlay)


def predict_segmentations(
    model: AnnotatedModel, device_config: DeviceConfig, files: Sequence[Path]
) -> Iterator[AnnotatedPrediction]:
    """The fraction of each class on each image, and the image tinted by class; an unreadable image gives its error."""
    for file in files:
        try:
            pixels = image_to_pixels(decode(file))
        except DataError as error:
            yield AnnotatedPrediction(str(file), error=str(error))
            continue
        mask = segment_image(model.net, pixels, cast(SegmenterSpec, model.head_spec), device_config)
        shares = class_shares(mask, model.classes)
        yield AnnotatedPrediction(str(file), {"classes": shares}, overlays.draw_mask(pixels, mask))


def boxes_to_json(detections: Detections, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Each box as class, score and [x1, y1, x2, y2] in pixels."""
    rows = zip(detections.boxes.tolist(), detections.scores.tolist(), detections.labels.tolist(), strict=True)
    return [
        {"class": classes[label], "score": round(score, 4), "box": [round(v, 1) for v in box]}
        for box, score, label in rows
    ]


def class_shares(mask: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The fraction of each class in a mask, int64 (H, W)."""
    counts = torch.bincount(mask.flatten(), minlength=len(classes)).tolist()
    return [{"class": c, "share": round(n / mask.numel(), 6)} for c, n in zip(classes, counts, strict=True)]


def image_to_pixels(image: Image.Image) -> Tensor:
    """A PIL image of any mode as uint8 (H, W, 3)."""
    return torch.from_numpy(np.array(image.convert("RGB")))
