"""Photographs resized and normalised by code for processors with AVX-512 for bytes (`pixels.cpp`), to Pillow's or torch's bits.

Callers take Pillow or torch where a function here gives None: the processor or the compiler is missing, or the case is rare.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from resnetlab.compiled import CompiledLibrary, load_library

SOURCE = Path(__file__).with_suffix(".cpp")
PURPOSE = "resizing and normalising photographs"
METHODS = (
    "torch",
    "bilinear",
    "bicubic",
)  # torch's antialiased bilinear, and two of Pillow's; numbered as in the source
CHECKED = (((67, 83), (48, 60)), ((100, 62), (62, 42)), ((40, 50), (61, 77)))  # sizes before and after

WIDEST = {"torch": 3.2, "bilinear": 3.2, "bicubic": 2.4}  # reduction of the width for which 64 bytes of a row suffice

Part = tuple[int, int, int, int]  # top, left, height, width


def is_resized_here(method: str, before: tuple[int, int], after: tuple[int, int]) -> bool:
    """Whether `resize_bytes` takes an image of these heights and widths."""
    (height, width), (h, w) = before, after
    # Pillow 13 resizes the columns first of an image whose height is reduced by more than twice as many pixels as its width.
    rows_first = method == "torch" or height - h <= max(0, 2 * (width - w))
    return rows_first and before != after and width <= WIDEST[method] * w and load_pixel_kernels().library is not None


def resize_bytes(method: str, pixels: Tensor, size: tuple[int, int], part: Part | None = None) -> Tensor | None:
    """uint8 (H, W, 3) resized to `size` (h, w), of which `part` is computed, or all: uint8 (height, width, 3).

    Args:
        method: one of METHODS.
    """
    before = (pixels.shape[0], pixels.shape[1])
    if not _is_rgb_here(pixels) or pixels.stride()[1:] != (3, 1) or not is_resized_here(method, before, size):
        return None
    return _run(load_pixel_kernels().library, method, pixels, size, part or (0, 0, *size))


def normalise_bytes(pixels: Tensor, scale: Tensor, shift: Tensor, flips: Tensor) -> Tensor | None:
    """uint8 (B, h, w, 3) -> float32 (B, 3, h, w), channels last: value * scale - shift by channel, mirrored at `flips` (B,)."""
    if not _is_rgb_here(pixels) or not pixels.is_contiguous() or (library := load_pixel_kernels().library) is None:
        return None
    b, h, w, _ = pixels.shape
    x = torch.empty(b, h, w, 3)
    library.normalise_pixels(pixels.data_ptr(), b, h, w, *(v.data_ptr() for v in (flips, scale, shift, x)))
    return x.permute(0, 3, 1, 2)


@functools.cache
def load_pixel_kernels() -> CompiledLibrary:
    """Loads the functions from the cache, or builds them there; they are used only if they resize as torch and Pillow do."""
    kernels = load_library(PURPOSE, [SOURCE])
    if (library := kernels.library) is None:
        return kernels
    if not library.has_pixel_kernels():
        return kernels._replace(library=None, reason="this processor has no AVX-512 for bytes (VBMI)")
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.resize_pixels.argtypes = (ctypes.c_int, pointer, size, *[pointer] * 4)
    library.normalise_pixels.argtypes = (pointer, size, size, size, *[pointer] * 4)
    library.normalise_pixels.restype = None
    generator = torch.Generator().manual_seed(0)
    for before, after in CHECKED:
        image = torch.randint(256, (*before, 3), dtype=torch.uint8, generator=generator)
        for method in METHODS:
            ours = _run(library, method, image, after, (0, 0, *after))
            if ours is None or not torch.equal(ours, _resize_slowly(method, image, after)):
                which = "torch" if method == "torch" else "Pillow"
                return kernels._replace(library=None, reason=f"{which} resizes in another way here")
    return kernels


def _run(library: Any, method: str, pixels: Tensor, size: tuple[int, int], part: Part) -> Tensor | None:
    out = torch.empty(*part[2:], 3, dtype=torch.uint8)
    before, after, inside = ((ctypes.c_int64 * len(x))(*x) for x in (pixels.shape[:2], size, part))
    arguments = (pixels.data_ptr(), pixels.stride(0), before, after, inside, out.data_ptr())
    return out if library.resize_pixels(METHODS.index(method), *arguments) else None


def _resize_slowly(method: str, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """What the library has to give: the whole image by torch or Pillow."""
    if method == "torch":
        x = F.interpolate(pixels.permute(2, 0, 1)[None], size, mode="bilinear", antialias=True)
        return x[0].permute(1, 2, 0)
    resized = Image.fromarray(pixels.numpy()).resize(size[::-1], Image.Resampling[method.upper()])
    return torch.from_numpy(np.array(resized))


def _is_rgb_here(pixels: Tensor) -> bool:
    """Whether they are bytes of three channels in this process's memory."""
    return pixels.dtype == torch.uint8 and pixels.shape[-1] == 3 and pixels.device.type == "cpu"
