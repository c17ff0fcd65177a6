"""Augmentation, a function of (seed, step, position); of whole batches here: pad, crop, flip (2015 §4.2), colour, erasing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.data.crops import Crop
from resnetlab.data.mixing import Mixing
from resnetlab.device import to_device
from resnetlab.errors import UsageError, unknown_name_error
from resnetlab.pixels import normalise_bytes
from resnetlab.preprocessing import Preprocessing
from resnetlab.random import StepDraws

PADDINGS = ("mean", "black")
# Principal components of RGB values in ImageNet (AlexNet, fb.resnet.torch): rows are R, G, B in [0, 1].
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)
# Random erasing's share of the image's area and ratio of height to width, as in torchvision.
ERASED_AREA, ERASED_RATIO, ERASING_TRIES = (0.02, 0.33), (0.3, 3.3), 10


@dataclass(frozen=True)
class Augmentation:
    """Every random change of training images. `crop` and `trivial_augment` change images one by one, before the batch is made
    of them; `mixing` mixes the finished batch; calling the augmentation makes the other changes.

    Attributes:
        pad: pixels added on each side before a crop of the original size is taken; 0 does not crop.
        pad_with: "mean" (zeros after the mean is subtracted) or "black" (zeros before); the paper does not specify it.
        flip: mirror half of the images.
        colour: add to every pixel of an image a mixture of the principal components of RGB, with weights N(0, 0.1) times
            their eigenvalues (AlexNet's colour augmentation; 2015 §3.4).
        trivial_augment: one random operation per image (data.trivial_augment).
        erasing: share of images in which a random rectangle is replaced by the mean (Zhong et al. 2020, arXiv 1708.04896).
        crop: what part of an image on disk is read.
        flip_vertical: turn half of the images upside down.
        rotate: largest angle in degrees that images are rotated by, either way; corners are filled with the mean.
    """

    pad: int = 0
    pad_with: str = "mean"
    flip: bool = False
    colour: bool = False
    trivial_augment: bool = False
    erasing: float = 0.0
    crop: Crop = field(default_factory=Crop)
    mixing: Mixing = field(default_factory=Mixing)
    flip_vertical: bool = False
    rotate: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.rotate <= 180:
            raise UsageError(f"rotate must be an angle from 0 to 180 degrees, not {self.rotate}.")
        if self.pad_with not in PADDINGS:
            raise unknown_name_error("pad_with", self.pad_with, PADDINGS)
        if not 0 <= self.erasing <= 1:
            raise UsageError(f"erasing must be a share of images from 0 to 1, not {self.erasing}.")

    def __call__(self, pixels: Tensor, preprocessing: Preprocessing, draws: StepDraws) -> Tensor:
        """uint8 (B, h, w, C) -> float32 (B, C, h, w), channels last, augmented and normalised."""
        _, h, w, channels = pixels.shape
        if self.colour and channels != 3:
            raise UsageError("colour=true needs images of three channels; set colour=false.")

        def draw_shifts(n: int, generator: torch.Generator) -> Tensor:
            return torch.randint(2 * self.pad + 1, (2, n), generator=generator).T

        def draw_offsets(n: int, generator: torch.Generator) -> Tensor:
            # of all images that are drawn, not of some: a part of them would round otherwise
            weights = 0.1 * torch.randn(n, 3, generator=generator) * torch.tensor(PCA_VALUES)
            return weights @ torch.tensor(PCA_VECTORS).T / preprocessing.std

        flip = [_draw_halves] if self.flip else []
        shifts, *rest = draws("augment", draw_shifts, *flip, *([draw_offsets] if self.colour else []))
        flips = rest[0] if self.flip else torch.zeros(len(pixels), dtype=torch.bool)
        x = self._crop_and_flip(pixels, preprocessing, shifts.T, flips)
        if self.flip_vertical:
            (upside_down,) = draws("flip_vertical", _draw_halves)
            x = torch.where(to_device(upside_down, x.device)[:, None, None, None], x.flip(2), x)
        if self.rotate:
            (numbers,) = draws("rotate", lambda n, generator: torch.rand(n, generator=generator))
            x = rotate_images(x, to_device(self.rotate * (2 * numbers - 1), x.device))
        if self.colour:
            x = x + to_device(rest[-1], x.device)[:, :, None, None]  # (B, 3, 1, 1)
        if self.erasing:
            x = x.masked_fill(to_device(_draw_rectangles(draws, (h, w), self.erasing), x.device)[:, None], 0)
        return x

    def _crop_and_flip(self, pixels: Tensor, preprocessing: Preprocessing, shifts: Tensor, flips: Tensor) -> Tensor:
        """Pads, crops, mirrors and normalises; float32 (B, C, h, w)."""
        if not self.pad:
            if preprocessing.mean.ndim == 1 and pixels.device.type == "cpu":  # mirroring bytes is faster, and equal
                return _normalise_and_flip(pixels, preprocessing, flips)
            x = preprocessing.normalise(pixels)
            mirrored = to_device(flips.nonzero().flatten(), x.device)
            x[mirrored] = x[mirrored].flip(3)
            return x
        rows = _source_rows(
            to_device(shifts, pixels.device), to_device(flips, pixels.device), pixels.shape[1:3], self.pad
        )
        if self.pad_with == "black":
            return preprocessing.normalise(_gather_pixels(self._pad(pixels), rows))
        x = preprocessing.normalise(pixels).permute(0, 2, 3, 1)  # (B, h, w, C)
        return _gather_pixels(self._pad(x), rows).permute(0, 3, 1, 2)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, self.pad, self.pad, self.pad, self.pad))


def _draw_halves(n: int, generator: torch.Generator) -> Tensor:
    """bool (n,), each true with probability 1/2."""
    return torch.rand(n, generator=generator) < 0.5


def _normalise_and_flip(pixels: Tensor, preprocessing: Preprocessing, flips: Tensor) -> Tensor:
    """(B, h, w, C) -> float32 (B, C, h, w), for a mean per channel, which mirrored pixels have too."""
    scale, shift = 1 / (preprocessing.white * preprocessing.std), preprocessing.mean / preprocessing.std
    if (normalised := normalise_bytes(pixels, scale, shift, flips)) is not None:
        return normalised
    mirrored = [x.flip(1) if flip else x for x, flip in zip(pixels, flips.tolist(), strict=True)]
    return preprocessing.normalise(mirrored)


def rotate_images(x: Tensor, degrees: Tensor) -> Tensor:
    """float32 (B, C, h, w), each image rotated counter-clockwise about its centre by its angle (B,); bilinear, 0 outside."""
    h, w = x.shape[2:]
    cos, sin = torch.deg2rad(degrees).cos(), torch.deg2rad(degrees).sin()
    zero = torch.zeros_like(cos)
    rows = torch.stack([cos, -sin * h / w, zero, sin * w / h, cos, zero], 1)  # in coordinates from -1 to 1
    grid = F.affine_grid(rows.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False).contiguous(memory_format=torch.channels_last)


def _draw_rectangles(draws: StepDraws, size: tuple[int, int], share: float) -> Tensor:
    """Random erasing's rectangles in a `share` of the images; bool (B, h, w)."""
    h, w = size

    def draw_places(n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(3, n, 1, generator=generator).transpose(0, 1)

    def draw_tries(n: int, generator: torch.Generator) -> Tensor:
        return torch.rand(n, ERASING_TRIES, generator=generator)

    places, area_draws, ratio_draws = draws("erase", draw_places, draw_tries, draw_tries)
    chosen, y, x = places.unbind(1)  # (B, 1) each
    areas = h * w * (ERASED_AREA[0] + (ERASED_AREA[1] - ERASED_AREA[0]) * area_draws)
    low, high = (math.log(ratio) for ratio in ERASED_RATIO)
    ratios = torch.exp(low + (high - low) * ratio_draws)
    heights, widths = (areas * ratios).sqrt().round(), (areas / ratios).sqrt().round()
    fits = (heights < h) & (widths < w)
    first = fits.int().argmax(1, keepdim=True)  # the first try that fits, as in torchvision
    height, width = heights.gather(1, first), widths.gather(1, first)  # (B, 1)
    top, left = (y * (h - height + 1)).floor(), (x * (w - width + 1)).floor()
    rows, columns = torch.arange(h), torch.arange(w)
    in_rows, in_columns = (rows >= top) & (rows < top + height), (columns >= left) & (columns < left + width)
    chosen = fits.any(1, keepdim=True) & (chosen < share)
    erased: Tensor = in_rows[:, :, None] & in_columns[:, None] & chosen[:, :, None]
    return erased


def _source_rows(shifts: Tensor, flips: Tensor, size: tuple[int, ...], pad: int) -> Tensor:
    """For each output pixel, its row in the padded batch viewed as (B * H' * W', C); (B, h, w)."""
    h, w = size
    height, width = h + 2 * pad, w + 2 * pad
    device = flips.device
    columns = torch.arange(w, device=device).expand(len(flips), w)
    columns = torch.where(flips[:, None], w - 1 - columns, columns) + shifts[1][:, None]  # (B, w)
    rows = torch.arange(h, device=device) + shifts[0][:, None]  # (B, h)
    first = torch.arange(len(flips), device=device) * height * width
    return first[:, None, None] + rows[:, :, None] * width + columns[:, None, :]


def _gather_pixels(x: Tensor, rows: Tensor) -> Tensor:
    """(B, H', W', C) -> (B, h, w, C): one index_select over whole pixels, faster than B crops."""
    channels = x.shape[-1]
    return x.reshape(-1, channels).index_select(0, rows.flatten()).view(*rows.shape, channels)
