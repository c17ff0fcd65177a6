"""Random crops of photographs for training: the paper's scale augmentation and the random-resized crop.

The crop's borders are on whole pixels and only the crop is resized (torch's antialiased bilinear, within two grey levels of
Pillow's), which costs a third of resizing the whole photograph first. On a GPU it is resized in float32 and rounded, within one
grey level of a CPU's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from resnetlab.data.jpeg_region import cut_out
from resnetlab.errors import UsageError, unknown_name_error
from resnetlab.pixels import resize_bytes
from resnetlab.preprocessing import round_to_bytes

CROPS = ("centre", "scale", "resized")
TRIES = 10  # draws of an area and a ratio until a crop fits; then a centre crop is taken
NUM_DRAWS = 2 + 2 * TRIES  # random numbers per image


@dataclass(frozen=True)
class Crop:
    """Settings of the crop.

    Attributes:
        kind: "centre" (as in evaluation), "scale" (2015 §3.4: the shorter side uniform in `scale`, a random square of it), or
            "resized" (random area and aspect ratio, torchvision's RandomResizedCrop).
        scale: range of lengths in pixels that the shorter side is resized to.
        area: smallest share of the image's area that "resized" takes; the largest is 1.
    """

    kind: str = "centre"
    scale: tuple[int, ...] = (256, 480)
    area: float = 0.08

    def __post_init__(self) -> None:
        if self.kind not in CROPS:
            raise unknown_name_error("crop", self.kind, CROPS)
        if len(self.scale) != 2 or not 1 <= self.scale[0] <= self.scale[1]:
            raise UsageError(f"scale takes two rising lengths in pixels, such as 256,480, not {list(self.scale)}.")
        if not 0 < self.area <= 1:
            raise UsageError(f"area must be above 0 and at most 1, not {self.area}.")

    def compute_box(self, height: int, width: int, size: int, draws: list[float]) -> tuple[int, int, int, int]:
        """(top, left, h, w) of the crop that is resized to `size` x `size`, from NUM_DRAWS numbers in [0, 1)."""
        if self.kind == "scale":
            low, high = self.scale
            shorter = max(size, low + int(draws[2] * (high - low + 1)))
            side = max(1, round(size * min(height, width) / shorter))
            return int(draws[0] * (height - side + 1)), int(draws[1] * (width - side + 1)), side, side
        for area_draw, ratio_draw in zip(draws[2::2], draws[3::2], strict=True):
            pixels = height * width * (self.area + (1 - self.area) * area_draw)
            ratio = math.exp((2 * ratio_draw - 1) * math.log(4 / 3))  # width to height, from 3:4 to 4:3
            h, w = round(math.sqrt(pixels / ratio)), round(math.sqrt(pixels * ratio))
            if 0 < h <= height and 0 < w <= width:
                return int(draws[0] * (height - h + 1)), int(draws[1] * (width - w + 1)), h, w
        h, w = min(height, max(1, round(width * 4 / 3))), min(width, max(1, round(height * 4 / 3)))
        return (height - h) // 2, (width - w) // 2, h, w

    def __call__(self, pixels: Tensor, size: int, draws: list[float]) -> Tensor:
        """uint8 (H, W, C) -> uint8 (size, size, C)."""
        return resize_crop(cut_out(pixels, lambda h, w: self.compute_box(h, w, size, draws)), size)


def resize_crop(crop: Tensor, size: int) -> Tensor:
    """uint8 or float32 (h, w, C) -> the same type (size, size, C): antialiased, bilinear."""
    if crop.shape[:2] == (size, size):
        return crop
    if (resized := resize_bytes("torch", crop, (size, size))) is not None:
        return resized
    x = crop[None].permute(0, 3, 1, 2)  # a view: its memory stays channels last
    on_cpu = x.device.type == "cpu"  # where torch resizes bytes themselves
    x = x if on_cpu else x.float()
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (x if on_cpu else round_to_bytes(x)).permute(0, 2, 3, 1)[0]
