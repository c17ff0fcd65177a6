"""TrivialAugment, wide (Müller & Hutter 2021, arXiv 2103.10158): one random operation of random strength per image.

The operations, their ranges and their 31 strengths are those of torchvision's TrivialAugmentWide, which makes the same calls
on Pillow images; here the random numbers are arguments, so that they can be a function of (seed, step, position).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from resnetlab.preprocessing import tensor_to_pil

NUM_DRAWS = 3  # random numbers per image: which operation, how strong, which sign
STRENGTHS = 31
PILImage = Image.Image


def _affine(image: PILImage, *matrix: float) -> PILImage:
    """Moves the pixel at (ax + by + c, dx + ey + f) to (x, y), for the matrix (a, …, f); black beyond the edges."""
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST)


# name: (operation, largest strength, whether half of the images get the negative strength); strengths rise evenly from 0.
# Posterize drops bits, solarize inverts the levels from 255 down.
OPERATIONS: dict[str, tuple[Callable[[PILImage, float], PILImage], float, bool]] = {
    "identity": (lambda image, _: image, 0, False),
    "shear x": (lambda image, v: _affine(image, 1, v, 0, 0, 1, 0), 0.99, True),
    "shear y": (lambda image, v: _affine(image, 1, 0, 0, v, 1, 0), 0.99, True),
    "translate x": (lambda image, v: _affine(image, 1, 0, -int(v), 0, 1, 0), 32, True),
    "translate y": (lambda image, v: _affine(image, 1, 0, 0, 0, 1, -int(v)), 32, True),
    "rotate": (lambda image, v: image.rotate(v, Image.Resampling.NEAREST), 135, True),  # degrees
    "brightness": (lambda image, v: ImageEnhance.Brightness(image).enhance(1 + v), 0.99, True),
    "saturation": (lambda image, v: ImageEnhance.Color(image).enhance(1 + v), 0.99, True),
    "contrast": (lambda image, v: ImageEnhance.Contrast(image).enhance(1 + v), 0.99, True),
    "sharpness": (lambda image, v: ImageEnhance.Sharpness(image).enhance(1 + v), 0.99, True),
    "posterize": (lambda image, v: ImageOps.posterize(image, 8 - round(v)), 6, False),
    "solarize": (lambda image, v: ImageOps.solarize(image, 255 - v), 255, False),  # type: ignore[arg-type]
    "autocontrast": (lambda image, _: ImageOps.autocontrast(image), 0, False),
    "equalize": (lambda image, _: ImageOps.equalize(image), 0, False),
}


def trivial_augment(pixels: Tensor, draws: Sequence[float]) -> Tensor:
    """Applies one operation, uint8 (h, w, C) -> the same shape; `draws` are NUM_DRAWS numbers in [0, 1)."""
    which, strength, sign = draws
    operation, largest, signed = list(OPERATIONS.values())[int(which * len(OPERATIONS))]
    v = largest * int(strength * STRENGTHS) / (STRENGTHS - 1)
    changed = operation(tensor_to_pil(pixels), -v if signed and sign < 0.5 else v)
    return torch.from_numpy(np.array(changed)).view(pixels.shape)
