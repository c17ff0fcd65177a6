"""The images of training step t and their augmentation: functions of (seed, step, position) only.

A step's batch does not depend on the number of processes that share it: each process takes a range of positions
(`rank_positions`) and gives each position the augmentation that one process with all of them would give it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from resnetlab.data import crops, trivial_augment
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import MemorySplit, Split
from resnetlab.data.disk_split import DiskSplit
from resnetlab.data.mixing import Mixing
from resnetlab.data.prefetch import ImageBatch, handle_unreadable, load_batch, prefetch, preprocess_image
from resnetlab.device import DeviceConfig, to_device
from resnetlab.distributed import World
from resnetlab.errors import DataError, UsageError
from resnetlab.preprocessing import Preprocessing
from resnetlab.random import make_generator


class Batch(NamedTuple):
    """Input of one step.

    Attributes:
        images: float32 (B, C, h, w) in channels-last memory.
        labels: int64 (B,); for mixed images the class with the largest share.
        targets: targets of the loss: the labels, or for mixed images float32 (B, classes), rows sum to 1.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor


def step_indices(seed: int, n: int, batch: int, step: int) -> Tensor:
    """Indices of the `batch` images of step `step`; int64 (batch,).

    The epochs are permutations of all images, one after the other. A batch may span two of them, so no batch is short.
    """
    parts = []
    position, end = step * batch, (step + 1) * batch
    while position < end:
        epoch, start = divmod(position, n)
        stop = min(n, start + end - position)
        parts.append(_permutation(seed, n, epoch)[start:stop])
        position += stop - start
    return torch.cat(parts)


def rank_positions(batch_size: int, world: World) -> range:
    """The positions of a step that one process takes: whole pairs, divided as evenly as possible.

    Pairs (0 and 1, 2 and 3, …) stay together because mixing combines them. If the ranges differ in length, the mean over the
    step is the mean of the processes' means weighted by their lengths. Raises UsageError with fewer pairs than processes.
    """
    if batch_size // 2 < world.size:
        raise UsageError(
            f"a batch of {batch_size:,} cannot be shared by {world.size:,} processes; each needs at least two images: "
            f"--set batch={2 * world.size}."
        )
    start, end = (2 * (batch_size // 2 * rank // world.size) for rank in (world.rank, world.rank + 1))
    return range(start, batch_size if world.rank == world.size - 1 else end)


@lru_cache(maxsize=2)  # a batch spans two epochs at most unless it is larger than the data set
def _permutation(seed: int, n: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=make_generator(seed, "order", epoch))


@dataclass(frozen=True, eq=False)
class StepReader:
    """Loads the pixels of a step: decoded, cropped and augmented one by one. Picklable, so that workers can run it."""

    split: Split
    preprocessing: Preprocessing
    crop: Crop
    trivial_augment: bool
    batch_size: int
    seed: int
    positions: range

    def __call__(self, step: int) -> ImageBatch:
        indices = self._own(step_indices(self.seed, len(self.split), self.batch_size, step)).tolist()
        crop_draws = self._draw("crop", step, crops.NUM_DRAWS)
        augment_draws = self._draw("trivial", step, trivial_augment.NUM_DRAWS) if self.trivial_augment else []

        def transform(k: int, pixels: Tensor) -> Tensor:
            if self.crop.kind == "centre":
                cropped = preprocess_image(self.preprocessing, pixels)
            else:
                cropped = self.crop(pixels, self.preprocessing.size[0], crop_draws[k])
            return trivial_augment.trivial_augment(cropped, augment_draws[k]) if self.trivial_augment else cropped

        return load_batch(self.split, indices, transform)

    def _draw(self, use: str, step: int, count: int) -> list[list[float]]:
        """`count` random numbers in [0, 1) for each of this process's positions."""
        draws = torch.rand(self.batch_size, count, generator=make_generator(self.seed, use, step), dtype=torch.float64)
        return self._own(draws).tolist()

    def _own(self, x: Tensor) -> Tensor:
        return x[self.positions.start : self.positions.stop]


@dataclass(eq=False)
class TrainLoader:
    """Training batches of a split.

    Attributes:
        batch_size: images in a step, over all processes.
        num_classes: needed if images are mixed.
        world: the processes that share a step; `batch` returns the images of this one.
    """

    split: Split
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    seed: int
    device_config: DeviceConfig
    crop: Crop = field(default_factory=Crop)
    mixing: Mixing = field(default_factory=Mixing)
    num_classes: int = 0
    world: World = field(default_factory=World)
    _results: Iterator[ImageBatch] | None = field(default=None, init=False)
    _next: int = field(default=-1, init=False)  # the step that `_results` yields next

    def batch(self, step: int) -> Batch:
        """This process's images of step `step`, augmented, normalised and mixed, on the device.

        Images that cannot be read are missing from it if they are to be skipped.
        """
        own = rank_positions(self.batch_size, self.world)
        indices = step_indices(self.seed, len(self.split), self.batch_size, step)[own.start : own.stop]
        one_by_one = self.augmentation.trivial_augment or self.crop.kind != "centre"
        if self._on_device is not None and not one_by_one:
            chosen, read = to_device(indices, self.device_config.device), torch.arange(len(indices))
            pixels, labels = (x.index_select(0, chosen) for x in self._on_device)
        else:
            pixels, read, _ = handle_unreadable(self.split, self._load(step))
            if not len(read):
                raise DataError(
                    f"none of the {len(indices):,} images of step {step:,} can be read; fix them: resnetlab data check."
                )
            pixels, labels = (
                to_device(x, self.device_config.device) for x in (pixels, self.split.labels[indices[read]])
            )
        positions = own.start + read
        images = self.augmentation(
            pixels,
            self.preprocessing,
            self.seed,
            step,
            None if len(read) == self.batch_size else (positions, self.batch_size),
        )
        if not self.mixing:
            return Batch(images, labels, labels)
        images, targets = self.mixing(images, labels, self.num_classes, self.seed, step, positions)
        return Batch(images, targets.argmax(1), targets)

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor] | None:
        """Images and labels of a split in memory, moved to the device; None for images in files."""
        if not isinstance(self.split, MemorySplit):
            return None
        return to_device(self.split.images, self.device_config.device), to_device(
            self.split.labels, self.device_config.device
        )

    def _load(self, step: int) -> ImageBatch:
        """The pixels of a step from the workers, which run ahead step by step; a step out of order restarts them."""
        if self._results is None or step != self._next:
            own, change = rank_positions(self.batch_size, self.world), self.augmentation.trivial_augment
            job = StepReader(self.split, self.preprocessing, self.crop, change, self.batch_size, self.seed, own)
            workers = self.split.read_options.workers if isinstance(self.split, DiskSplit) else 0
            self.close()
            self._results = prefetch(job, count(step), workers, pin=self.device_config.device.type == "cuda")
        self._next = step + 1
        return next(self._results)

    def close(self) -> None:
        """Stops the workers, if any."""
        results, self._results = self._results, None
        if results is not None:
            results.close()  # type: ignore[attr-defined]  # a generator
