"""Detectors and segmenters ready for use: predictions for images, and evaluation on data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from resnetlab.data import box_dataset, mask_dataset
from resnetlab.data.annotated_dataset import AnnotatedDataset
from resnetlab.data.annotations import AnnotatedItem
from resnetlab.device import DeviceConfig, select_device, standard_torch_state
from resnetlab.errors import AnsweredAttributes, DataError, UsageError, public, unknown_name_error
from resnetlab.evaluation import overlays
from resnetlab.evaluation.detection import (
    Detections,
    compute_detection_metrics,
    predict_boxes,
    predict_image_boxes,
    require_coco_eval,
)
from resnetlab.evaluation.segmentation import compute_segmentation_metrics, segment_image
from resnetlab.formatting import format_count, format_list
from resnetlab.graph_capture import GraphedFunction
from resnetlab.inference.images import ImageInput, NamedImage, expand_images, get_name, is_many, read_image
from resnetlab.models.annotated_model import AnnotatedModel, load_annotated
from resnetlab.models.head_spec import DetectionOptions, DetectorSpec, SegmenterSpec
from resnetlab.peer_words import ANNOTATED_ATTRIBUTES, ANNOTATED_PREDICTION_ATTRIBUTES

P = TypeVar("P", bound=AnnotatedItem)
MAX_GRAPHS = 4  # sizes of images that a GPU has a CUDA graph for
ProgressFn = Callable[[int, int], None]


@dataclass(frozen=True)
class AnnotatedPrediction(AnsweredAttributes):
    """The prediction for one image, or why there is none.

    Attributes:
        overlay: the image with the prediction drawn on it.
    """

    name: str
    result: dict[str, Any] = field(default_factory=dict)
    overlay: Image.Image | None = None
    error: str | None = None
    attribute_answers = ANNOTATED_PREDICTION_ATTRIBUTES

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return {"image": self.name} | ({"error": self.error} if self.error else self.result)

    to_dict = to_json


@dataclass(frozen=True, eq=False, repr=False)
class AnnotatedPredictor(AnsweredAttributes, ABC):
    """A detector or segmenter on its device."""

    path: Path
    model: AnnotatedModel
    device_config: DeviceConfig

    no_explanation: ClassVar[str]
    overlay_suffix: ClassVar[str]
    attribute_answers = ANNOTATED_ATTRIBUTES

    def predict(self, image: Any) -> Any:
        """The prediction for an image, or a list of them for several; see `inference.predict.Model`.

        Raises DataError if the one image cannot be read, UsageError if it is of another type.
        """
        if is_many(image):
            return list(self.predictions(expand_images(image)))
        return next(self.predictions([(get_name(image), read_image(image))]))

    __call__ = predict

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.model.classes

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.device_config.device

    def save(self, path: str | Path) -> None:
        """Writes the model file."""
        self.model.save(Path(path))

    def __repr__(self) -> str:
        name = type(self).__name__
        return (
            f"{name}({self.path}, {format_count(len(self.classes), 'class')}: "
            f"{format_list(self.classes, 3)}, {self.device})"
        )

    def predictions(self, images: Iterable[NamedImage]) -> Iterator[AnnotatedPrediction]:
        """Predicts named images in order; an unreadable image, or an error in place of one, gives its error."""
        for name, image in images:
            try:
                pixels = read_pixels(image)
            except (DataError, UsageError) as error:
                yield AnnotatedPrediction(name, error=str(error))
            else:
                yield AnnotatedPrediction(name, *self.predict_pixels(pixels))

    @abstractmethod
    def predict_pixels(self, pixels: Tensor) -> tuple[dict[str, Any], Image.Image]:
        """The prediction for an image, uint8 (H, W, 3), as JSON and drawn on the image."""

    @public
    @standard_torch_state()
    def evaluate(
        self,
        data: str | Path,
        *,
        split: str = "test",
        on_bad: str = "stop",
        on_progress: ProgressFn = lambda done, total: None,
    ) -> dict[str, Any]:
        """Evaluates on a split of a data folder; returns what `evaluate --json` prints.

        Args:
            split: "test" is the split to evaluate on, whatever its name is.

        Raises:
            DataError, UsageError: see resnetlab.errors.
        """
        name, metrics, skipped = self._compute_metrics(Path(data), split, on_bad, on_progress)
        document = {"model": str(self.path), "data": str(data), "split": name} | metrics
        return document | ({"skipped": skipped} if skipped else {})

    @abstractmethod
    def _compute_metrics(
        self, data: Path, split: str, on_bad: str, on_progress: ProgressFn
    ) -> tuple[str, dict[str, Any], dict[str, str]]:
        """The split's own name, the metrics as JSON, and what was skipped."""


@dataclass(frozen=True, eq=False, repr=False)
class Detector(AnnotatedPredictor):
    """A detector, or an ensemble of them.

    Attributes:
        options: the paper's test-time additions.
        min_score: score that a predicted box has at least.
        others: the further members of an ensemble, with the classes of the first in its order.
    """

    no_explanation = "a detector's boxes cannot be explained; only a classifier's prediction can."
    overlay_suffix = "boxes"

    options: DetectionOptions = field(default_factory=DetectionOptions)
    min_score: float = 0.5
    others: tuple[Detector, ...] = ()

    @property
    def nets(self) -> list[nn.Module]:
        """The networks of all members."""
        return [self.model.net, *(other.model.net for other in self.others)]

    def join(self, others: Sequence[Detector]) -> Detector:
        """An ensemble (2015, appendix B); classes are matched by name, in the others' networks too.

        Raises DataError where they are not the same.
        """
        from resnetlab.models.detection import reorder_classes

        for other in others:
            if set(other.classes) != set(self.classes):
                raise DataError(
                    f"{other.path} has the classes {', '.join(other.classes)}, {self.path} has {', '.join(self.classes)}; "
                    "detectors are evaluated together only with the same classes."
                )
            reorder_classes(other.model.net, [other.classes.index(name) for name in self.classes])
            other.model.classes = self.classes
        return replace(self, others=tuple(others))

    @standard_torch_state()
    def detect(self, pixels: Tensor) -> Detections:
        """The boxes of every score in an image, uint8 (H, W, 3)."""
        return predict_image_boxes(self.nets, pixels, self.device_config, self.options)

    def predict_pixels(self, pixels: Tensor) -> tuple[dict[str, Any], Image.Image]:
        detections, classes = self.detect(pixels).at_least(self.min_score), self.model.classes
        return {"boxes": boxes_to_json(detections, classes)}, overlays.draw_boxes(pixels, detections, classes)

    def _compute_metrics(
        self, data: Path, split: str, on_bad: str, on_progress: ProgressFn
    ) -> tuple[str, dict[str, Any], dict[str, str]]:
        require_coco_eval()
        dataset = box_dataset.load_boxes(data, on_bad)
        indices = torch.tensor(_match_classes(dataset.classes, self.model.classes, data, self.path))
        name, images = select_split(dataset, split)
        truth = [replace(image, labels=indices[image.labels]) for image in images]
        truth, detections = predict_boxes(
            self.nets, truth, self.device_config, self.options, dataset.errors, on_progress
        )
        additions = {
            "scales": list(self.options.sides),
            "refine": self.options.refine,
            "context": all(cast(DetectorSpec, each.model.head_spec).context for each in (self, *self.others)),
        }
        if self.others:
            additions["models"] = [str(each.path) for each in (self, *self.others)]
        metrics = compute_detection_metrics(truth, detections, self.model.classes)
        return name, {"layout": dataset.layout} | additions | metrics.to_json(), dataset.errors.skipped


@dataclass(frozen=True, eq=False, repr=False)
class Segmenter(AnnotatedPredictor):
    """A segmenter."""

    no_explanation = "a segmenter's masks cannot be explained; only a classifier's prediction can."
    overlay_suffix = "mask"

    @property
    def spec(self) -> SegmenterSpec:
        """The specification of the head."""
        return cast(SegmenterSpec, self.model.head_spec)

    @standard_torch_state()
    def segment(self, pixels: Tensor) -> Tensor:
        """The class of every pixel of an image, uint8 (H, W, 3) -> int64 (H, W)."""
        return segment_image(self.model.net, pixels, self.spec, self.device_config)

    def predict_pixels(self, pixels: Tensor) -> tuple[dict[str, Any], Image.Image]:
        mask = self.segment(pixels)
        return {"classes": class_shares(mask, self.model.classes)}, overlays.draw_mask(pixels, mask)

    def _compute_metrics(
        self, data: Path, split: str, on_bad: str, on_progress: ProgressFn
    ) -> tuple[str, dict[str, Any], dict[str, str]]:
        class_255 = str(self.model.recipe.get("class_255", ""))
        dataset, classes = mask_dataset.load_masks(data, on_bad, class_255), self.model.classes
        if dataset.classes != classes:
            raise DataError(
                f"{data} has the classes {', '.join(dataset.classes)}, {self.path} has {', '.join(classes)}; "
                "give the same names, in the same order, to both."
            )
        name, images = select_split(dataset, split)
        metrics = compute_segmentation_metrics(
            self.segment, images, classes, dataset.errors, self.device_config, on_progress
        )
        return name, {"layout": dataset.layout} | metrics.to_json(), dataset.errors.skipped


PREDICTORS: dict[str, type[Detector | Segmenter]] = {"detect": Detector, "segment": Segmenter}


@standard_torch_state()
def open_annotated_model(path: Path, task: str, precision: str, device: str) -> Detector | Segmenter:
    """Loads a model file of a task onto the device; raises ModelFileError, UsageError."""
    model = load_annotated(path, task)
    device_config = select_device(precision, device)
    model.net = device_config.place(model.net)
    if device_config.device.type == "cuda":  # what comes after a detector's backbone has sizes that depend on values
        backbone: Any = model.net.backbone
        backbone.forward = GraphedFunction(backbone.forward, MAX_GRAPHS)
    return PREDICTORS[task](path, model, device_config)


def select_split(data: AnnotatedDataset[P], split: str) -> tuple[str, Sequence[P]]:
    """A split by its name, "test" for the one to evaluate on: (its own name, images). Raises UsageError."""
    splits = data.splits | {"test": data.test}
    if split not in splits:
        raise unknown_name_error("split", split, splits)
    return data.evaluated_split if split == "test" else split, splits[split]


def _match_classes(names: Sequence[str], known: Sequence[str], data: Path, path: Path) -> list[int]:
    """The indices of the data's classes among the model's; raises DataError for a class that it does not have."""
    if unknown := [name for name in names if name not in known]:
        raise DataError(f"{data} has the class {unknown[0]}, {path} has only {', '.join(known)}.")
    return [list(known).index(name) for name in names]


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


def read_pixels(image: ImageInput | DataError) -> Tensor:
    """An image as uint8 (H, W, 3). Raises DataError if it is unreadable, or is such an error itself."""
    return torch.from_numpy(np.array(read_image(image).convert("RGB")))
