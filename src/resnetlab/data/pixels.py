"""Training's pixels, resized and normalised to torch's bits by code for processors with AVX-512 for bytes (`pixels.cpp`)."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.compiled import CompiledLibrary, load_library
from resnetlab.preprocessing import Preprocessing, round_to_bytes

SOURCE = Path(__file__).with_suffix(".cpp")
PURPOSE = "resizing and normalising training's photographs"


def resize_crop(crop: Tensor, size: int) -> Tensor:
    """uint8 or float32 (h, w, C) -> the same type (size, size, C): antialiased, bilinear."""
    if crop.shape[:2] == (size, size):
        return crop
    height, width = crop.shape[:2]
    if _is_rgb_here(crop) and crop.stride()[1:] == (3, 1) and (library := load_pixel_kernels().library) is not None:
        resized = torch.empty(size, size, 3, dtype=torch.uint8)
        if library.resize_pixels(crop.data_ptr(), crop.stride(0), height, width, size, resized.data_ptr()):
            return resized
    return _resize_by_torch(crop, size)


def normalise_and_flip(pixels: Tensor, preprocessing: Preprocessing, flips: Tensor) -> Tensor:
    """uint8 or float32 (B, h, w, C) on a CPU -> float32 (B, C, h, w), channels last, mirrored where `flips` (B,) is true.

    For a mean per channel, which mirrored pixels have too.
    """
    if _is_rgb_here(pixels) and pixels.is_contiguous() and (library := load_pixel_kernels().library) is not None:
        b, h, w, _ = pixels.shape
        scale, shift = 1 / (preprocessing.white * preprocessing.std), preprocessing.mean / preprocessing.std
        x = torch.empty(b, h, w, 3)
        pointers = (v.data_ptr() for v in (flips, scale, shift, x))
        library.normalise_pixels(pixels.data_ptr(), b, h, w, *pointers)
        return x.permute(0, 3, 1, 2)
    mirrored = [x.flip(1) if flip else x for x, flip in zip(pixels, flips.tolist(), strict=True)]
    return preprocessing.normalise(mirrored)


@functools.cache
def load_pixel_kernels() -> CompiledLibrary:
    """Loads the functions from the cache, or builds them there; they are used only if their results are torch's."""
    kernels = load_library(PURPOSE, [SOURCE])
    if (library := kernels.library) is None:
        return kernels
    if not library.has_pixel_kernels():
        return kernels._replace(library=None, reason="this processor has no AVX-512 for bytes (VBMI)")
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    library.resize_pixels.argtypes = (pointer, size, size, size, size, pointer)
    library.normalise_pixels.argtypes = (pointer, size, size, size, *[pointer] * 4)
    library.normalise_pixels.restype = None
    crop = torch.randint(256, (67, 83, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized = torch.empty(48, 48, 3, dtype=torch.uint8)
    library.resize_pixels(crop.data_ptr(), crop.stride(0), 67, 83, 48, resized.data_ptr())
    if not torch.equal(resized, _resize_by_torch(crop, 48)):
        return kernels._replace(library=None, reason="torch resizes in another way here")
    return kernels


def _is_rgb_here(pixels: Tensor) -> bool:
    """Whether they are bytes of three channels in this process's memory."""
    return pixels.dtype == torch.uint8 and pixels.shape[-1] == 3 and pixels.device.type == "cpu"


def _resize_by_torch(crop: Tensor, size: int) -> Tensor:
    x = crop[None].permute(0, 3, 1, 2)  # a view: its memory stays channels last
    on_cpu = x.device.type == "cpu"  # where torch resizes bytes themselves
    x = x if on_cpu else x.float()
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return (x if on_cpu else round_to_bytes(x)).permute(0, 2, 3, 1)[0]
