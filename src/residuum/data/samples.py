"""The pictures of a training step with their boxes or masks, mirrored: a function of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from residuum.data.loader import order
from residuum.errors import DataError, UsageError
from residuum.runtime import World, generator

FLIPS = ("none", "sideways", "both")


class Named(Protocol):
    """What is read for a step."""

    @property
    def name(self) -> str: ...


P = TypeVar("P", bound=Named)
S = TypeVar("S")


class Draw(NamedTuple):
    """What chance says of one picture: whether it is mirrored, and numbers in [0, 1)."""

    sideways: bool
    over: bool  # upside down
    scale: float
    top: float
    left: float


class Read(NamedTuple, Generic[S]):
    """The samples of a step that could be read, and (name, why) of the others."""

    samples: list[S]
    bad: list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Samples(Generic[P, S]):
    """What step t trains on; a value, so that workers can have it.

    Attributes:
        pictures: those trained on.
        make: (picture, what was drawn for it) -> sample; raises DataError where it cannot be read.
        batch: how many make a step.
        flips: "none", "sideways" (half are mirrored left to right) or "both" (and half upside down: no up in a microscope).
        world: the processes that share each step; this one has the pictures at its share of the positions.
    """

    pictures: Sequence[P]
    make: Callable[[P, Draw], S]
    batch: int
    seed: int
    flips: str
    world: World = field(default_factory=World)

    def __post_init__(self) -> None:
        if self.batch % self.world.size:
            raise UsageError(
                f"batch {self.batch} cannot be shared evenly by {self.world.size} processes; change one of them."
            )

    def __call__(self, step: int) -> Read[S]:
        where = order(self.seed, len(self.pictures), self.batch, step).tolist()
        draws = torch.rand(self.batch, 5, generator=generator(self.seed, "samples", step)).tolist()
        read: Read[S] = Read([], [])
        share = self.batch // self.world.size
        mine = slice(self.world.rank * share, (self.world.rank + 1) * share)
        for i, (sideways, over, *rest) in zip(where[mine], draws[mine], strict=True):
            try:
                flips = sideways < 0.5 and self.flips != "none", over < 0.5 and self.flips == "both"
                read.samples.append(self.make(self.pictures[i], Draw(*flips, *rest)))
            except DataError as error:
                read.bad.append((self.pictures[i].name, str(error)))
        return read


def accept(read: Read[S], stop: bool, skipped: dict[str, str], option: str) -> list[S]:
    """The samples of a step; notes what could not be read, or raises DataError where that is to stop the work."""
    if read.bad and stop:
        raise DataError(f"{read.bad[0][1].rstrip('.')}; mend or remove it, or go on without it: {option} skip.")
    skipped.update(read.bad)
    if not read.samples:
        raise DataError(f"no picture of a step can be read, such as {read.bad[0][1]}")
    return read.samples


def mirrored_boxes(boxes: Tensor, size: tuple[int, int], draw: Draw) -> Tensor:
    """(n, 4) in a picture of (height, width), as they lie after it was mirrored."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(1)
    if draw.sideways:
        x1, x2 = width - x2, width - x1
    if draw.over:
        y1, y2 = height - y2, height - y1
    return torch.stack([x1, y1, x2, y2], 1)


def mirrored(pixels: Tensor, draw: Draw) -> Tensor:
    """A picture (H, W, 3) or mask (H, W), mirrored."""
    axes = [axis for axis, turn in ((0, draw.over), (1, draw.sideways)) if turn]
    return pixels.flip(axes) if axes else pixels
