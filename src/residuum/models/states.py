"""Files of weights as other programs publish them -> a plain state dict under torchvision's names.

Nothing in a file is ever executed: PyTorch's own files are read by `torch.load(weights_only=True)`, NumPy's without pickles.
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

from residuum.errors import ModelFileError, UsageError

SUFFIXES = (".pth", ".pt", ".th", ".tar", ".bin", ".ckpt", ".safetensors", ".npz")
MAGIC = (b"PK", b"\x80")  # how PyTorch's files begin: a zip file, formerly a pickle
NESTS = ("state_dict", "model", "net", "model_ema")  # keys that a training program puts its weights under
AVERAGED = "n_averaged"  # how many steps torch.optim.swa_utils.AveragedModel has averaged
PREFIXES = ("module.", "_orig_mod.", "backbone.")
RENAMED = {"linear": "fc", "classifier": "fc", "shortcut": "downsample"}
EXPORTED = {
    "specification": dict,
    "classes": list,
    "preprocessing": dict,
    "temperature": float,
    "calibration": dict,
    "data": dict,
}  # what `residuum export` writes beside tensors, and its kinds


@dataclass(frozen=True, eq=False)
class State:
    """Weights under torchvision's names.

    Attributes:
        tensors: name -> value, floating point but for counts.
        about: what `residuum export` wrote beside them; empty for other programs' files.
        caffe: whether the names were those of Caffe's layers.
        renamed: whether the fully connected layer was called `linear`.
        notes: what was done to the file's own names, sentences for a person.
    """

    tensors: dict[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)
    caffe: bool = False
    renamed: bool = False
    notes: tuple[str, ...] = ()


def read_state(path: Path, key: str | None = None) -> State:
    """Reads a file of weights and brings its names to torchvision's.

    Args:
        key: which of several sets of weights in the file is meant, such as "model_ema".

    Raises:
        ModelFileError: the file is missing, empty, cut short, would have to execute code to be read, or holds no weights.
        UsageError: `key` is not in the file, or the file holds several sets of weights and none was chosen.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{path} is not there; give a file of weights ({', '.join(SUFFIXES)}).") from None
    except IsADirectoryError:
        raise ModelFileError(f"{path} is a folder; give a file of weights in it ({', '.join(SUFFIXES)}).") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}).") from error
    if not content:
        raise ModelFileError(f"{path} is empty; download or copy it again.")
    if path.suffix == ".safetensors":
        value, about = _safetensors(path, content)
    elif path.suffix == ".npz":
        value, about = _npz(path, content), {}
    else:
        value, about = _torch(path, content)
    return named(value, str(path), key, about)


def _safetensors(path: Path, content: bytes) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        tensors = load_safetensors(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} is not a whole safetensors file ({error}); download or copy it again.") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, _about(path, header.get("__metadata__", {}).get("residuum-export"))


def _about(path: Path, text: Any) -> Mapping[str, Any]:
    """What `residuum export` wrote beside the tensors; empty where it wrote nothing. Raises ModelFileError where it did not."""
    if text is None:
        return {}
    try:
        about = json.loads(text)
    except (TypeError, ValueError):
        about = None
    kinds = about if isinstance(about, dict) else {}
    if not all(isinstance(kinds.get(key), kind) for key, kind in EXPORTED.items()):
        raise ModelFileError(
            f"{path} says that `residuum export` wrote it, but what should stand beside its tensors ({', '.join(EXPORTED)}) "
            "does not; export the model again."
        )
    return kinds


def _npz(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        arrays = np.load(io.BytesIO(content), allow_pickle=False)
        values = {name: arrays[name] for name in arrays.files} if isinstance(arrays, np.lib.npyio.NpzFile) else None
    except Exception as error:  # damage shows in many ways: zlib, zipfile, tokenize, struct and others raise their own
        if "Object arrays" in str(error):
            raise ModelFileError(
                f"{path} holds Python objects ({error}); reading it could execute code, so it is refused. Save plain arrays."
            ) from error
        raise ModelFileError(f"{path} is not a whole .npz file ({error}); download or copy it again.") from error
    if values is None:
        raise ModelFileError(
            f"{path} holds a single array without a name (.npy); save all weights by name: numpy.savez."
        )
    tensors = {}
    for name, value in values.items():
        try:
            tensors[name] = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("=")))
        except TypeError as error:
            raise ModelFileError(
                f"{path}: {name} is an array of {value.dtype}, not of numbers that torch knows; save the weights without it."
            ) from error
    return tensors


def _torch(path: Path, content: bytes) -> tuple[Any, Mapping[str, Any]]:
    if not content.startswith(MAGIC):
        raise ModelFileError(
            f"{path} is not a file of weights that can be read ({', '.join(SUFFIXES)}); it begins with {content[:20]!r}."
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _forbidden(error) is None and path.suffix not in SUFFIXES:
            raise ModelFileError(
                f"{path} is not a file of weights that can be read ({', '.join(SUFFIXES)})."
            ) from error
        raise refusal(str(path), error) from error
    except Exception as error:  # damage shows in many ways: struct, assertions, lookups and others raise their own
        if "TorchScript" in str(error):
            raise ModelFileError(f"{path} is a TorchScript program, not weights; save its state_dict alone.") from error
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"{path} is damaged or cut short ({said}); download or copy it again.") from error
    if part := _altered(content):
        raise ModelFileError(f"{path} is damaged ({part} is not what was written); download or copy it again.")
    beside = getattr(value, "_metadata", None)
    return value, _about(path, beside.get("residuum") if isinstance(beside, Mapping) else None)


def _altered(content: bytes) -> str | None:
    """The first part of PyTorch's zip file that has another checksum than was written; `torch.load` does not look at them."""
    if not content.startswith(MAGIC[0]):
        return None
    name = "its table of contents"
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as parts:
            for part in parts.infolist():
                name = part.filename
                if part.CRC:  # 0: written without checksums (torch.serialization.set_crc32_options)
                    parts.read(part)
    except Exception:  # damage shows in many ways
        return name
    return None


def _forbidden(error: pickle.UnpicklingError) -> str | None:
    """What a pickle asks for that tensors and plain values do not need, where torch's message says it."""
    if called := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it asks for {called[1]}"
    reason = re.search(r"Unsupported (?:global|operand|class)[^.\n]*", str(error))
    return reason[0].strip() if reason else None


def refusal(where: str, error: pickle.UnpicklingError) -> ModelFileError:
    """The error for a pickle that `torch.load(weights_only=True)` would not read, with its reason."""
    why = f" ({reason})" if (reason := _forbidden(error)) else ""
    return ModelFileError(
        f"{where} holds more than tensors and plain values{why}; reading it could execute code, so it is refused. Where it "
        "was made, save the state_dict alone: torch.save(net.state_dict(), FILE)."
    )


def named(value: Any, where: str, key: str | None = None, about: Mapping[str, Any] | None = None) -> State:
    """Any nesting of weights -> State; see `read_state`."""
    notes: list[str] = []
    tensors = _unwrapped(value, where, key, notes)
    if odd := [name for name, tensor in tensors.items() if not _plain(tensor)]:
        kind = (
            f"{str(tensors[odd[0]].layout).removeprefix('torch.')} {str(tensors[odd[0]].dtype).removeprefix('torch.')}"
        )
        raise ModelFileError(
            f"{where}: {', '.join(odd[:4])}{f' and {len(odd) - 4} more' if len(odd) > 4 else ''} cannot be weights ({kind}); "
            "they must be dense tensors of floating point: save the network before it is quantised or made sparse."
        )
    caffe = any(re.match(r"(res|bn|scale)\d[a-z]\d*_branch", name) for name in tensors)
    if caffe:
        from residuum.models.caffe import from_caffe

        tensors = from_caffe(tensors, where)
        notes.append(
            "Caffe's layer names; inputs turned from BGR to RGB, BN's statistics divided by their scale factor"
        )
    tensors, found = _without_prefixes(tensors)
    if found:
        notes.append(f"without the prefix {', '.join(found)}")
    renamed = {name: ".".join(RENAMED.get(part, part) for part in name.split(".")) for name in tensors}
    if changed := sorted({part for name in tensors for part in name.split(".") if part in RENAMED}):
        notes.append(", ".join(f"{part} is {RENAMED[part]}" for part in changed))
    clash = len(renamed) - len(set(renamed.values()))
    if clash:
        raise ModelFileError(
            f"{where} has {clash} names twice once prefixes are gone; save one network's state_dict alone."
        )
    linear = any(name.split(".")[0] == "linear" for name in tensors)
    return State({renamed[k]: v for k, v in tensors.items()}, about or {}, caffe, linear, tuple(notes))


def _plain(tensor: Tensor) -> bool:
    """Whether a tensor can hold weights: dense, real, in floating point; counts and BN's factors may be whole numbers."""
    usable = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    return usable and (tensor.is_floating_point() or (tensor.numel() == 1 and not tensor.is_complex()))


def _unwrapped(value: Any, where: str, key: str | None, notes: list[str]) -> dict[str, Tensor]:
    """The mapping of names to tensors that lies somewhere in `value`."""
    if isinstance(value, Mapping):
        nests = [name for name in NESTS if isinstance(value.get(name), Mapping)]
        if key is not None:
            if not isinstance(value.get(key), Mapping):
                raise UsageError(
                    f"--key {key}: {where} holds no weights under it; there is {', '.join(map(str, value))[:200]}."
                )
            return _unwrapped(value[key], where, None, notes)
        if len(nests) > 1:
            raise UsageError(
                f"{where} holds several sets of weights: {', '.join(nests)}; choose one with --key {nests[0]}."
            )
        if nests:
            notes.append(f"nested under {nests[0]}")
            return _unwrapped(value[nests[0]], where, None, notes)
        if any(isinstance(each, Tensor) for each in value.values()):
            return _tensors(value, where, notes)
    raise ModelFileError(
        f"{where} holds no state_dict: neither names with tensors nor such a mapping under {', '.join(NESTS)}; save the "
        "state_dict alone."
    )


def _tensors(value: Mapping[Any, Any], where: str, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of a mapping; what a training program counted beside them is passed over, and said."""
    beside = [name for name, each in value.items() if each is None or isinstance(each, int | float | str)]
    counts = [*beside, *(name for name in (AVERAGED,) if name in value)]
    tensors = {str(name): each for name, each in value.items() if name not in counts}
    if odd := [name for name, each in tensors.items() if not isinstance(each, Tensor)]:
        raise ModelFileError(
            f"{where}: {odd[0]} stands among the weights and is no tensor but a {type(tensors[odd[0]]).__name__}; save the "
            "state_dict alone."
        )
    if counts:
        notes.append(f"passed over beside the weights: {', '.join(map(str, counts))}")
    return tensors


def _without_prefixes(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
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
            f"the file names {len(tensors) - len(plain)} tensors twice once {', '.join(found)} is gone; save one network alone."
        )
    # A network that stands within another has that one's name for it before all of its own.
    stems = [name.removesuffix("conv1.weight") for name in plain if name.endswith(".conv1.weight")]
    whole = min(stems, key=len, default="")
    if whole and all(name.startswith(whole) for name in plain):
        return {name.removeprefix(whole): value for name, value in plain.items()}, [*found, whole]
    return plain, found
