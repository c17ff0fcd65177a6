"""The random numbers of a training step: those of an image are a function of (seed, step, position) only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resnetlab.random import make_generator


@dataclass(frozen=True, eq=False)
class StepDraws:
    """The random numbers of the images at some positions of a step, drawn as for all of its images.

    Attributes:
        size: images of the step, over all processes.
        positions: ascending int64 (B,), the positions of the images; None for all.
    """

    seed: int
    step: int
    size: int
    positions: Tensor | None = None

    def generator(self, use: str) -> torch.Generator:
        """The generator of one use of randomness."""
        return make_generator(self.seed, use, self.step)

    def select(self, x: Tensor, dim: int = 0) -> Tensor:
        """The numbers of these images among those of all images of the step."""
        return x if self.positions is None else x.index_select(dim, self.positions)

    def uniform(self, use: str, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """`count` numbers in [0, 1) for each image; (B, count)."""
        return self.select(torch.rand(self.size, count, generator=self.generator(use), dtype=dtype))
