"""Which pictures make step t: a function of (seed, step) alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from residuum.data.augment import Augmentation
from residuum.data.dataset import Split
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
class Loader:
    """Training batches of a split that is held in memory."""

    split: Split
    preprocessing: Preprocessing
    augmentation: Augmentation
    size: int  # pictures in a batch
    seed: int
    engine: Engine

    def batch(self, step: int) -> Batch:
        """The batch of step `step`, augmented and normalised, on the engine's device."""
        where = order(self.seed, len(self.split), self.size, step)
        pixels = to_device(self.split.images.index_select(0, where), self.engine)
        pictures = self.augmentation(pixels, self.preprocessing, self.seed, step)
        return Batch(pictures, to_device(self.split.labels[where], self.engine))
