"""The compiled kernels of `batchnorm.cpp`, `winograd.cpp` and `block.cpp`."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from resnetlab.compiled import CompiledLibrary, load_library

SOURCES = [Path(__file__).with_name(name) for name in ("batchnorm.cpp", "winograd.cpp", "block.cpp")]
HEADER = Path(__file__).with_name("registers.h")
PURPOSE = "fused BN and ReLU, Winograd's convolution"
DTYPES = ("float32", "bfloat16")  # of maps, at the end of the functions' names
_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FORWARD = (*[_POINTER] * 9, _SIZE, _SIZE, ctypes.c_float, ctypes.c_float, _FLAG, _FLAG)
_BACKWARD = (*[_POINTER] * 10, _SIZE, _SIZE, _FLAG, _FLAG)
_CONVOLUTION = (*[_POINTER] * 3, *[_SIZE] * 6)
_ITS_GRADIENTS = (*[_POINTER] * 5, *[_SIZE] * 6)
_BLOCK = (*[_POINTER] * 9, _FLAG)
_ITS_BACKWARD = (*[_POINTER] * 16,)


@functools.cache
def load_kernel() -> CompiledLibrary:
    """Loads the kernels from the cache, or builds them there."""
    kernel = load_library(PURPOSE, SOURCES, [HEADER])
    if kernel.library is not None:
        _declare(kernel.library)
    return kernel


def _declare(library: ctypes.CDLL) -> None:
    """Declares the arguments of its functions."""
    for dtype in DTYPES:
        for name, arguments in (("forward", _FORWARD), ("backward", _BACKWARD)):
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, None
        for name, arguments in (
            ("winograd_forward", _CONVOLUTION),
            ("winograd_backward", _ITS_GRADIENTS),
            ("block_forward", _BLOCK),
            ("block_backward", _ITS_BACKWARD),
        ):
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, ctypes.c_int
