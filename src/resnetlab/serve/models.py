"""The models that a service can serve, one class per task: each prepares images, predicts and formats its predictions.

classify   the classes with the highest scores, and their explanation
detect     boxes in pixels of the uploaded image
segment    the share of each class, and the class of each pixel as a PNG
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from base64 import b64encode
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnetlab.errors import UsageError
from resnetlab.evaluation.detection import Detections
from resnetlab.evaluation.overlays import COLOURS
from resnetlab.inference.annotated import (
    AnnotatedPredictor,
    Detector,
    Segmenter,
    boxes_to_json,
    class_shares,
    read_pixels,
)
from resnetlab.inference.backends import BACKENDS
from resnetlab.inference.explain import explain
from resnetlab.inference.open_model import open_model
from resnetlab.inference.predict import Model
from resnetlab.models.annotated_model import AnnotatedModel
from resnetlab.models.cost import count_parameters
from resnetlab.models.spec import Specification
from resnetlab.preprocessing import RGB, PixelFormat, tensor_to_pil

MASK_OPACITY = 130  # of 255


class ServedModel(ABC):
    """What the service needs of a model: `prepare` each image, `predict` batches of them, `format` each result as JSON.

    Attributes:
        warmup_batches: batch sizes whose first prediction is slow.
        no_explanation: why the model cannot be explained; None where it can.
        pixel_format: how uploaded images are read: as Pillow images of 8 bits, or the values as stored.
    """

    model: Model | AnnotatedModel
    warmup_batches: Sequence[int]
    no_explanation: str | None
    pixel_format: PixelFormat

    @property
    def batches_at_once(self) -> int:
        """How many batches are predicted at the same time, each in a thread."""
        return 1

    @abstractmethod
    def prepare(self, image: Any) -> Any:
        """Prepares an upright image, a Pillow image or float32 (H, W, C) as `pixel_format` says; called in many threads."""

    @abstractmethod
    def predict(self, images: Sequence[Any]) -> Sequence[Any]:
        """The network's result for each prepared image; called in `batches_at_once` threads."""

    @abstractmethod
    def format(self, image: Any, result: Any, top: int | None, min_score: float | None) -> dict[str, Any]:
        """The result as JSON; keys as in docs/json.md.

        Args:
            top: number of classes or boxes, best first; None for the task's default.
            min_score: least score, or share of the pixels; None for the task's default.
        """

    def explain(self, image: Any, top: int | None, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        """The explanation as JSON; only called where `no_explanation` is None."""
        raise NotImplementedError(self.no_explanation)

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The description of the model for GET /model."""


def load_served_model(
    name: str, backend: str, precision: str, device: str, images: Sequence[Path] = ()
) -> tuple[ServedModel, str]:
    """Loads a model of any task, from a file or by a publisher's name; also returns one line about its backend.

    Args:
        backend: a backend's name or "auto", as in `inference.backends.select_backend`, for classifiers; other tasks use torch.
        precision: likewise; other tasks use fp32 by default, since bf16 rounds boxes to whole pixels.
        images: a classifier's backend is checked against torch on every second one; int8 is calibrated on the others.

    Raises:
        ModelFileError, UsageError
    """
    model = open_model(name, backend=backend, precision=precision, device=device)
    if isinstance(model, Model):
        return ServedClassifier(model), model.select_backend(backend, precision, images[::2], images[1::2])
    if images:
        raise UsageError("--images is for classifiers; leave it out.")
    served = ServedDetector(model) if isinstance(model, Detector) else ServedSegmenter(model)
    return served, f"torch on {served.backend}"


class ServedClassifier(ServedModel):
    """A classifier.

    Args:
        scores: (B, h, w, C) -> float32 (B, classes); the model's own by default.
    """

    model: Model
    no_explanation = None
    warmup_batches = (1, 16)

    def __init__(self, model: Model, scores: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self._scores = model, scores or model.predict_scores
        self.pixel_format = model.preprocessing.pixel_format

    @property
    def batches_at_once(self) -> int:
        return BACKENDS[self.model.backend.name][0].batches_at_once

    def prepare(self, image: Any) -> Tensor:
        return self.model.preprocessing(image)

    def predict(self, images: Sequence[Tensor]) -> list[Tensor]:
        return list(self._scores(torch.stack(list(images))))

    def format(self, image: Tensor, result: Tensor, top: int | None, min_score: float | None) -> dict[str, Any]:
        found = self.model.make_prediction("", result, top or self.model.default_top).to_json()
        rows = [row for row in found.pop("top") if row["score"] >= (min_score or 0)]
        del found["image"]
        return {"top": rows} | found

    def explain(self, image: Tensor, top: int | None, on_progress: Callable[[int, int], None]) -> dict[str, Any]:
        explanation = explain(self.model, image, top=top or 5, progress=on_progress)
        return {**explanation.to_json(), "heat": _data_uri(explanation.overlay)}

    def describe(self) -> dict[str, Any]:
        model = self.model
        return _describe_model("classify", model, model.spec) | {
            "temperature": model.temperature,
            "calibrated": bool(model.calibration) and not model.multi_label,  # whose thresholds are what was fitted
            "none_below": model.none_below or None,
            "preprocessing": model.preprocessing.to_json(),
            "backend": model.backend_name,
        }


class UploadedImage(NamedTuple):
    """An image for a detector or segmenter, uint8 (h, w, 3), and (width, height) of the one that was uploaded."""

    pixels: Tensor
    size: tuple[int, int]


class _ServedAnnotatedModel(ServedModel):
    """Code shared by detectors and segmenters."""

    model: AnnotatedModel
    warmup_batches = (1,)  # a batch is computed image by image
    pixel_format = RGB

    def __init__(self, predictor: AnnotatedPredictor) -> None:
        self._predictor: Any = predictor  # a Detector or a Segmenter, as the subclass says
        self.model, self.backend = predictor.model, str(predictor.device_config)
        self.no_explanation = predictor.no_explanation

    def prepare(self, image: Image.Image | Tensor) -> UploadedImage:
        """Reduces images more than twice as large as the network's input, to save memory."""
        image = tensor_to_pil(image) if isinstance(image, Tensor) else image
        size, limit = image.size, 2 * self.model.head_spec.longest
        rgb = image.convert("RGB")
        rgb.thumbnail((limit, limit), Image.Resampling.BILINEAR)
        return UploadedImage(read_pixels(rgb), size)

    def describe(self) -> dict[str, Any]:
        classes = range(len(self.model.classes))
        return _describe_model(self.model.task, self.model, self.model.spec) | {
            "head": self.model.head_spec.to_json(),
            "colours": [self._colour(i) for i in classes],
            "backend": self.backend,
        }

    def _colour(self, label: int) -> str:
        return COLOURS[label % len(COLOURS)]


class ServedDetector(_ServedAnnotatedModel):
    """A detector."""

    _predictor: Detector

    def predict(self, images: Sequence[UploadedImage]) -> list[Detections]:
        """Boxes in pixels of the uploaded images."""
        results = []
        for pixels, (width, height) in images:
            found, (h, w) = self._predictor.detect(pixels), pixels.shape[:2]
            results.append(found._replace(boxes=found.boxes * torch.tensor([width / w, height / h] * 2)))
        return results

    def format(
        self, image: UploadedImage, result: Detections, top: int | None, min_score: float | None
    ) -> dict[str, Any]:
        detections = result.at_least(self._predictor.min_score if min_score is None else min_score)
        return _size_to_json(image) | {"boxes": boxes_to_json(detections, self.model.classes)[:top]}


class ServedSegmenter(_ServedAnnotatedModel):
    """A segmenter."""

    _predictor: Segmenter

    def predict(self, images: Sequence[UploadedImage]) -> list[tuple[list[dict[str, Any]], str]]:
        """The share of each class, largest first, and the mask as a data URI."""
        masks = (self._predictor.segment(image.pixels) for image in images)
        return [
            (sorted(class_shares(mask, self.model.classes), key=lambda row: -row["share"]), self._draw_mask(mask))
            for mask in masks
        ]

    def format(self, image: UploadedImage, result: Any, top: int | None, min_score: float | None) -> dict[str, Any]:
        shares, mask = result
        listed = [row for row in shares if row["share"] >= (min_score or 0)]
        return _size_to_json(image) | {"classes": listed[:top], "mask": mask}

    def _draw_mask(self, mask: Tensor) -> str:
        """The mask as a palette PNG whose pixel values are classes; the background is transparent."""
        png = Image.fromarray(mask.numpy().astype(np.uint8))
        png.putpalette([int(self._colour(i)[k : k + 2], 16) for i in range(256) for k in (1, 3, 5)])
        return _data_uri(png, transparency=bytes([0] + 255 * [MASK_OPACITY]))

    def _colour(self, label: int) -> str:
        """As in `evaluation.overlays.draw_mask`: the first colour belongs to the first class after the background."""
        return super()._colour(label - 1)


def _describe_model(task: str, model: Model | AnnotatedModel, spec: Specification) -> dict[str, Any]:
    net = f"{spec.block} blocks {'-'.join(map(str, spec.depths))}, {spec.activation_order}, shortcut {spec.shortcut}"
    return {
        "task": task,
        "net": net,
        "classes": list(model.classes),
        "parameters": count_parameters(model.net),
        "metrics": dict(model.metrics),
        "data": dict(model.data),
        "versions": dict(model.versions),
    }


def _size_to_json(image: UploadedImage) -> dict[str, int]:
    return {"width": image.size[0], "height": image.size[1]}


def _data_uri(image: Image.Image, **options: Any) -> str:
    png = io.BytesIO()
    image.save(png, "PNG", **options)
    return f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"
