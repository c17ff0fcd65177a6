"""The compiled kernels of `batchnorm.cpp` and `winograd.cpp`, built once where there is a C++ compiler.

`$XDG_CACHE_HOME/resnetlab/kernels` (`~/.cache/resnetlab/kernels`) holds libraries named by a hash of everything that determines
them (source, compiler and its flags, processor) and by a digest of their content. A library is loaded only if nobody else can
have written it and the digest is right; otherwise it is built again. The library is plain C, called through ctypes: it needs no
headers of torch, and Python's lock is free while it computes.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from resnetlab.run_folder import cache_folder, is_private

SOURCES = [Path(__file__).with_name(name) for name in ("batchnorm.cpp", "winograd.cpp")]
HEADER = Path(__file__).with_name("registers.h")
DTYPES = ("float32", "bfloat16")  # of maps, at the end of the functions' names
FLAGS = (
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-march=native",
    "-std=gnu++17",
    "-pthread",
    "-shared",
    "-fPIC",
)
TIMEOUT = 300  # seconds, for the compiler
_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_FORWARD = (*[_POINTER] * 9, _SIZE, _SIZE, ctypes.c_float, ctypes.c_float, _FLAG, _FLAG)
_BACKWARD = (*[_POINTER] * 10, _SIZE, _SIZE, _FLAG, _FLAG)
_CONVOLUTION = (*[_POINTER] * 3, *[_SIZE] * 6)
_ITS_GRADIENTS = (*[_POINTER] * 5, *[_SIZE] * 6)


class Kernel(NamedTuple):
    """The library, or None and the reason; and a name for what was built, for the records of a run."""

    library: ctypes.CDLL | None
    name: str
    reason: str = ""

    def __str__(self) -> str:
        """One line for people."""
        if self.library is None:
            return f"fused BN and ReLU, Winograd's convolution: not used, since {self.reason}"
        return "fused BN and ReLU, Winograd's convolution: compiled for this processor"


@functools.cache
def load_kernel() -> Kernel:
    """Loads the kernel from the cache, or builds it there."""
    compiler = find_compiler()
    if compiler is None:
        return Kernel(None, "", "there is no C++ compiler (install g++)")
    folder = cache_folder("kernels")
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT
        ).stdout
        sources = [source.read_bytes() for source in (*SOURCES, HEADER)]
        key = _hash(*sources, "\n".join((compiler, version, *FLAGS, describe_processor())).encode())
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = _find(folder, key) or _compile_library(folder, key, compiler)
        return Kernel(_declare(ctypes.CDLL(str(library))), f"{version.splitlines()[0]}, {library.stem}")
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or [f"exit code {error.returncode}"]
        return Kernel(None, "", f"{compiler} failed ({lines[0][:200]})")
    except (OSError, subprocess.TimeoutExpired, AttributeError) as error:
        return Kernel(None, "", f"it cannot be built or loaded ({error})")


def find_compiler() -> str | None:
    """The C++ compiler, if there is one that takes the flags."""
    if os.name != "posix":
        return None
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++"))), None)


def describe_processor() -> str:
    """Model and instructions of the processor, which a library built for it depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.platform()}"
    return "\n".join(
        sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _find(folder: Path, key: str) -> Path | None:
    """The cached library; None if there is none, others may have written it, or it is damaged."""
    if not is_private(folder):
        raise PermissionError(f"{folder} can be written by others; take the permission away: chmod go-w {folder}")
    for file in folder.glob(f"{key}-*.so"):
        if is_private(file) and file.stem == f"{key}-{_hash(file.read_bytes())}":
            return file
    return None


def _compile_library(folder: Path, key: str, compiler: str) -> Path:
    """Compiles the library and moves it into the cache, where several processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary, "kernel.so")
        command = [compiler, *FLAGS, "-o", str(built), *map(str, SOURCES)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT)
        built.chmod(0o700)
        library = folder / f"{key}-{_hash(built.read_bytes())}.so"
        os.replace(built, library)
    return library


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """Declares the arguments of its functions."""
    for dtype in DTYPES:
        for name, arguments in (("forward", _FORWARD), ("backward", _BACKWARD)):
            function = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = arguments, None
        for name, arguments in (("forward", _CONVOLUTION), ("backward", _ITS_GRADIENTS)):
            function = getattr(library, f"winograd_{name}_{dtype}")
            function.argtypes, function.restype = arguments, ctypes.c_int
    return library


def _hash(*contents: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()
