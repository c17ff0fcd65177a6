"""Reads weight files of other programs: PyTorch's, safetensors and NumPy's, also sharded.

Nothing in a file is executed: PyTorch files are read with `torch.load(weights_only=True)`, NumPy files without pickles. What a
checkpoint holds beside tensors and plain values, such as argparse's options, becomes an `Inert` object: no class of it is
imported, no function called.
"""

from __future__ import annotations

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from resnetlab import migrate_v01, tensor_file
from resnetlab.errors import ModelFileError, UsageError, first_line
from resnetlab.formatting import format_list, parse_json

SUFFIXES = (".pth", ".pt", ".th", ".tar", ".bin", ".ckpt", ".safetensors", ".npz", ".index.json")
WANTED = f"a supported weight file ({', '.join(SUFFIXES)})"
NPZ_MAGIC = (b"PK", b"\x93NUMPY")  # a zip file, or the single array of an .npy
MAGIC = (b"PK", b"\x80")  # first bytes of PyTorch files: a zip file, formerly a pickle
# what others call their classes: names in the order of the outputs, or a mapping of names and outputs
CLASS_KEYS = (
    "classes", "class_names", "class_to_idx", "idx_to_class", "label2id", "id2label", "names", "categories", "labels"
)  # fmt: skip
EXPORT_METADATA = {
    "specification": dict,
    "classes": list,
    "preprocessing": dict,
    "temperature": float,
    "calibration": dict,
    "data": dict,
    "fingerprints": dict,
}  # metadata that `resnetlab export` writes, and its types
# A file that requires one of these wants code executed. Other modules' names become `Inert`; torch itself refuses os and sys.
REFUSED_MODULES = (
    "builtins", "subprocess", "importlib", "runpy", "operator", "shutil", "socket", "ctypes", "pickle", "types"
)  # fmt: skip
MAX_GLOBALS = 200  # names in a pickle that become `Inert`
MAX_UNPACKED, MAX_RATIO = 2**28, 16  # bytes that a zip file may unpack to: MAX_UNPACKED and MAX_RATIO times its size
_SHARD = re.compile(r"(.+?)[-_](\d+)-of-(\d+)(\.\w+)")


class Inert:
    """In place of an object of a checkpoint that is neither a tensor nor a plain value; it holds and does nothing."""

    name = ""  # of its class in the file

    def __new__(cls, *_: object, **__: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def read_weight_file(path: Path) -> tuple[Any, Mapping[str, Any], list[str]]:
    """Reads a weight file; a shard, or the index of shards, gives the weights of all of them.

    Returns:
        What the file holds, in general nested mappings with tensors; the metadata that `resnetlab export` wrote; and notes.

    Raises:
        ModelFileError: the file is missing, empty, truncated, a zip bomb, or cannot be read without executing code.
        UsageError: it is a model file of resnetlab, which needs no import.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path), {}, [f"the shards that {path.name} lists"]
    if match := _SHARD.fullmatch(path.name):
        index = path.with_name(f"{match[1]}{match[4]}.index.json")
        if not index.is_file():
            raise ModelFileError(
                f"{path} is part {int(match[2])} of {int(match[3])} of the weights, and {index.name}, which lists the parts, "
                "is not beside it; download all parts and the index."
            )
        return _read_shards(index), {}, [f"{path.name} is one of the shards that {index.name} lists; all are read"]
    content = tensor_file.read_file(path, WANTED)
    if path.suffix == ".safetensors":
        return *_read_safetensors_bytes(path, content), []
    if path.suffix == ".npz":
        return _read_npz(path, content), {}, []
    return *_read_torch(path, content), []


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index lists."""
    try:
        files = parse_json(tensor_file.read_file(index, WANTED))["weight_map"]
        names = sorted(set(files.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelFileError(
            f"{index} is not an index of sharded weights: it has no weight_map of names and files; download it again."
        ) from error
    if odd := [name for name in names if not isinstance(name, str) or Path(name).name != name or not name.strip(".")]:
        raise ModelFileError(f"{index} lists {odd[0]!r}, which is not the name of a file beside it; download it again.")
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = index.with_name(name)
        if not file.is_file():
            raise ModelFileError(f"{index} lists {name}, which is not beside it; download all {len(names)} shards.")
        content = tensor_file.read_file(file, WANTED)
        read = _read_safetensors_bytes if file.suffix == ".safetensors" else _read_torch
        value: Any = read(file, content)[0]
        tensors |= value if isinstance(value, Mapping) else {}
    if missing := [name for name in files if name not in tensors]:
        raise ModelFileError(
            f"{index} lists {format_list(missing, 3)}, which its shards do not hold; download them again."
        )
    return tensors


def _read_safetensors_bytes(path: Path, content: bytes) -> tuple[dict[str, Any], Mapping[str, Any]]:
    try:
        tensors = load_safetensors(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(
            f"{path} is not a complete safetensors file ({error}); download or copy it again."
        ) from error
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    entries = header.get("__metadata__", {})
    if tensor_file.KEY in entries or migrate_v01.KEY in entries:
        raise UsageError(f"{path} is a file of resnetlab already, which needs no import; use it as it is.")
    metadata = _parse_metadata(path, entries.get("resnetlab-export"), entries.get(migrate_v01.EXPORT_KEY))
    return {key: _parse_class_names(entries[key]) for key in CLASS_KEYS if key in entries} | tensors, metadata


def _parse_class_names(text: str) -> Any:
    """Names of classes in the metadata of safetensors, which are text: in JSON, or with commas."""
    try:
        return parse_json(text)
    except ValueError:
        return [name.strip() for name in text.split(",")]


def _parse_metadata(path: Path, text: Any, old_text: Any) -> Mapping[str, Any]:
    """Parses the metadata of `resnetlab export` (`old_text`: of version 0.1); {} if there is none.

    Raises ModelFileError if it is incomplete.
    """
    if text is None and old_text is None:
        return {}
    try:
        value = parse_json(old_text if text is None else text)
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


def _read_npz(path: Path, content: bytes) -> dict[str, Any]:
    if not content.startswith(NPZ_MAGIC):  # numpy would advise to load it as a pickle
        raise ModelFileError(f"{path} is no .npz file; it begins with {content[:20]!r}.")
    _check_unpacked_size(path, content)
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
    tensors: dict[str, Any] = {}
    for name, value in values.items():
        if value.dtype.kind == "U" and name.lower() in CLASS_KEYS:
            tensors[name] = value.tolist()  # names of classes
            continue
        try:
            tensors[name] = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        except TypeError as error:
            raise ModelFileError(
                f"{path}: {name} is an array of {value.dtype}, which torch does not support; save the weights without it."
            ) from error
    return tensors


def _read_torch(path: Path, content: bytes) -> tuple[Any, Mapping[str, Any]]:
    if not content.startswith(MAGIC):
        raise ModelFileError(f"{path} is not {WANTED}; it begins with {content[:20]!r}.")
    _check_unpacked_size(path, content)
    try:
        value = load_inert(path)
    except pickle.UnpicklingError as error:
        if _find_forbidden_global(error) is None and path.suffix not in SUFFIXES:
            raise ModelFileError(f"{path} is not {WANTED}.") from error
        raise unsafe_pickle_error(str(path), error) from error
    except Exception as error:  # damaged files raise struct, assertion, lookup and other errors
        if "TorchScript" in str(error):
            raise ModelFileError(f"{path} is a TorchScript program, not weights; save only its state_dict.") from error
        raise ModelFileError(
            f"{path} is damaged or truncated ({first_line(error)}); download or copy it again."
        ) from error
    if entry := _find_corrupt_entry(content):
        raise ModelFileError(f"{path} is damaged ({entry} does not match its checksum); download or copy it again.")
    metadata = getattr(value, "_metadata", None)
    entries = metadata if isinstance(metadata, Mapping) else {}
    return value, _parse_metadata(path, entries.get("resnetlab"), entries.get(migrate_v01.KEY))


def load_inert(path: Path) -> Any:
    """`torch.load(weights_only=True)`, with `Inert` objects for what is neither a tensor nor a plain value.

    Raises what `torch.load` does: `pickle.UnpicklingError` for a name of REFUSED_MODULES, and many others for damage.
    """
    inert: dict[str, Any] = {}
    while True:
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals([(v, k) for k, v in inert.items()]),
        ):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                match = re.search(r"Unsupported global: GLOBAL (\w+\.[\w.]+) ", str(error))  # no dot: one of builtins
                name = match[1] if match else ""
                if not name or name in inert or len(inert) == MAX_GLOBALS or name.split(".")[0] in REFUSED_MODULES:
                    raise
                inert[name] = type("Inert", (Inert,), {"name": name})


def _check_unpacked_size(path: Path, content: bytes) -> None:
    """Raises ModelFileError for a zip file that unpacks to implausibly many bytes; other files pass."""
    if not content.startswith(MAGIC[0]):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            total = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # damaged, which reading it reports
        return
    if total > MAX_UNPACKED + MAX_RATIO * len(content):
        raise ModelFileError(
            f"{path}, of {len(content):,} bytes, unpacks to {total:,}, which weights do not; it is refused. Save the weights "
            "uncompressed, as torch.save and numpy.savez do."
        )


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
