"""A few images in the model file, to check other backends on and to calibrate int8 without the data set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resnetlab.preprocessing import Preprocessing

CHECK, LABELS, TRAINING = "reference.check", "reference.labels", "reference.training"  # reserved tensor names
MAX_CHECK, MAX_TRAINING = 16, 64  # images
MAX_BYTES = 2_500_000  # of each kind: 16 images of 224x224


@dataclass(frozen=True, eq=False)
class ReferenceImages:
    """Images after resize and crop, before normalisation.

    Attributes:
        check: uint8 (n, h, w, C) (float32 of values as stored), of the held-out split (or the training split if nothing was
            held out): every backend's scores are compared with the network's on them.
        labels: int64 (n,), their classes.
        training: likewise (m, h, w, C), of the training split, disjoint from `check`: int8 is calibrated on them.
    """

    check: Tensor
    labels: Tensor
    training: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """The tensors of the model file."""
        return {CHECK: self.check, LABELS: self.labels, TRAINING: self.training}

    @staticmethod
    def pop_from(tensors: dict[str, Tensor]) -> ReferenceImages | None:
        """Removes the images from a model file's tensors; None if it has none. Raises KeyError if some are missing."""
        if not {CHECK, LABELS, TRAINING} & tensors.keys():
            return None
        return ReferenceImages(*(tensors.pop(name) for name in (CHECK, LABELS, TRAINING)))

    def validate(self, preprocessing: Preprocessing, classes: int) -> str | None:
        """Returns what makes the images unusable for a network with this input and number of classes, or None."""
        shape = (*preprocessing.size, preprocessing.channels)
        for name, images, limit in ((CHECK, self.check, MAX_CHECK), (TRAINING, self.training, MAX_TRAINING)):
            if (
                images.dtype != preprocessing.pixel_format.tensor_dtype
                or images.ndim != 4
                or images.shape[1:] != shape
                or len(images) > limit
            ):
                return f"{name} is {images.dtype} {tuple(images.shape)}, not at most {limit} images of {shape}"
        labels = self.labels
        if not len(self.check) or labels.dtype != torch.int64 or labels.shape != (len(self.check),):
            return f"{LABELS} has shape {tuple(labels.shape)} for {len(self.check)} images"
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            return f"{LABELS} names a class outside the {classes} classes"
        return None


def spread_positions(n: int, limit: int, image_bytes: int) -> list[int]:
    """Evenly spaced positions among n images: at most `limit`, and at most MAX_BYTES in all."""
    count = min(n, limit, max(1, MAX_BYTES // image_bytes))
    return [i * n // count for i in range(count)]


def exclude_images(images: Tensor, others: Tensor) -> Tensor:
    """The images that are not among the others; both (n, h, w, C)."""
    known = {x.numpy().tobytes() for x in others}
    remaining = [i for i, x in enumerate(images) if x.numpy().tobytes() not in known]
    return images[torch.tensor(remaining, dtype=torch.long)]
