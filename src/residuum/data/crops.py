"""Which part of a photograph a training step shows: the paper's scale augmentation, and random-resized crop.

A part has whole pixels as its borders, and only it is resized (torch's antialiased bilinear, Pillow's within two grey levels):
that costs a third of resizing the whole photograph first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from residuum.errors import UsageError, unknown

CROPS = ("centre", "scale", "resized")
TRIES = 10  # of an area and a shape that fit; then the middle is taken
DRAWS = 2 + 2 * TRIES  # random numbers for one picture


@dataclass(frozen=True)
class Crop:
    """How the part is chosen.

    Attributes:
        kind: "centre" (as in evaluation), "scale" (2015 §3.4: the shorter side uniform in `scale`, a random square of it), or
            "resized" (random area and shape, torchvision's RandomResizedCrop).
        scale: lengths in pixels that the shorter side is resized to.
        area: smallest share of the picture that "resized" takes; the largest is all of it.
    """

    kind: str = "centre"
    scale: tuple[int, ...] = (256, 480)
    area: float = 0.08

    def __post_init__(self) -> None:
        if self.kind not in CROPS:
            raise unknown("crop", self.kind, CROPS)
        if len(self.scale) != 2 or not 1 <= self.scale[0] <= self.scale[1]:
            raise UsageError(f"scale takes two rising lengths in pixels, such as 256,480, not {list(self.scale)}.")
        if not 0 < self.area <= 1:
            raise UsageError(f"area must be above 0 and at most 1, not {self.area}.")

    def box(self, height: int, width: int, size: int, draws: list[float]) -> tuple[int, int, int, int]:
        """(top, left, h, w) of the part that becomes `size` x `size`, from DRAWS numbers in [0, 1)."""
        if self.kind == "scale":
            low, high = self.scale
            shorter = max(size, low + int(draws[2] * (high - low + 1)))
            side = max(1, round(size * min(height, width) / shorter))
            return int(draws[0] * (height - side + 1)), int(draws[1] * (width - side + 1)), side, side
        for area, shape in zip(draws[2::2], draws[3::2], strict=True):
            pixels = height * width * (self.area + (1 - self.area) * area)
            ratio = math.exp((2 * shape - 1) * math.log(4 / 3))  # width to height, from 3:4 to 4:3
            h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(draws[0] * (height - h + 1)), int(draws[1] * (width - w + 1)), h, w
        h, w = min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, pixels: Tensor, size: int, draws: list[float]) -> Tensor:
        """uint8 (H, W, C) -> uint8 (size, size, C)."""
        top, left, h, w = self.box(pixels.shape[0], pixels.shape[1], size, draws)
        part = pixels[None, top : top + h, left : left + w]  # (1, h, w, C)
        if (h, w) != (size, size):
            part = part.permute(
                0, 3, 1, 2
            )  # the batch's axis came first, so torch sees channels last, and keeps them there
            part = F.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)
            part = part.permute(0, 2, 3, 1)
        return part[0]
