"""The samples of a training step, images with flipped boxes or masks: a function of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from resnetlab.data.sampler import step_indices
from resnetlab.distributed import World
from resnetlab.errors import DataError, UsageError
from resnetlab.random import make_generator

FLIPS = ("none", "sideways", "both")


class NamedImage(Protocol):
    """An image that a sample is made of."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=NamedImage)
S = TypeVar("S")


class AugmentationDraw(NamedTuple):
    """Random choices for one image: its flips, and numbers in [0, 1) that decide scale and position of a crop."""

    flip_horizontal: bool
    flip_vertical: bool
    scale: float
    top: float
    left: float


class StepSamples(NamedTuple, Generic[S]):
    """The samples of a step that could be read, by micro-batch, and (name, reason) of the others."""

    micro_batches: list[list[S]]
    unreadable: list[tuple[str, str]]

    def handle_unreadable(self, stop: bool, skipped: dict[str, str], option: str) -> list[list[S]]:
        """The micro-batches; lists what could not be read in `skipped`.

        Raises DataError for an unreadable image where `stop` is set, and for a micro-batch that is left empty.
        """
        if self.unreadable and stop:
            raise DataError(
                f"{self.unreadable[0][1].rstrip('.')}; fix or remove it, or go on without it: {option} skip."
            )
        skipped.update(self.unreadable)
        if not all(self.micro_batches):
            raise DataError(f"no image of a micro-batch can be read, such as {self.unreadable[0][1]}")
        return self.micro_batches


@dataclass(frozen=True, eq=False)
class AnnotatedSampler(Generic[P, S]):
    """The samples of step t; a value, so that it can be sent to workers.

    Attributes:
        images: the training images.
        make_sample: (image, its draw) -> sample; raises DataError if the image cannot be read.
        batch: images of a step, over all processes.
        flips: "none", "sideways" (half are flipped left to right) or "both" (and half upside down: microscopy has no up).
        world: the processes that share each step; this one reads the positions of its share.
        micro_batch: images that go through the network at once; 0 for all of a process's share.
    """

    images: Sequence[P]
    make_sample: Callable[[P, AugmentationDraw], S]
    batch: int
    seed: int
    flips: str
    world: World = field(default_factory=World)
    micro_batch: int = 0

    def __post_init__(self) -> None:
        divide_batch(self.batch, self.micro_batch, self.world.size)

    def __call__(self, step: int) -> StepSamples[S]:
        indices = step_indices(self.seed, len(self.images), self.batch, step).tolist()
        draws = torch.rand(self.batch, 5, generator=make_generator(self.seed, "samples", step)).tolist()
        share, size = divide_batch(self.batch, self.micro_batch, self.world.size)
        samples: StepSamples[S] = StepSamples([[] for _ in range(share // size)], [])
        for i in range(share):
            position = self.world.rank * share + i
            image, (horizontal, vertical, *crop) = self.images[indices[position]], draws[position]
            try:
                flips = horizontal < 0.5 and self.flips != "none", vertical < 0.5 and self.flips == "both"
                sample = self.make_sample(image, AugmentationDraw(*flips, *crop))
                samples.micro_batches[i // size].append(sample)
            except DataError as error:
                samples.unreadable.append((image.name, str(error)))
        return samples


def divide_batch(batch: int, micro_batch: int, processes: int) -> tuple[int, int]:
    """(images of a step in each process, images of a micro-batch).

    Raises UsageError if the batch cannot be divided evenly.
    """
    share = batch // processes
    if batch % processes or (micro_batch and share % micro_batch):
        parts = f" in micro-batches of {micro_batch}" if micro_batch else ""
        raise UsageError(
            f"batch {batch}{parts} cannot be shared evenly by {processes} processes; change --procs, batch or bn_batch."
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
