"""C++ of this package, compiled once on the machine that runs it.

`$XDG_CACHE_HOME/resnetlab/kernels` (`~/.cache/resnetlab/kernels`) holds libraries named by a hash of everything that determines
them (source, compiler and its flags, processor) and by a digest of their content. A library is loaded only if nobody else can
have written it and the digest is right; otherwise it is built again. A library is plain C, called through ctypes: it needs no
headers of torch, and Python's lock is free while it computes.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from resnetlab.run_folder import cache_folder, is_private

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


class CompiledLibrary(NamedTuple):
    """The library, or None and the reason; and a name for what was built, for the records of a run."""

    library: ctypes.CDLL | None
    name: str
    reason: str = ""
    purpose: str = ""

    def __str__(self) -> str:
        """One line for people."""
        if self.library is None:
            return f"{self.purpose}: not used, since {self.reason}"
        return f"{self.purpose}: compiled for this processor"


def load_library(
    purpose: str, sources: Sequence[Path], headers: Sequence[Path] = (), options: Sequence[str] = ()
) -> CompiledLibrary:
    """Loads the library of these sources from the cache, or builds it there.

    Args:
        purpose: what it computes, for people.
        headers: other files that the sources include.
        options: of the compiler, after the sources: folders and libraries to link.
    """
    compiler = find_compiler()
    if compiler is None:
        return CompiledLibrary(None, "", "there is no C++ compiler (install g++)", purpose)
    folder = cache_folder("kernels")
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT
        ).stdout
        contents = [file.read_bytes() for file in (*sources, *headers)]
        key = _hash(*contents, "\n".join((compiler, version, *FLAGS, *options, describe_processor())).encode())
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        command = [compiler, *FLAGS, *map(str, sources), *options]
        file = _find(folder, key)
        try:
            library = ctypes.CDLL(str(file)) if file else None
        except OSError:  # a library that it was linked with has changed
            file = None
        if file is None:
            file = _compile(folder, key, command)
            library = ctypes.CDLL(str(file))
        return CompiledLibrary(library, f"{version.splitlines()[0]}, {file.stem}", "", purpose)
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines() or [f"exit code {error.returncode}"]
        return CompiledLibrary(None, "", f"{compiler} failed ({lines[0][:200]})", purpose)
    except (OSError, subprocess.TimeoutExpired) as error:
        return CompiledLibrary(None, "", f"it cannot be built or loaded ({error})", purpose)


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


def _compile(folder: Path, key: str, command: list[str]) -> Path:
    """Compiles the library and moves it into the cache, where several processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary, "library.so")
        subprocess.run([*command, "-o", str(built)], capture_output=True, text=True, check=True, timeout=TIMEOUT)
        built.chmod(0o700)
        library = folder / f"{key}-{_hash(built.read_bytes())}.so"
        os.replace(built, library)
    return library


def _hash(*contents: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for content in contents:
        digest.update(content)
    return digest.hexdigest()
