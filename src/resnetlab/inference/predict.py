"""A loaded model: predicts the top classes of images."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from resnetlab.data.decode import convert_image, decode
from resnetlab.device import DeviceConfig, select_device, standard_torch_state
from resnetlab.errors import DataError, UsageError
from resnetlab.inference.backends import BackendRequest, LoadedBackend, load_network, select_backend
from resnetlab.inference.download import load_or_download
from resnetlab.models.model_file import TrainedModel

ImageInput = str | Path | bytes | Image.Image
BATCH = 64  # images per batch
PREFETCH = 2 * BATCH  # images that are decoded ahead


@dataclass(frozen=True)
class Prediction:
    """The classes with the highest scores for one image, best first; or why it cannot be read."""

    name: str
    top: tuple[tuple[str, float], ...] = ()  # (class, score); scores are softmax probabilities
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary; keys as in docs/json.md."""
        if self.error is not None:
            return {"image": self.name, "error": self.error}
        return {"image": self.name, "top": [{"class": name, "score": score} for name, score in self.top]}


@dataclass(eq=False)
class Model(TrainedModel):
    """A model ready for prediction: network, classes, preprocessing, and `predict`.

    Attributes:
        device_config: device and precision of the network.
        backend: computes the scores; the network itself until `select_backend` is called.
    """

    device_config: DeviceConfig = field(kw_only=True)
    backend: LoadedBackend = field(init=False)

    def __post_init__(self) -> None:
        self.device_config.place(self.net)
        self.backend = load_network(self, self.device_config)

    @standard_torch_state()
    def select_backend(
        self,
        backend: str,
        precision: str = "auto",
        images: Sequence[ImageInput] = (),
        calibrate: Sequence[ImageInput] = (),
        num_images: int | None = None,
    ) -> str:
        """Selects the backend for all following predictions; returns which one and why. See `backends.select_backend`.

        Args:
            images: backends are compared with torch on these if the model file has no reference images.
            calibrate: int8 is calibrated on these instead of the model file's training images.
            num_images: how many images will be predicted, if known.
        """
        request = BackendRequest(
            backend=backend,
            precision=precision,
            check_images=None if self.reference_images else self._read_images(images),
            calibration_images=self._read_images(calibrate),
            num_images=num_images,
            use_cache=True,
        )
        self.backend = select_backend(self, request, self.device_config.device)
        return str(self.backend)

    @property
    def backend_name(self) -> str:
        """What computes the scores, such as "openvino bf16"."""
        return f"{self.backend.name} {self.backend.precision}"

    def _read_images(self, images: Sequence[ImageInput]) -> Tensor | None:
        """The readable images, uint8 (n, h, w, C); None if there is none."""
        pixels = [x for image in images if isinstance(x := self._prepare_input(image), Tensor)]
        return torch.stack(pixels) if pixels else None

    def predict(self, image: ImageInput, *, top: int = 5) -> Prediction:
        """The `top` best classes of one image.

        Args:
            image: a path, an encoded image's bytes, or a PIL image of any mode and size.

        Raises:
            DataError: the image is missing, damaged or not an image.
            UsageError: it has another type.
        """
        prediction = next(self.predictions([image], top=top))
        if prediction.error is not None:
            raise DataError(prediction.error)
        return prediction

    def predictions(self, images: Iterable[ImageInput], *, top: int = 5) -> Iterator[Prediction]:
        """Predicts images in order, in batches; an unreadable one gives a prediction with its error."""
        return self.named_predictions(((_get_image_name(image), image) for image in images), top=top)

    def named_predictions(
        self, images: Iterable[tuple[str, ImageInput | DataError]], *, top: int = 5
    ) -> Iterator[Prediction]:
        """Like `predictions`, for images with names; an error in place of an image becomes its prediction's error.

        Threads decode ahead while the backend computes. At most PREFETCH + BATCH images are in memory.
        """
        if top < 1:
            raise UsageError(f"top must be 1 or more, not {top}.")
        decoded = self._decode_ahead(images)
        while group := list(islice(decoded, BATCH)):
            pixels = [x for _, x in group if isinstance(x, Tensor)]
            scores = iter(self.predict_scores(torch.stack(pixels)) if pixels else ())
            for name, x in group:
                yield Prediction(name, error=x) if isinstance(x, str) else self._best(name, next(scores), top)

    @standard_torch_state()
    def predict_scores(self, pixels: Tensor) -> Tensor:
        """Softmax scores, float32 (B, classes), of resized and cropped images, uint8 (B, h, w, C)."""
        return self.backend.predict(pixels)

    def _decode_ahead(self, images: Iterable[tuple[str, ImageInput | DataError]]) -> Iterator[tuple[str, Tensor | str]]:
        """Decodes images in threads: (name, uint8 (h, w, C) or an error message) of each, in order."""
        remaining, pending = iter(images), deque[tuple[str, Future[Tensor | str]]]()
        pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        try:
            for name, image in islice(remaining, PREFETCH):
                pending.append((name, pool.submit(self._prepare_input, image)))
            while pending:
                name, future = pending.popleft()
                for next_name, image in islice(remaining, 1):
                    pending.append((next_name, pool.submit(self._prepare_input, image)))
                yield name, future.result()
        finally:  # also if the caller stops early
            pool.shutdown(cancel_futures=True)

    def _prepare_input(self, image: ImageInput | DataError) -> Tensor | str:
        """Decodes and preprocesses an image: uint8 (h, w, C), or the error message."""
        try:
            if isinstance(image, DataError):
                return str(image)
            if isinstance(image, Image.Image):
                return self.preprocessing(convert_image(image))
            if not isinstance(image, ImageInput):
                raise UsageError(
                    f"an image is a path, the bytes of a file, or a Pillow image, not {type(image).__name__}; "
                    "PIL.Image.fromarray makes one of an array."
                )
            return self.preprocessing(decode(Path(image) if isinstance(image, str) else image))
        except DataError as error:
            return str(error)

    def _best(self, name: str, scores: Tensor, top: int) -> Prediction:
        return Prediction(name, top_classes(self.classes, scores, top))


def top_classes(classes: Sequence[str], scores: Tensor, top: int) -> tuple[tuple[str, float], ...]:
    """The `top` classes with the highest scores (classes,), best first."""
    values, indices = scores.topk(min(top, len(classes)))
    return tuple((classes[i], round(v, 6)) for i, v in zip(indices.tolist(), values.tolist(), strict=True))


def _get_image_name(image: ImageInput) -> str:
    return str(image) if isinstance(image, str | Path) else "image"


@standard_torch_state()
def load(path: str | Path, *, precision: str = "fp32", device: str = "auto") -> Model:
    """Loads a model for prediction.

    Args:
        path: a model file, or a published name to download: "torchvision:resnet50.IMAGENET1K_V2", "timm:resnet50.a1_in1k",
            "hf:OWNER/REPOSITORY".
        precision: "fp32", "bf16" or "auto".

    Returns:
        Network, classes and preprocessing, with `predict` (one image), `predictions` (many) and `predict_scores`
        (uint8 (B, h, w, C) -> softmax scores (B, classes)).

    Raises:
        ModelFileError: the file is missing, damaged, foreign, or a folder; or the download fails.
        UsageError: there is no such published model.
    """
    return Model(**vars(load_or_download(path)), device_config=select_device(precision, device))
