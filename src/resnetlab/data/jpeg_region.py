"""The part of a JPEG that a crop shows, without decoding the rest, by the libjpeg-turbo of this machine (`jpeg_region.cpp`).

It gives the pixels that Pillow and simplejpeg give; neither can do this. It needs a C++ compiler and libjpeg's header; without
them whole images are decoded. Damage below the part is not seen, and does not change its pixels.
"""

from __future__ import annotations

import ctypes
import functools
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from resnetlab.compiled import CompiledLibrary, load_library
from resnetlab.data.decode import read_plain_size

Box = tuple[int, int, int, int]  # top, left, height, width in pixels
ChooseBox = Callable[[int, int], Box]  # from an image's height and width

SOURCE = Path(__file__).with_suffix(".cpp")
PURPOSE = "decoding only what a crop of a JPEG shows"
NO_HEADER = "libjpeg-turbo's header is missing (on Debian and Ubuntu: apt install libjpeg-dev)"


def cut_out(pixels: Tensor, choose_box: ChooseBox) -> Tensor:
    """(H, W, C) -> (h, w, C), a view."""
    top, left, h, w = choose_box(pixels.shape[0], pixels.shape[1])
    return pixels[top : top + h, left : left + w]


def decode_region(content: bytes, choose_box: ChooseBox) -> Tensor | None:
    """Part of a JPEG, uint8 (h, w, 3); None for other files and damaged ones, and where the decoder is missing."""
    library = load_region_decoder().library
    if library is None or (size := read_plain_size(content)) is None:
        return None
    top, left, h, w = choose_box(*size)
    pixels = torch.empty(h, w, 3, dtype=torch.uint8)
    read = library.decode_jpeg_region(content, len(content), top, left, h, w, pixels.data_ptr())
    return pixels if read else None


@functools.cache
def load_region_decoder() -> CompiledLibrary:
    """Loads the decoder from the cache, or builds it there; it is used only if it gives Pillow's pixels."""
    options = ["-ljpeg"]
    if Path(sys.prefix, "include", "jpeglib.h").is_file():  # of a conda environment
        lib = Path(sys.prefix, "lib")
        options = [f"-I{Path(sys.prefix, 'include')}", f"-L{lib}", f"-Wl,-rpath,{lib}", *options]
    decoder = load_library(PURPOSE, [SOURCE], options=options)
    if decoder.library is None:
        return decoder._replace(reason=NO_HEADER) if "jpeglib.h" in decoder.reason else decoder
    function = decoder.library.decode_jpeg_region
    size = ctypes.c_int64
    function.argtypes = (ctypes.c_char_p, size, size, size, size, size, ctypes.c_void_p)
    function.restype = ctypes.c_int
    if not all(_gives_the_same(function, subsampling) for subsampling in range(3)):
        return decoder._replace(library=None, reason="this machine's libjpeg gives other pixels than Pillow's")
    return decoder


def _gives_the_same(function: Callable[..., int], subsampling: int) -> bool:
    """Whether a part of a small JPEG has Pillow's pixels; `subsampling` of its colours as Pillow counts them."""
    noise, file = np.random.default_rng(0).integers(256, size=(80, 96, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(noise).save(file, "JPEG", quality=90, subsampling=subsampling)
    content, part = file.getvalue(), np.empty((40, 50, 3), np.uint8)
    with Image.open(file) as image:
        expected = np.asarray(image)[33:73, 37:87]
    read = function(content, len(content), 33, 37, 40, 50, part.ctypes.data)
    return bool(read) and np.array_equal(part, expected)
