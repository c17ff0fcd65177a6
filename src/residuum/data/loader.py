"""Which pictures make step t, and how each is shown: functions of (seed, step, position) alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from residuum.data.augment import Augmentation
from residuum.data.crops import DRAWS, Crop
from residuum.data.dataset import Pictures, Split
from residuum.data.reading import Gathered, accept, gather, in_order, view
from residuum.data.stored import Stored
from residuum.errors import DataError
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine, generator, to_device


class Batch(NamedTuple):
    """Input of one step: pictures float32 (B, C, h, w) in channels-last memory, labels int64 (B,)."""

    pictures: Tensor
    labels: Tensor


def order(seed: int, n: int, batch: int, step: int) -> Tensor:
    """Positions of the `batch` pictures of step `step`; int64 (batch,).

    Epochs are permutations laid end to end: every picture once, then every picture again in another order. A batch may span
    two of them, so none is short.
    """
    parts = []
    position, end = step * batch, (step + 1) * batch
    while position < end:
        epoch, start = divmod(position, n)
        stop = min(n, start + end - position)
        parts.append(_permutation(seed, n, epoch)[start:stop])
        position += stop - start
    return torch.cat(parts)


@lru_cache(maxsize=2)  # a batch spans two epochs at most unless it is larger than the data set
def _permutation(seed: int, n: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


@dataclass(frozen=True, eq=False)
class Steps:
    """The pixels of a step, decoded and cropped one by one; a value, so that workers can have it."""

    split: Pictures
    preprocessing: Preprocessing
    crop: Crop
    size: int
    seed: int

    def __call__(self, step: int) -> Gathered:
        where = order(self.seed, len(self.split), self.size, step).tolist()
        draws = torch.rand(self.size, DRAWS, generator=generator(self.seed, "crop", step), dtype=torch.float64).tolist()

        def make(position: int, pixels: Tensor) -> Tensor:
            if self.crop.kind == "centre":
                return view(self.preprocessing, pixels)
            return self.crop(pixels, self.preprocessing.size[0], draws[position])

        return gather(self.split, where, make)


@dataclass(eq=False)
class Loader:
    """Training batches of a split."""

    split: Pictures
    preprocessing: Preprocessing
    augmentation: Augmentation
    size: int  # pictures in a batch
    seed: int
    engine: Engine
    crop: Crop = field(default_factory=Crop)
    _ahead: Iterator[Gathered] | None = field(default=None, init=False)
    _next: int = field(default=-1, init=False)  # the step that `_ahead` gives next

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, augmented and normalised, on the engine's device.

        It is shorter by the pictures that could not be read, where these are to be skipped.
        """
        where = order(self.seed, len(self.split), self.size, step)
        if isinstance(self.split, Split) and self.crop.kind == "centre":
            return self._finished(self.split.images.index_select(0, where), self.split.labels[where], step, None)
        gathered = accept(self.split, self._gathered(step))
        if not len(gathered.kept):
            raise DataError(
                f"none of the {self.size:,} pictures of step {step:,} can be read; mend them: residuum data check."
            )
        labels = self.split.labels[where[gathered.kept]]
        return self._finished(gathered.pixels, labels, step, gathered.kept)

    def _finished(self, pixels: Tensor, labels: Tensor, step: int, kept: Tensor | None) -> Batch:
        positions = None if kept is None or len(kept) == self.size else (kept, self.size)
        pictures = self.augmentation(to_device(pixels, self.engine), self.preprocessing, self.seed, step, positions)
        return Batch(pictures, to_device(labels, self.engine))

    def _gathered(self, step: int) -> Gathered:
        """From the workers, who go on from the step before; a step out of turn starts them anew."""
        if self._ahead is None or step != self._next:
            job = Steps(self.split, self.preprocessing, self.crop, self.size, self.seed)
            workers = self.split.reading.workers if isinstance(self.split, Stored) else 0
            self.close()
            self._ahead = in_order(job, count(step), workers, pin=self.engine.device.type == "cuda")
        self._next = step + 1
        return next(self._ahead)

    def close(self) -> None:
        """Ends the workers, if any."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()  # type: ignore[attr-defined]  # a generator
