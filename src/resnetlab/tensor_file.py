"""The file format of models and checkpoints: safetensors with JSON metadata and one digest of everything.

The metadata of the header has two entries. "resnetlab" is a JSON object with the number of the format; "digest" is a hash of
that text and of the name, dtype, shape and bytes of every tensor, so a changed bit is detected wherever it is. Equal contents
give equal bytes: nothing depends on the clock. Files of version 0.1 are read through `migrate_v01`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from resnetlab import migrate_v01
from resnetlab.errors import ModelFileError, UsageError, suggest_path, warn
from resnetlab.formatting import parse_json
from resnetlab.run_folder import write_atomically

FORMAT = 2  # 1 was that of version 0.1
KEY = "resnetlab"


def check_model_name(path: Path) -> None:
    """Raises UsageError for a model file that is to be called as weight files of torch are, which nothing would open then."""
    if path.suffix.lower() in (".pt", ".pth", ".th", ".bin", ".ckpt", ".onnx", ".pt2"):
        raise UsageError(
            f"a model file is in safetensors' format: call it {path.with_suffix('.safetensors').name}; for other programs "
            f"there is `resnetlab export`, in Python model.export({path.name!r})."
        )


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors and JSON metadata atomically, with their digest."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT} | dict(metadata), allow_nan=False)
    raw = save_tensors(tensors)
    start = 8 + int.from_bytes(raw[:8], "little")
    # the library would write the entries of the metadata in a random order
    entries = {KEY: text, "digest": _compute_digest(text, tensors)}
    header = json.dumps({"__metadata__": entries} | json.loads(raw[8:start]), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    write_atomically(path, b"".join((len(header).to_bytes(8, "little"), header, memoryview(raw)[start:])))


def _compute_digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Hashes the metadata's text and the names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.blake2b(digest_size=16)
    layout = json.dumps([[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in sorted(tensors.items())])
    for part in (text.encode(), layout.encode()):
        digest.update(len(part).to_bytes(8, "little") + part)
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensor_file(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the metadata; those of version 0.1 under today's names, with "format" 1.

    Args:
        what: "model file" or "checkpoint", for messages.

    Raises:
        ModelFileError: the file is missing, a folder, empty, truncated, damaged, not ours or of a newer version.
    """
    raw = read_file(path, f"the {what}", f"`resnetlab train` writes a {what} into its run folder.")
    try:
        tensors = load_tensors(raw)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        if path.suffix.lower() not in ("", ".safetensors"):
            raise ModelFileError(
                f"{path} is not a {what} in safetensors' format; give one, or a run's folder."
            ) from error
        raise ModelFileError(f"{path} is not a complete safetensors file ({error}); copy or train it again.") from error
    entries = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__", {})
    if migrate_v01.KEY in entries and KEY not in entries:
        metadata = migrate_v01.read_metadata(entries[migrate_v01.KEY], tensors)
    elif KEY in entries:
        metadata = _check_metadata(path, entries, tensors)
    else:
        raise ModelFileError(f"{path} contains tensors but no resnetlab {what}: it was made by other software.")
    if metadata is None:
        raise ModelFileError(f"{path} is damaged: its contents do not match its digest; copy or train it again.")
    if metadata["format"] != FORMAT and what == "model file":
        warn(
            f"{path} was written by version 0.1: its digest protects its tensors, but not its classes, preprocessing and "
            "other metadata."
        )
    return tensors, metadata


def _check_metadata(path: Path, entries: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The metadata of a file of today's format; None if the digest is wrong."""
    try:
        metadata = parse_json(entries[KEY])
    except ValueError:
        return None
    if not isinstance(metadata, dict):
        return None
    if (version := metadata.get("format")) != FORMAT:
        raise ModelFileError(f"{path} has format {version}, this version reads {FORMAT}; update resnetlab.")
    return metadata if entries.get("digest") == _compute_digest(entries[KEY], tensors) else None


def read_file(path: Path, wanted: str, origin: str = "") -> bytes:
    """A file's content; raises ModelFileError if it is missing, empty, a folder or a pipe, or cannot be read.

    Args:
        wanted: what to give, for messages.
        origin: where a missing file comes from; by default the message says what to give.
    """
    if path.is_dir():
        inside = path / "model.safetensors"
        hint = f"did you mean {inside}?" if inside.is_file() else f"give {wanted}, not its folder."
        raise ModelFileError(f"{path} is a folder; {hint}")
    if path.exists() and not path.is_file():
        raise ModelFileError(f"{path} is a pipe or a device; give {wanted}.")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        hint = suggest_path(path) or f"; {origin or f'give {wanted}.'}"
        if (run := Path("runs", path)).is_dir():
            hint = f"; did you mean {str(run)!r}?"
        elif len(path.parts) == 2 and not path.suffix and not path.parent.exists():
            hint += f" A model of the Hugging Face hub is 'hf:{path.as_posix()}'."
        raise ModelFileError(f"{path} does not exist{hint}") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}).") from error
    if not content:
        raise ModelFileError(f"{path} is empty; copy it again.")
    return content


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, unchecked; empty where the file has none or cannot be read."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
        metadata = parse_json(entries.get(KEY) or entries.get(migrate_v01.KEY) or "{}")
    except (OSError, safetensors.SafetensorError, ValueError):
        return {}
    return metadata if isinstance(metadata, dict) else {}
