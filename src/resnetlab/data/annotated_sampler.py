"""The samples of a training step, images with flipped boxes or masks: a function of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from resnetlab.data.annotations import AnnotatedItem
from resnetlab.data.batch_copier import BatchCopier
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.prefetch import BatchReader, Prefetcher
from resnetlab.data.sampler import RandomStream, Sampler
from resnetlab.distributed import World
from resnetlab.errors import DataError, UsageError
from resnetlab.random import SAMPLING_VERSION

FLIPS = ("none", "sideways", "both")


P = TypeVar("P", bound=AnnotatedItem)
S = TypeVar("S")


class AugmentationDraw(NamedTuple):
    """Random choices for one image: its flips, and numbers in [0, 1) that decide scale and position of a crop."""

    flip_horizontal: bool
    flip_vertical: bool
    scale: float
    top: float
    left: float


@dataclass(eq=False)
class AnnotatedLoader(Generic[P, S]):
    """The micro-batches of a training step, samples made of annotated images.

    Attributes:
        images: the training images.
        make_sample: (image, its draw) -> sample; raises DataError if the image cannot be read.
        batch: images of a step, over all processes.
        flips: "none", "sideways" (half are flipped left to right) or "both" (and half upside down: microscopy has no up).
        world: the processes that share each step; this one reads the positions of its share.
        micro_batch: images that go through the network at once; 0 for all of a process's share.
        errors: handles images that cannot be read.
        workers: processes that read ahead.
        device: where the samples are copied to.
        version: of the random numbers (random.StepDraws).
    """

    images: Sequence[P]
    make_sample: Callable[[P, AugmentationDraw], S]
    batch: int
    seed: int
    flips: str
    world: World = field(default_factory=World)
    micro_batch: int = 0
    errors: ErrorPolicy = field(default_factory=ErrorPolicy)
    workers: int = 0
    device: torch.device = field(default_factory=partial(torch.device, "cpu"))
    version: int = SAMPLING_VERSION

    def __post_init__(self) -> None:
        self._share, self._size = divide_batch(self.batch, self.micro_batch, self.world.size)
        start = self.world.rank * self._share
        streams = (RandomStream("samples", 5, torch.float32),)
        positions = range(start, start + self._share)
        sampler = Sampler(len(self.images), self.batch, self.seed, positions, streams, version=self.version)
        read = _SampleReader(self.images, self.make_sample, self.flips)
        reader, pin = BatchReader(sampler, read, read.name_of, list), self.device.type == "cuda"
        self._prefetcher, self._copier = Prefetcher(reader, self.errors, self.workers, pin), BatchCopier(self.device)

    def micro_batches(self, step: int) -> list[list[S]]:
        """This process's micro-batches of a step, on the device. Raises DataError for a micro-batch that is left empty."""
        loaded = self._prefetcher.get(step)
        batches: list[list[S]] = [[] for _ in range(self._share // self._size)]
        for position, sample in zip(loaded.positions, loaded.samples, strict=True):
            batches[position // self._size].append(sample)
        if not all(batches):
            raise DataError(f"no image of a micro-batch can be read, such as {next(iter(loaded.unreadable.values()))}")
        return self._copier(batches)

    @property
    def seconds_reading(self) -> float:
        """Seconds that this process has spent reading images, or waiting for its workers to."""
        return self._prefetcher.seconds

    def close(self) -> None:
        """Stops the workers, if any."""
        self._prefetcher.close()


@dataclass(frozen=True, eq=False)
class _SampleReader(Generic[P, S]):
    """Makes the sample of an image from its random numbers. Picklable, so that workers can run it."""

    images: Sequence[P]
    make_sample: Callable[[P, AugmentationDraw], S]
    flips: str

    def __call__(self, index: int, draws: list[float]) -> S:
        horizontal, vertical, *crop = draws
        flips = horizontal < 0.5 and self.flips != "none", vertical < 0.5 and self.flips == "both"
        return self.make_sample(self.images[index], AugmentationDraw(*flips, *crop))

    def name_of(self, index: int) -> str:
        return self.images[index].name


def divide_batch(batch: int, micro_batch: int, processes: int) -> tuple[int, int]:
    """(images of a step in each process, images of a micro-batch).

    Raises UsageError if the batch cannot be divided evenly.
    """
    share = batch // processes
    if batch % processes or (micro_batch and share % micro_batch):
        parts = f" in micro-batches of {micro_batch}" if micro_batch else ""
        hint = f" (bn_batch={share} would fit)" if micro_batch and share > 1 and not batch % processes else ""
        raise UsageError(
            f"batch {batch}{parts} cannot be shared evenly by {processes} processes; "
            f"change --procs, batch or bn_batch{hint}."
        )
    return share, micro_batch or share


def flip_boxes(boxes: Tensor, size: tuple[int, int], draw: AugmentationDraw) -> Tensor:
    """Boxes (n, 4) of an image of (height, width), flipped as the image is."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(1)
    if draw.flip_horizontal:
        x1, x2 = width - x2, width - x1
    if draw.flip_vertical:
        y1, y2 = height - y2, height - y1
    return torch.stack([x1, y1, x2, y2], 1)


def flip_image(pixels: Tensor, draw: AugmentationDraw) -> Tensor:
    """An image (H, W, 3) or mask (H, W), flipped."""
    axes = [axis for axis, flip in ((0, draw.flip_vertical), (1, draw.flip_horizontal)) if flip]
    return pixels.flip(axes) if axes else pixels
