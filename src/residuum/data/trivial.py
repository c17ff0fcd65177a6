"""TrivialAugment, wide (Müller & Hutter 2021, arXiv 2103.10158): one random change of random strength a picture.

The operations, their ranges and their 31 strengths are those of torchvision's TrivialAugmentWide, which makes the same calls
on Pillow's pictures; here the draws are given, so that they can be a function of (seed, step, position).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from residuum.preprocessing import picture_of

DRAWS = 3  # random numbers for one picture: which operation, how strong, which sign
STRENGTHS = 31
Picture = Image.Image


def _moved(picture: Picture, a: float, b: float, c: float, d: float, e: float, f: float) -> Picture:
    """Every pixel (x, y) shows what was at (ax + by + c, dx + ey + f), from pixel centres; black beyond the edges."""
    return picture.transform(picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.NEAREST)


def _shear_x(picture: Picture, v: float) -> Picture:
    return _moved(picture, 1, v, 0, 0, 1, 0)


def _shear_y(picture: Picture, v: float) -> Picture:
    return _moved(picture, 1, 0, 0, v, 1, 0)


def _translate_x(picture: Picture, v: float) -> Picture:
    return _moved(picture, 1, 0, -int(v), 0, 1, 0)


def _translate_y(picture: Picture, v: float) -> Picture:
    return _moved(picture, 1, 0, 0, 0, 1, -int(v))


def _posterize(picture: Picture, v: float) -> Picture:
    return ImageOps.posterize(picture, 8 - round(v))


def _solarize(picture: Picture, v: float) -> Picture:
    return ImageOps.solarize(picture, 255 - v)  # type: ignore[arg-type]  # a threshold between levels is one


# name: (what it does, strength at its largest, whether half of the pictures get the opposite); strengths rise evenly from 0
OPERATIONS: dict[str, tuple[Callable[[Picture, float], Picture], float, bool]] = {
    "identity": (lambda picture, _: picture, 0, False),
    "shear x": (_shear_x, 0.99, True),
    "shear y": (_shear_y, 0.99, True),
    "translate x": (_translate_x, 32, True),
    "translate y": (_translate_y, 32, True),
    "rotate": (lambda picture, v: picture.rotate(v, Image.Resampling.NEAREST), 135, True),  # degrees
    "brightness": (lambda picture, v: ImageEnhance.Brightness(picture).enhance(1 + v), 0.99, True),
    "saturation": (lambda picture, v: ImageEnhance.Color(picture).enhance(1 + v), 0.99, True),
    "contrast": (lambda picture, v: ImageEnhance.Contrast(picture).enhance(1 + v), 0.99, True),
    "sharpness": (lambda picture, v: ImageEnhance.Sharpness(picture).enhance(1 + v), 0.99, True),
    "posterize": (_posterize, 6, False),  # bits that are dropped
    "solarize": (_solarize, 255, False),  # levels from 255 down that are inverted
    "autocontrast": (lambda picture, _: ImageOps.autocontrast(picture), 0, False),
    "equalize": (lambda picture, _: ImageOps.equalize(picture), 0, False),
}


def trivial_augment(pixels: Tensor, draws: Sequence[float]) -> Tensor:
    """uint8 (h, w, C) -> the same shape, changed once; `draws` are DRAWS numbers in [0, 1)."""
    which, strength, sign = draws
    change, most, both_ways = list(OPERATIONS.values())[int(which * len(OPERATIONS))]
    v = most * int(strength * STRENGTHS) / (STRENGTHS - 1)
    changed = change(picture_of(pixels), -v if both_ways and sign < 0.5 else v)
    return torch.from_numpy(np.array(changed)).view(pixels.shape)
