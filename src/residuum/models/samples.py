"""A few pictures that travel with a model, so that other engines can be held to it where its data are not at hand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from residuum.preprocessing import Preprocessing

CHECK, LABELS, TRAINING = "samples.check", "samples.labels", "samples.training"  # reserved names of tensors
MOST_CHECK, MOST_TRAINING = 16, 64  # pictures
MOST_BYTES = 2_500_000  # of either kind: 16 pictures of 224x224


@dataclass(frozen=True, eq=False)
class Samples:
    """Pictures already resized and cropped, as the network gets them before normalisation.

    Attributes:
        check: uint8 (n, h, w, C), of the held-out split (of the training split where nothing was held out): every engine is
            held to what the network says of them.
        labels: int64 (n,), their classes.
        training: uint8 (m, h, w, C), of the training split, none of them in `check`: int8 is calibrated on them.
    """

    check: Tensor
    labels: Tensor
    training: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """As they stand in the model file."""
        return {CHECK: self.check, LABELS: self.labels, TRAINING: self.training}

    @staticmethod
    def taken_from(tensors: dict[str, Tensor]) -> Samples | None:
        """Takes the samples out of a model file's tensors; None where it has none. KeyError where some are missing."""
        if not {CHECK, LABELS, TRAINING} & tensors.keys():
            return None
        return Samples(*(tensors.pop(name) for name in (CHECK, LABELS, TRAINING)))

    def fault(self, preprocessing: Preprocessing, classes: int) -> str | None:
        """What makes them useless for a network of that input and so many classes, or None."""
        shape = (*preprocessing.size, preprocessing.channels)
        for name, pictures, most in ((CHECK, self.check, MOST_CHECK), (TRAINING, self.training, MOST_TRAINING)):
            if (
                pictures.dtype != torch.uint8
                or pictures.ndim != 4
                or pictures.shape[1:] != shape
                or len(pictures) > most
            ):
                return f"{name} is {pictures.dtype} {tuple(pictures.shape)}, not at most {most} pictures of {shape}"
        labels = self.labels
        if not len(self.check) or labels.dtype != torch.int64 or labels.shape != (len(self.check),):
            return f"{LABELS} has shape {tuple(labels.shape)} for {len(self.check)} pictures"
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            return f"{LABELS} names a class outside the {classes} that there are"
        return None


def spread(n: int, most: int, picture_bytes: int) -> list[int]:
    """Positions of the pictures to keep out of n: evenly spread, at most `most` and MOST_BYTES."""
    count = min(n, most, max(1, MOST_BYTES // picture_bytes))
    return [i * n // count for i in range(count)]


def apart(pictures: Tensor, others: Tensor) -> Tensor:
    """Those of the pictures that are none of the others; both uint8 (n, h, w, C)."""
    known = {x.numpy().tobytes() for x in others}
    kept = [i for i, x in enumerate(pictures) if x.numpy().tobytes() not in known]
    return pictures[torch.tensor(kept, dtype=torch.long)]
