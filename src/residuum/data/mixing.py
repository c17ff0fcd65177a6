"""Mixup and cutmix: pictures of a batch mixed in pairs, and their targets with them; a function of (seed, step)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from residuum.errors import UsageError
from residuum.runtime import onto, seed_for


@dataclass(frozen=True)
class Mixing:
    """How pictures of a step are mixed. Where both are on, each step does one of them, by the toss of a coin.

    Every step draws one share from Beta(a, a). The picture at position p is mixed with its neighbour at p ^ 1 (positions 0 and
    1, 2 and 3, …; they are in random order already), so processes that share a step by pairs need no other's pictures.

    Attributes:
        mixup: a of mixup (Zhang et al. 2018, arXiv 1710.09412): share * picture + (1 - share) * other; 0 for none.
        cutmix: a of cutmix (Yun et al. 2019, arXiv 1905.04899): a box of 1 - share of the area shows the other; 0 for none.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.mixup < 1e3 and 0 <= self.cutmix < 1e3):
            raise UsageError(f"mixup {self.mixup} and cutmix {self.cutmix} must be 0 (none) or more, and below 1,000.")

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __call__(
        self, pictures: Tensor, labels: Tensor, classes: int, seed: int, step: int, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Pictures, mixed, and soft targets.

        Args:
            pictures: float32 (B, C, h, w), normalised.
            labels: int64 (B,).
            positions: ascending int64 (B,), where these are not all of the step's pictures; one whose neighbour is not among
                them stays as it is.

        Returns:
            float32 (B, C, h, w) and float32 (B, classes), rows that add up to 1.
        """
        draw = random.Random(seed_for(seed, "mix", step))
        both = self.mixup > 0 and self.cutmix > 0
        cutting = draw.random() < 0.5 if both else self.cutmix > 0
        a = self.cutmix if cutting else self.mixup
        share = draw.betavariate(a, a)
        other = onto(neighbours(torch.arange(len(labels)) if positions is None else positions), pictures.device)
        theirs = pictures.index_select(0, other)
        if cutting:
            top, left, h, w = box(pictures.shape[2], pictures.shape[3], 1 - share, draw.random(), draw.random())
            pictures = pictures.clone(memory_format=torch.preserve_format)
            pictures[:, :, top : top + h, left : left + w] = theirs[:, :, top : top + h, left : left + w]
            share = 1 - h * w / (pictures.shape[2] * pictures.shape[3])
        else:
            pictures = torch.lerp(theirs, pictures, share)
        own = F.one_hot(labels, classes).to(pictures.dtype)  # (B, classes)
        return pictures, torch.lerp(own.index_select(0, other), own, share)


def neighbours(positions: Tensor) -> Tensor:
    """For ascending positions, int64 (B,), where among them each one's neighbour p ^ 1 stands; itself where it is missing."""
    place = torch.searchsorted(positions, positions ^ 1).clamp_max(max(0, len(positions) - 1))
    return torch.where(positions[place] == positions ^ 1, place, torch.arange(len(positions)))


def box(height: int, width: int, area: float, y: float, x: float) -> tuple[int, int, int, int]:
    """(top, left, h, w) of cutmix's box: the picture's shape, `area` of its area, centred at (y, x) in [0, 1), cut at edges."""
    half_h, half_w = int(height * area**0.5 / 2), int(width * area**0.5 / 2)
    top, bottom = max(0, int(y * height) - half_h), min(height, int(y * height) + half_h)
    left, right = max(0, int(x * width) - half_w), min(width, int(x * width) + half_w)
    return top, left, bottom - top, right - left
