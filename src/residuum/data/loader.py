"""Which pictures make step t, and how each is shown: functions of (seed, step, position) alone.

A step's batch is the same however many processes share it: each takes a run of its positions (`share`), and treats what stands
there as one process would that has them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from residuum.data import crops, trivial
from residuum.data.augment import Augmentation
from residuum.data.crops import Crop
from residuum.data.dataset import Pictures, Split
from residuum.data.mixing import Mixing
from residuum.data.reading import Gathered, accept, gather, in_order, view
from residuum.data.stored import Stored
from residuum.errors import DataError, UsageError
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine, generator, to_device
from residuum.world import World


class Batch(NamedTuple):
    """Input of one step.

    Attributes:
        pictures: float32 (B, C, h, w) in channels-last memory.
        labels: int64 (B,); where pictures were mixed, the class of which each shows most.
        targets: what the loss compares with: the labels; where pictures were mixed float32 (B, classes), rows adding up to 1.
    """

    pictures: Tensor
    labels: Tensor
    targets: Tensor


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


def share(size: int, world: World) -> range:
    """The positions of a step of `size` pictures that one of the processes takes: a run of whole pairs, as even as can be.

    Pairs (0 and 1, 2 and 3, …) stay together because mixing mixes them. Where shares differ in length, a mean over the step is
    the mean of the shares' means weighted by their lengths. Raises UsageError where there is no pair for each process.
    """
    if size // 2 < world.size:
        raise UsageError(
            f"a batch of {size:,} cannot be shared by {world.size:,} processes; two pictures for each are the least: "
            f"--set batch={2 * world.size}."
        )
    start, end = (2 * (size // 2 * rank // world.size) for rank in (world.rank, world.rank + 1))
    return range(start, size if world.rank == world.size - 1 else end)


@lru_cache(maxsize=2)  # a batch spans two epochs at most unless it is larger than the data set
def _permutation(seed: int, n: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


@dataclass(frozen=True, eq=False)
class Steps:
    """The pixels of a step, decoded, cropped and changed one by one; a value, so that workers can have it."""

    split: Pictures
    preprocessing: Preprocessing
    crop: Crop
    trivial: bool
    size: int
    seed: int
    share: range

    def __call__(self, step: int) -> Gathered:
        where = order(self.seed, len(self.split), self.size, step)[self.share.start : self.share.stop].tolist()
        boxes = self._draws("crop", step, crops.DRAWS)
        changes = self._draws("trivial", step, trivial.DRAWS) if self.trivial else []

        def make(k: int, pixels: Tensor) -> Tensor:
            if self.crop.kind == "centre":
                shown = view(self.preprocessing, pixels)
            else:
                shown = self.crop(pixels, self.preprocessing.size[0], boxes[k])
            return trivial.trivial_augment(shown, changes[k]) if self.trivial else shown

        return gather(self.split, where, make)

    def _draws(self, use: str, step: int, count: int) -> list[list[float]]:
        """`count` numbers in [0, 1) for each position of the share."""
        draws = torch.rand(self.size, count, generator=generator(self.seed, use, step), dtype=torch.float64)
        return draws[self.share.start : self.share.stop].tolist()


@dataclass(eq=False)
class Loader:
    """Training batches of a split.

    Attributes:
        size: pictures in a step, over all processes.
        classes: how many there are; needed where pictures are mixed.
        world: the processes that share a step; `batch` gives this one's share.
    """

    split: Pictures
    preprocessing: Preprocessing
    augmentation: Augmentation
    size: int
    seed: int
    engine: Engine
    crop: Crop = field(default_factory=Crop)
    mixing: Mixing = field(default_factory=Mixing)
    classes: int = 0
    world: World = field(default_factory=World)
    _ahead: Iterator[Gathered] | None = field(default=None, init=False)
    _next: int = field(default=-1, init=False)  # the step that `_ahead` gives next

    def batch(self, step: int) -> Batch:
        """This process's share of step `step`, augmented, normalised and mixed, on the engine's device.

        It is shorter by the pictures that could not be read, where these are to be skipped.
        """
        mine = share(self.size, self.world)
        where = order(self.seed, len(self.split), self.size, step)[mine.start : mine.stop]
        one_by_one = self.augmentation.trivial or self.crop.kind != "centre"
        if self._near is not None and not one_by_one:
            chosen, kept = to_device(where, self.engine), torch.arange(len(where))
            pixels, labels = (x.index_select(0, chosen) for x in self._near)
        else:
            pixels, kept, _ = accept(self.split, self._gathered(step))
            if not len(kept):
                raise DataError(
                    f"none of the {len(where):,} pictures of step {step:,} can be read; mend them: residuum data check."
                )
            pixels, labels = (to_device(x, self.engine) for x in (pixels, self.split.labels[where[kept]]))
        positions = mine.start + kept
        pictures = self.augmentation(
            pixels,
            self.preprocessing,
            self.seed,
            step,
            None if len(kept) == self.size else (positions, self.size),
        )
        if not self.mixing:
            return Batch(pictures, labels, labels)
        pictures, targets = self.mixing(pictures, labels, self.classes, self.seed, step, positions)
        return Batch(pictures, targets.argmax(1), targets)

    @cached_property
    def _near(self) -> tuple[Tensor, Tensor] | None:
        """Pictures and labels of a split in memory, on the device: small data live there. None for pictures in files."""
        if not isinstance(self.split, Split):
            return None
        return to_device(self.split.images, self.engine), to_device(self.split.labels, self.engine)

    def _gathered(self, step: int) -> Gathered:
        """From the workers, who go on from the step before; a step out of turn starts them anew."""
        if self._ahead is None or step != self._next:
            mine, change = share(self.size, self.world), self.augmentation.trivial
            job = Steps(self.split, self.preprocessing, self.crop, change, self.size, self.seed, mine)
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
