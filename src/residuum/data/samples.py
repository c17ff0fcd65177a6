"""The pictures of a training step with their boxes or masks, mirrored: a function of (seed, step, position)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from residuum.data.loader import order
from residuum.errors import DataError, UsageError
from residuum.runtime import generator
from residuum.world import World

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
    """The samples of a step that could be read, in the step's parts, and (name, why) of the others."""

    parts: list[list[S]]
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
        together: how many go through the network at once, which makes the step's parts; 0 for all of a share.
    """

    pictures: Sequence[P]
    make: Callable[[P, Draw], S]
    batch: int
    seed: int
    flips: str
    world: World = field(default_factory=World)
    together: int = 0

    def __post_init__(self) -> None:
        shared(self.batch, self.together, self.world.size)

    def __call__(self, step: int) -> Read[S]:
        where = order(self.seed, len(self.pictures), self.batch, step).tolist()
        draws = torch.rand(self.batch, 5, generator=generator(self.seed, "samples", step)).tolist()
        share, size = shared(self.batch, self.together, self.world.size)
        read: Read[S] = Read([[] for _ in range(share // size)], [])
        for place in range(share):
            i, (sideways, over, *rest) = where[self.world.rank * share + place], draws[self.world.rank * share + place]
            try:
                flips = sideways < 0.5 and self.flips != "none", over < 0.5 and self.flips == "both"
                read.parts[place // size].append(self.make(self.pictures[i], Draw(*flips, *rest)))
            except DataError as error:
                read.bad.append((self.pictures[i].name, str(error)))
        return read


def shared(batch: int, together: int, processes: int) -> tuple[int, int]:
    """How many pictures of a step each process has, and how many of them go through the network at once.

    Raises UsageError where they cannot be shared evenly.
    """
    share = batch // processes
    if batch % processes or (together and share % together):
        parts = f" in parts of {together}" if together else ""
        raise UsageError(
            f"batch {batch}{parts} cannot be shared evenly by {processes} processes; change --procs, batch or bn_batch."
        )
    return share, together or share


def accept(read: Read[S], stop: bool, skipped: dict[str, str], option: str) -> list[list[S]]:
    """The parts of a step; notes what could not be read, or raises DataError where that is to stop the work."""
    if read.bad and stop:
        raise DataError(f"{read.bad[0][1].rstrip('.')}; mend or remove it, or go on without it: {option} skip.")
    skipped.update(read.bad)
    if not all(read.parts):
        raise DataError(f"no picture of a step's part can be read, such as {read.bad[0][1]}")
    return read.parts


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
