"""Mixup and CutMix: mixes the images of a batch and their targets in pairs; a function of (seed, step)."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.device import to_device
from resnetlab.errors import UsageError
from resnetlab.random import seed_for


@dataclass(frozen=True)
class Mixing:
    """Settings of mixup and CutMix. If both are on, each step uses one of them, with probability 1/2 each.

    Every step draws one share from Beta(a, a). The image at position p is mixed with its partner at p ^ 1 (positions 0 and
    1, 2 and 3, …; their order is random already), so processes that take whole pairs need no images of other processes.

    Attributes:
        mixup: a of mixup (Zhang et al. 2018, arXiv 1710.09412): share * image + (1 - share) * partner; 0 turns it off.
        cutmix: a of CutMix (Yun et al. 2019, arXiv 1905.04899): the partner fills a box of 1 - share of the area; 0: off.
        classes: of the targets; needed if images are mixed.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    classes: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.mixup < 1e3 and 0 <= self.cutmix < 1e3):
            raise UsageError(f"mixup {self.mixup} and cutmix {self.cutmix} must be 0 (none) or more, and below 1,000.")

    def __bool__(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def __call__(
        self, images: Tensor, labels: Tensor, seed: int, step: int, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mixed images and soft targets.

        Args:
            images: float32 (B, C, h, w), normalised.
            labels: int64 (B,).
            positions: ascending int64 (B,), if these are not all of the step's images; an image without its partner among
                them stays unchanged.

        Returns:
            float32 (B, C, h, w) and float32 (B, classes), rows sum to 1.
        """
        draw = random.Random(seed_for(seed, "mix", step))
        both = self.mixup > 0 and self.cutmix > 0
        cutting = draw.random() < 0.5 if both else self.cutmix > 0
        a = self.cutmix if cutting else self.mixup
        share = draw.betavariate(a, a)
        partner = to_device(find_partners(torch.arange(len(labels)) if positions is None else positions), images.device)
        others = images.index_select(0, partner)
        if cutting:
            top, left, h, w = cutmix_box(images.shape[2], images.shape[3], 1 - share, draw.random(), draw.random())
            images = images.clone(memory_format=torch.preserve_format)
            images[:, :, top : top + h, left : left + w] = others[:, :, top : top + h, left : left + w]
            share = 1 - h * w / (images.shape[2] * images.shape[3])
        else:
            images = torch.lerp(others, images, share)
        own = F.one_hot(labels, self.classes).to(images.dtype)  # (B, classes)
        return images, torch.lerp(own.index_select(0, partner), own, share)


def find_partners(positions: Tensor) -> Tensor:
    """For ascending positions p, int64 (B,), the index of p ^ 1 among them; the own index if p ^ 1 is missing."""
    found = torch.searchsorted(positions, positions ^ 1).clamp_max(max(0, len(positions) - 1))
    return torch.where(positions[found] == positions ^ 1, found, torch.arange(len(positions)))


def cutmix_box(height: int, width: int, area: float, y: float, x: float) -> tuple[int, int, int, int]:
    """(top, left, h, w) of CutMix's box: the image's shape, `area` of its area, centred at (y, x) in [0, 1), clipped."""
    half_h, half_w = int(height * area**0.5 / 2), int(width * area**0.5 / 2)
    top, bottom = max(0, int(y * height) - half_h), min(height, int(y * height) + half_h)
    left, right = max(0, int(x * width) - half_w), min(width, int(x * width) + half_w)
    return top, left, bottom - top, right - left
