"""Reads weight files of other programs into a state dict with torchvision's names.

Nothing in a file is executed: PyTorch files are read with `torch.load(weights_only=True)`, NumPy files without pickles.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from resnetlab import migrate_v01
from resnetlab.errors import ModelFileError, UsageError
from resnetlab.formatting import format_list

SUFFIXES = (".pth", ".pt", ".th", ".tar", ".bin", ".ckpt", ".safetensors", ".npz")
MAGIC = (b"PK", b"\x80")  # first bytes of PyTorch files: a zip file, formerly a pickle
NESTED_KEYS = ("state_dict", "model", "net", "model_ema")  # keys of nested state dicts
AVERAGED = "n_averaged"  # counter of torch.optim.swa_utils.AveragedModel
PREFIXES = ("module.", "_orig_mod.", "backbone.")
RENAMED = {"linear": "fc", "classifier": "fc", "shortcut": "downsample"}
EXPORT_METADATA = {
    "specification": dict,
    "classes": list,
    "preprocessing": dict,
    "temperature": float,
    "calibration": dict,
    "data": dict,
    "fingerprints": dict,
}  # metadata that `resnetlab export` writes, and its types


@dataclass(frozen=True, eq=False)
class StateDictFile:
    """Weights with torchvision's names.

    Attributes:
        tensors: name -> value, floating point except for counters.
        metadata: written by `resnetlab export`; empty for other programs' files.
        caffe: whether the names were those of Caffe's layers.
        has_linear: whether the fully connected layer was called `linear`.
        notes: sentences on how the file's names were changed.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    caffe: bool = False
    has_linear: bool = False
    notes: tuple[str, ...] = ()


def read_state_dict(path: Path, key: str | None = None) -> StateDictFile:
    """Reads a weight file and converts its names to torchvision's.

    Args:
        key: which of several state dicts in the file to read, such as "model_ema".

    Raises:
        ModelFileError: the file is missing, empty, truncated, cannot be read without executing code, or has no weights.
        UsageError: `key` is not in the file, or the file has several state dicts and `key` is not given.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ModelFileError(f"{path} is a pipe or a device; give a weight file ({', '.join(SUFFIXES)}).")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; give a weight file ({', '.join(SUFFIXES)}).") from None
    except IsADirectoryError:
        raise ModelFileError(f"{path} is a folder; give a weight file in it ({', '.join(SUFFIXES)}).") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}).") from error
    if not content:
        raise ModelFileError(f"{path} is empty; download or copy it again.")
    if path.suffix == ".safetensors":
        value, metadata = _read_safetensors_bytes(path, content)
    elif path.suffix == ".npz":
        value, metadata = _read_npz(path, content), {}
    else:
        value, metadata = _read_torch(path, content)
    return parse_state_dict(value, str(path), key, metadata)


def _read_safetensors_bytes(path: Path, content: bytes) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        tensors = load_safetensors(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(
            f"{path} is not a complete safetensors file ({error}); download or copy it again."
        ) from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    entries = header.get("__metadata__", {})
    return tensors, _parse_metadata(path, entries.get("resnetlab-export"), entries.get(migrate_v01.EXPORT_KEY))


def _parse_metadata(path: Path, text: Any, old_text: Any) -> Mapping[str, Any]:
    """Parses the metadata of `resnetlab export` (`old_text`: of version 0.1); {} if there is none.

    Raises ModelFileError if it is incomplete.
    """
    if text is None and old_text is None:
        return {}
    try:
        value = json.loads(old_text if text is None else text)
    except (TypeError, ValueError):
        value = None
    metadata = value if isinstance(value, dict) else {}
    if text is None:
        metadata = migrate_v01.migrate_metadata(metadata)
    if not all(isinstance(metadata.get(key), kind) for key, kind in EXPORT_METADATA.items()):
        raise ModelFileError(
            f"{path} is marked as written by `resnetlab export`, but its metadata ({', '.join(EXPORT_METADATA)}) is "
            "incomplete; export the model again."
        )
    return metadata


def _read_npz(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        values = {name: arrays[name] for name in arrays.files} if isinstance(arrays, np.lib.npyio.NpzFile) else None
    except Exception as error:  # damaged files raise errors of zlib, zipfile, tokenize, struct and others
        if "Object arrays" in str(error):
            raise ModelFileError(
                f"{path} holds Python objects ({error}); reading it could execute code, so it is refused. Save plain arrays."
            ) from error
        raise ModelFileError(f"{path} is not a complete .npz file ({error}); download or copy it again.") from error
    if values is None:
        raise ModelFileError(f"{path} holds a single unnamed array (.npy); save all weights by name with numpy.savez.")
    tensors = {}
    for name, value in values.items():
        try:
            tensors[name] = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        except TypeError as error:
            raise ModelFileError(
                f"{path}: {name} is an array of {value.dtype}, which torch does not support; save the weights without it."
            ) from error
    return tensors


def _read_torch(path: Path, content: bytes) -> tuple[Any, Mapping[str, Any]]:
    if not content.startswith(MAGIC):
        raise ModelFileError(
            f"{path} is not a supported weight file ({', '.join(SUFFIXES)}); it begins with {content[:20]!r}."
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _find_forbidden_global(error) is None and path.suffix not in SUFFIXES:
            raise ModelFileError(f"{path} is not a supported weight file ({', '.join(SUFFIXES)}).") from error
        raise unsafe_pickle_error(str(path), error) from error
    except Exception as error:  # damaged files raise struct, assertion, lookup and other errors
        if "TorchScript" in str(error):
            raise ModelFileError(f"{path} is a TorchScript program, not weights; save only its state_dict.") from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"{path} is damaged or truncated ({reason}); download or copy it again.") from error
    if entry := _find_corrupt_entry(content):
        raise ModelFileError(f"{path} is damaged ({entry} does not match its checksum); download or copy it again.")
    metadata = getattr(value, "_metadata", None)
    entries = metadata if isinstance(metadata, Mapping) else {}
    return value, _parse_metadata(path, entries.get("resnetlab"), entries.get(migrate_v01.KEY))


def _find_corrupt_entry(content: bytes) -> str | None:
    """Finds the first entry of PyTorch's zip file with a wrong checksum; `torch.load` does not verify them."""
    if not content.startswith(MAGIC[0]):
        return None
    name = "its table of contents"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            for entry in archive.infolist():
                name = entry.filename
                if entry.CRC:  # 0: written without checksums (torch.serialization.set_crc32_options)
                    archive.read(entry)
    except Exception:  # of many kinds
        return name
    return None


def _find_forbidden_global(error: pickle.UnpicklingError) -> str | None:
    """Extracts from torch's message which global a pickle requires that tensors and plain values do not."""
    if match := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it requires {match[1]}"
    reason = re.search(r"Unsupported (?:global|operand|class)[^.\n]*", str(error))
    return reason[0].strip() if reason else None


def unsafe_pickle_error(where: str, error: pickle.UnpicklingError) -> ModelFileError:
    """The error for a pickle that `torch.load(weights_only=True)` refuses, with the reason."""
    why = f" ({reason})" if (reason := _find_forbidden_global(error)) else ""
    return ModelFileError(
        f"{where} holds more than tensors and plain values{why}; reading it could execute code, so it is refused. Save only "
        "the state_dict where it was made: torch.save(net.state_dict(), FILE)."
    )


def parse_state_dict(
    value: Any, where: str, key: str | None = None, metadata: Mapping[str, Any] | None = None
) -> StateDictFile:
    """Extracts the weights from any nesting of mappings and converts their names; see `read_state_dict`."""
    notes: list[str] = []
    tensors = _unwrap(value, where, key, notes)
    if odd := [name for name, tensor in tensors.items() if not _can_be_weight(tensor)]:
        kind = f"{tensors[odd[0]].layout} {tensors[odd[0]].dtype}".replace("torch.", "")
        raise ModelFileError(
            f"{where}: {format_list(odd, 4)} cannot be weights ({kind}); "
            "weights are dense floating point tensors: save the network before it is quantised or made sparse."
        )
    caffe = any(re.match(r"(res|bn|scale)\d[a-z]\d*_branch", name) for name in tensors)
    if caffe:
        from resnetlab.models.caffe_names import convert_caffe_names

        tensors = convert_caffe_names(tensors, where)
        notes.append(
            "Caffe's layer names; inputs changed from BGR to RGB, BN's statistics divided by their scale factor"
        )
    tensors, prefixes = _strip_prefixes(tensors)
    if prefixes:
        notes.append(f"without the prefix {', '.join(prefixes)}")
    renamed = {name: ".".join(RENAMED.get(part, part) for part in name.split(".")) for name in tensors}
    if changed := sorted({part for name in tensors for part in name.split(".") if part in RENAMED}):
        notes.append(", ".join(f"{part} is {RENAMED[part]}" for part in changed))
    if duplicates := len(renamed) - len(set(renamed.values())):
        raise ModelFileError(
            f"{where} has {duplicates} duplicate names without prefixes; save only one network's state_dict."
        )
    has_linear = any(name.split(".")[0] == "linear" for name in tensors)
    return StateDictFile({renamed[k]: v for k, v in tensors.items()}, metadata or {}, caffe, has_linear, tuple(notes))


def _can_be_weight(tensor: Tensor) -> bool:
    """Whether a tensor can be a weight: dense, real, floating point; counters and BN's factors may be integers."""
    usable = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return usable and (tensor.is_floating_point() or (tensor.numel() == 1 and not tensor.is_complex()))


def _unwrap(value: Any, where: str, key: str | None, notes: list[str]) -> dict[str, Tensor]:
    """Finds the mapping of names to tensors in `value`."""
    if isinstance(value, Mapping):
        nests = [name for name in NESTED_KEYS if isinstance(value.get(name), Mapping)]
        if key is not None:
            if not isinstance(value.get(key), Mapping):
                raise UsageError(
                    f"--key {key}: {where} has no weights under it; it has {', '.join(map(str, value))[:200]}."
                )
            return _unwrap(value[key], where, None, notes)
        if len(nests) > 1:
            raise UsageError(
                f"{where} has several sets of weights: {', '.join(nests)}; choose one with --key {nests[0]}."
            )
        if nests:
            notes.append(f"nested under {nests[0]}")
            return _unwrap(value[nests[0]], where, None, notes)
        if any(isinstance(each, Tensor) for each in value.values()):
            return _select_tensors(value, where, notes)
    raise ModelFileError(
        f"{where} has no state_dict: neither a mapping of names to tensors nor one under {', '.join(NESTED_KEYS)}; save only "
        "the state_dict."
    )


def _select_tensors(value: Mapping[Any, Any], where: str, notes: list[str]) -> dict[str, Tensor]:
    """Selects the tensors of a mapping; plain values such as epoch counters are ignored, with a note."""
    ignored = [name for name, each in value.items() if each is None or isinstance(each, int | float | str)]
    ignored += [name for name in (AVERAGED,) if name in value]
    tensors = {str(name): each for name, each in value.items() if name not in ignored}
    if odd := [name for name, each in tensors.items() if not isinstance(each, Tensor)]:
        raise ModelFileError(
            f"{where}: {odd[0]} among the weights is not a tensor but a {type(tensors[odd[0]]).__name__}; save only the "
            "state_dict."
        )
    if ignored:
        notes.append(f"ignored, not weights: {', '.join(map(str, ignored))}")
    return tensors


def _strip_prefixes(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    found: list[str] = []
    plain: dict[str, Tensor] = {}
    for name, value in tensors.items():
        while prefix := next((p for p in PREFIXES if name.startswith(p)), None):
            name = name.removeprefix(prefix)
            if prefix not in found:
                found.append(prefix)
        plain.setdefault(name, value)
    if len(plain) < len(tensors):
        raise ModelFileError(
            f"the file has {len(tensors) - len(plain)} duplicate names without {', '.join(found)}; save only one network."
        )
    # A network nested in another module has that module's attribute name as its prefix.
    stems = [name.removesuffix("conv1.weight") for name in plain if name.endswith(".conv1.weight")]
    outer = min(stems, key=len, default="")
    if outer and all(name.startswith(outer) for name in plain):
        return {name.removeprefix(outer): value for name, value in plain.items()}, [*found, outer]
    return plain, found
