"""Augmentation of whole batches at once, as a function of (seed, step): pad, random crop, horizontal flip (2015 §4.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from residuum.errors import unknown
from residuum.preprocessing import Preprocessing
from residuum.runtime import generator

PADDINGS = ("mean", "black")


@dataclass(frozen=True)
class Augmentation:
    """What training pictures undergo.

    Attributes:
        pad: pixels added on each side before a crop of the former size is taken; 0 leaves pictures where they are.
        pad_with: "mean" (zeros after the mean is subtracted) or "black" (zeros before); the paper does not say.
        flip: mirror half of the pictures.
    """

    pad: int = 0
    pad_with: str = "mean"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.pad_with not in PADDINGS:
            raise unknown("pad_with", self.pad_with, PADDINGS)

    def __call__(self, pixels: Tensor, preprocessing: Preprocessing, seed: int, step: int) -> Tensor:
        """uint8 (B, h, w, C) -> float32 (B, C, h, w), channels last, augmented and normalised."""
        b, h, w, _ = pixels.shape
        draw = generator(seed, "augment", step)
        shifts = torch.randint(2 * self.pad + 1, (2, b), generator=draw)
        flips = torch.rand(b, generator=draw) < 0.5 if self.flip else torch.zeros(b, dtype=torch.bool)
        where = _positions(shifts, flips, h, w, self.pad).to(pixels.device)
        if self.pad_with == "black":
            return preprocessing.normalise(_gather(self._padded(pixels), where))
        x = preprocessing.normalise(pixels).permute(0, 2, 3, 1)  # (B, h, w, C)
        return _gather(self._padded(x), where).permute(0, 3, 1, 2)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, self.pad, self.pad, self.pad, self.pad)) if self.pad else x


def _positions(shifts: Tensor, flips: Tensor, h: int, w: int, pad: int) -> Tensor:
    """For each output pixel, the row of the padded batch, seen as (B * H' * W', C), that it shows; (B, h, w)."""
    height, width = h + 2 * pad, w + 2 * pad
    columns = torch.arange(w).expand(len(flips), w)
    columns = torch.where(flips[:, None], w - 1 - columns, columns) + shifts[1][:, None]  # (B, w)
    rows = torch.arange(h) + shifts[0][:, None]  # (B, h)
    first = torch.arange(len(flips)) * height * width
    return first[:, None, None] + rows[:, :, None] * width + columns[:, None, :]


def _gather(x: Tensor, where: Tensor) -> Tensor:
    """(B, H', W', C) -> (B, h, w, C): one index_select over whole pixels, faster than B crops."""
    channels = x.shape[-1]
    return x.reshape(-1, channels).index_select(0, where.flatten()).view(*where.shape, channels)
