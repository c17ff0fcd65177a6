"""Augmentation of whole batches, a function of (seed, step, position): pad, random crop, flip (2015 §4.2), colour, erasing."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from residuum.errors import UsageError, unknown
from residuum.preprocessing import Preprocessing
from residuum.runtime import generator, onto

PADDINGS = ("mean", "black")
# Principal components of RGB values in ImageNet (AlexNet's; fb.resnet.torch): rows are R, G, B in [0, 1].
VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
VALUES = (0.2175, 0.0188, 0.0045)
ERASED, SHAPES, TRIES = (
    (0.02, 0.33),
    (0.3, 3.3),
    10,
)  # of a rectangle: share of the area, height to width; torchvision's


@dataclass(frozen=True)
class Augmentation:
    """What training pictures undergo.

    Attributes:
        pad: pixels added on each side before a crop of the former size is taken; 0 leaves pictures where they are.
        pad_with: "mean" (zeros after the mean is subtracted) or "black" (zeros before); the paper does not say.
        flip: mirror half of the pictures.
        colour: add to every pixel of a picture a mixture of the principal components of RGB, with weights N(0, 0.1) times
            their eigenvalues (AlexNet's colour augmentation; 2015 §3.4).
        trivial: one random change a picture (data.trivial), made before the others by whoever holds the pictures one by one.
        erasing: share of pictures in which a random rectangle is replaced by the mean (Zhong et al. 2020, arXiv 1708.04896).
    """

    pad: int = 0
    pad_with: str = "mean"
    flip: bool = False
    colour: bool = False
    trivial: bool = False
    erasing: float = 0.0

    def __post_init__(self) -> None:
        if self.pad_with not in PADDINGS:
            raise unknown("pad_with", self.pad_with, PADDINGS)
        if not 0 <= self.erasing <= 1:
            raise UsageError(f"erasing must be a share of pictures from 0 to 1, not {self.erasing}.")

    def __call__(
        self,
        pixels: Tensor,
        preprocessing: Preprocessing,
        seed: int,
        step: int,
        positions: tuple[Tensor, int] | None = None,
    ) -> Tensor:
        """uint8 (B, h, w, C) -> float32 (B, C, h, w), channels last, augmented and normalised.

        Args:
            positions: (int64 (B,), size) where these are only some of the step's `size` pictures; each is treated as it would
                be among all of them.
        """
        _, h, w, channels = pixels.shape
        here, b = positions or (slice(None), len(pixels))
        draw = generator(seed, "augment", step)
        shifts = torch.randint(2 * self.pad + 1, (2, b), generator=draw)[:, here]
        flips = (torch.rand(b, generator=draw) < 0.5 if self.flip else torch.zeros(b, dtype=torch.bool))[here]
        x = self._cropped(pixels, preprocessing, shifts, flips, h, w)
        if self.colour:
            if channels != 3:
                raise UsageError("colour=true needs pictures of three channels; set colour=false.")
            weights = 0.1 * torch.randn(b, 3, generator=draw) * torch.tensor(VALUES)
            offset = (
                weights @ torch.tensor(VECTORS).T / preprocessing.std
            )  # of all, so that a share of them rounds alike
            x = x + onto(offset[here], x.device)[:, :, None, None]  # (B, 3, 1, 1)
        if self.erasing:
            where = _rectangles(b, h, w, self.erasing, generator(seed, "erase", step))[here]
            x = x.masked_fill(onto(where, x.device)[:, None], 0)
        return x

    def _cropped(
        self, pixels: Tensor, preprocessing: Preprocessing, shifts: Tensor, flips: Tensor, h: int, w: int
    ) -> Tensor:
        """Padded, cropped, mirrored and normalised; float32 (B, C, h, w)."""
        if not self.pad:
            if (
                preprocessing.mean.ndim == 1 and pixels.device.type == "cpu"
            ):  # the same numbers, and bytes are quicker to mirror than floats
                chosen = zip(pixels, flips.tolist(), strict=True)
                return preprocessing.normalise([picture.flip(1) if flip else picture for picture, flip in chosen])
            x = preprocessing.normalise(pixels)
            where = onto(flips.nonzero().flatten(), x.device)
            x[where] = x[where].flip(3)
            return x
        where = _positions(onto(shifts, pixels.device), onto(flips, pixels.device), h, w, self.pad)
        if self.pad_with == "black":
            return preprocessing.normalise(_gather(self._padded(pixels), where))
        x = preprocessing.normalise(pixels).permute(0, 2, 3, 1)  # (B, h, w, C)
        return _gather(self._padded(x), where).permute(0, 3, 1, 2)

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, self.pad, self.pad, self.pad, self.pad))


def _rectangles(b: int, h: int, w: int, share: float, draw: torch.Generator) -> Tensor:
    """Random erasing's rectangles in a `share` of b pictures; bool (b, h, w)."""
    chosen, y, x = torch.rand(3, b, 1, generator=draw)  # (b, 1) each
    areas = h * w * (ERASED[0] + (ERASED[1] - ERASED[0]) * torch.rand(b, TRIES, generator=draw))
    low, high = (math.log(shape) for shape in SHAPES)
    shapes = torch.exp(low + (high - low) * torch.rand(b, TRIES, generator=draw))
    heights, widths = (areas * shapes).sqrt().round(), (areas / shapes).sqrt().round()
    fits = (heights < h) & (widths < w)
    first = fits.int().argmax(1, keepdim=True)  # of the tries, as torchvision's
    height, width = heights.gather(1, first), widths.gather(1, first)  # (b, 1)
    top, left = (y * (h - height + 1)).floor(), (x * (w - width + 1)).floor()
    rows, columns = torch.arange(h), torch.arange(w)
    inside = ((rows >= top) & (rows < top + height))[:, :, None] & ((columns >= left) & (columns < left + width))[
        :, None
    ]
    erased: Tensor = inside & (fits.any(1, keepdim=True) & (chosen < share)).view(b, 1, 1)
    return erased


def _positions(shifts: Tensor, flips: Tensor, h: int, w: int, pad: int) -> Tensor:
    """For each output pixel, the row of the padded batch, seen as (B * H' * W', C), that it shows; (B, h, w)."""
    height, width = h + 2 * pad, w + 2 * pad
    device = flips.device
    columns = torch.arange(w, device=device).expand(len(flips), w)
    columns = torch.where(flips[:, None], w - 1 - columns, columns) + shifts[1][:, None]  # (B, w)
    rows = torch.arange(h, device=device) + shifts[0][:, None]  # (B, h)
    first = torch.arange(len(flips), device=device) * height * width
    return first[:, None, None] + rows[:, :, None] * width + columns[:, None, :]


def _gather(x: Tensor, where: Tensor) -> Tensor:
    """(B, H', W', C) -> (B, h, w, C): one index_select over whole pixels, faster than B crops."""
    channels = x.shape[-1]
    return x.reshape(-1, channels).index_select(0, where.flatten()).view(*where.shape, channels)
