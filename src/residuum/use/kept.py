"""Engines that were built, kept beside the user's other caches, so that the next start takes them as they are.

`$XDG_CACHE_HOME/residuum/engines` (`~/.cache/residuum/engines`) holds files named by a hash over all that they follow from: the
network, its pictures, the request, the processor, the versions of whatever builds, and the code here. So nothing is ever out
of date, only unused; where all files take more than MOST bytes, those unused for longest go. A file begins with a digest of
the rest: what does not fit its own is built anew. It is written under another name first, so that a crash leaves no half of
one, and several processes at once keep the same. Where nothing can be written, nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residuum.errors import RunError
from residuum.models import fold, resnet
from residuum.models.bundle import Bundle
from residuum.nn import blocks, shortcuts
from residuum.records import write_atomically
from residuum.runtime import environment
from residuum.use import graphs, whole

MOST = 2_000_000_000  # bytes
DAY = 86_400  # seconds; a half-written file of that age is nobody's
BUILDERS = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
CODE = (fold, resnet, blocks, shortcuts, graphs, whole)  # modules that decide what is built, beside `engines`
DIGEST = 16  # bytes


@dataclass(frozen=True)
class Kept:
    """What is kept of one model and one request; names are words such as "choice"."""

    folder: Path
    key: str

    def get(self, name: str) -> bytes | None:
        """What was kept under a name, or None."""
        file = self.folder / f"{self.key}-{name}"
        try:
            content = file.read_bytes()
            os.utime(file)  # used now
        except OSError:
            return None
        whole = memoryview(content)[DIGEST:]
        return bytes(whole) if _digest(whole) == content[:DIGEST] else None

    def put(self, name: str, content: bytes) -> None:
        """Keeps something, if that is possible."""
        with contextlib.suppress(OSError, RunError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self.folder / f"{self.key}-{name}", _digest(content) + content)
            _tidy(self.folder)


def kept(bundle: Bundle, request: Mapping[str, Any], *pictures: Tensor | None) -> Kept:
    """The place of a model's engines for one request and the pictures that decide it, uint8 (n, h, w, C)."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    prepared = bundle.preprocessing
    about = {
        "request": dict(request),
        "model": [bundle.spec.to_json(), bundle.classes, prepared.to_json(), float(bundle.temperature)],
        "machine": [environment()["cpu"], torch.get_num_threads()],
        "versions": {name: _version(name) for name in BUILDERS},
    }
    digest.update(json.dumps(about, sort_keys=True).encode())
    for file in (*(str(module.__file__) for module in CODE), str(Path(__file__).with_name("engines.py"))):
        digest.update(Path(file).read_bytes())
    for name, tensor in sorted(bundle.net.state_dict().items()):
        digest.update(name.encode())
        _add(digest, tensor)
    for one in (prepared.mean, prepared.std, *pictures):
        if one is not None:
            _add(digest, one)
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Kept(Path(cache, "residuum", "engines"), digest.hexdigest())


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(str(tuple(tensor.shape)).encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _tidy(folder: Path) -> None:
    """Removes what is left of processes that were killed, and what was unused for longest where all is too much."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process tidies too
            state = file.stat()
            found.append((state.st_mtime, state.st_size, file))
    total = sum(size for _, size, _ in found)
    for used, size, file in sorted(found):
        if total > MOST or (file.name.endswith(".tmp") and used < time.time() - DAY):
            file.unlink(missing_ok=True)
            total -= size
