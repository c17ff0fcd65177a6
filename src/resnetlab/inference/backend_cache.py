"""A cache of built backends, so that the next start loads them.

`$XDG_CACHE_HOME/resnetlab/backends` (`~/.cache/resnetlab/backends`) holds files named by a hash of everything that determines
them: the network, its images, the request, the processor, the versions of the packages, and the code. So entries never become
stale, only unused; when the cache exceeds MAX_BYTES, the least recently used are deleted. A file begins with a digest of its
name and the rest; damaged and renamed entries are built again. Files are written atomically, so crashes and several processes
at once do no harm. Programs in it are executed, so only files and folders are used that belong to this user and that no one
else may write. If the folder cannot be written, nothing is cached.
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

from resnetlab.device import environment
from resnetlab.errors import RunError
from resnetlab.inference import export_graphs, formats, inference_module, outputs, parity_check
from resnetlab.models import fold, resnet
from resnetlab.models.model_file import TrainedModel
from resnetlab.nn import blocks, shortcuts
from resnetlab.run_folder import cache_folder, is_private, write_atomically

MAX_BYTES = 2_000_000_000  # bytes
DAY = 86_400  # seconds; a temporary file of that age was left by a crash
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
# with `backends`, the modules that determine what is built
CODE = (fold, resnet, blocks, shortcuts, export_graphs, formats, inference_module, outputs, parity_check)
DIGEST_BYTES = 16


@dataclass(frozen=True)
class BackendCache:
    """The cached files of one model and one request; names are words such as "choice"."""

    folder: Path
    key: str

    def get(self, name: str) -> bytes | None:
        """Reads the entry of a name, or None."""
        file = self.folder / f"{self.key}-{name}"
        try:
            if not (is_private(self.folder) and is_private(file)):
                return None
            content = file.read_bytes()
            os.utime(file)  # marks it as used
        except OSError:
            return None
        data = memoryview(content)[DIGEST_BYTES:]
        return bytes(data) if _hash_entry(file.name, data) == content[:DIGEST_BYTES] else None

    def put(self, name: str, content: bytes) -> None:
        """Writes an entry, if possible."""
        with contextlib.suppress(OSError, RunError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if is_private(self.folder):
                file = self.folder / f"{self.key}-{name}"
                write_atomically(file, _hash_entry(file.name, content) + content)
                file.chmod(0o600)
                _evict(self.folder)


def open_cache(model: TrainedModel, request: Mapping[str, Any], *images: Tensor | None) -> BackendCache:
    """The cache of a model's backend for one request and the images that it depends on, uint8 (n, h, w, C)."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    preprocessing = model.preprocessing
    key = {
        "request": dict(request),
        "model": [model.net.spec.to_json(), model.classes, preprocessing.to_json(), float(model.temperature)],
        "multi_label": model.multi_label,
        "machine": [environment()["cpu"], torch.get_num_threads()],
        "versions": {name: _get_version(name) for name in PACKAGES},
    }
    digest.update(json.dumps(key, sort_keys=True).encode())
    for file in (*(str(module.__file__) for module in CODE), str(Path(__file__).with_name("backends.py"))):
        digest.update(Path(file).read_bytes())
    for name, tensor in sorted(model.net.state_dict().items()):
        digest.update(name.encode())
        _update_hash(digest, tensor)
    for tensors in (preprocessing.mean, preprocessing.std, *images):
        if tensors is not None:
            _update_hash(digest, tensors)
    return BackendCache(cache_folder("backends"), digest.hexdigest())


def _update_hash(digest: Any, tensor: Tensor) -> None:
    digest.update(str(tuple(tensor.shape)).encode())
    digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _hash_entry(name: str, content: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(name.encode(), digest_size=DIGEST_BYTES)
    digest.update(content)
    return digest.digest()


def _get_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _evict(folder: Path) -> None:
    """Deletes temporary files of killed processes, and the least recently used files beyond MAX_BYTES."""
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            status = file.stat()
            found.append((status.st_mtime, status.st_size, file))
    total = sum(size for _, size, _ in found)
    for used, size, file in sorted(found):
        if total > MAX_BYTES or (file.name.endswith(".tmp") and used < time.time() - DAY):
            file.unlink(missing_ok=True)
            total -= size
