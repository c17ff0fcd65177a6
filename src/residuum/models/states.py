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
NESTS = ("state_dict", "model", "net", "model_ema")  # keys that a training program puts its weights under
PREFIXES = ("module.", "_orig_mod.", "backbone.")
RENAMED = {"linear": "fc", "classifier": "fc", "shortcut": "downsample"}


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
        value, about = _torch(path)
    return named(value, str(path), key, about)


def _safetensors(path: Path, content: bytes) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    try:
        tensors = load_safetensors(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} is not a whole safetensors file ({error}); download or copy it again.") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return tensors, json.loads(header.get("__metadata__", {}).get("residuum-export", "{}"))


def _npz(path: Path, content: bytes) -> dict[str, Tensor]:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        raise ModelFileError(f"{path} is not a whole .npz file ({error}); download or copy it again.") from error
    except (ValueError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        raise ModelFileError(
            f"{path} holds more than arrays ({error}); reading it could execute code, so it is refused. Save plain arrays."
        ) from error


def _torch(path: Path) -> tuple[Any, Mapping[str, Any]]:
    try:
        with warnings.catch_warnings(action="ignore"):
            value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = re.search(r"(Unsupported (?:global|operand|class)[^.]*\.?|GLOBAL \S+|got \S+)", str(error))
        if reason is None and path.suffix not in SUFFIXES:
            raise ModelFileError(
                f"{path} is not a file of weights that can be read ({', '.join(SUFFIXES)})."
            ) from error
        why = f" ({reason[1].strip()})" if reason else ""
        raise ModelFileError(
            f"{path} holds more than tensors and plain values{why}; reading it could execute code, so it is refused. Where it "
            "was made, save the state_dict alone: torch.save(net.state_dict(), FILE)."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        if "TorchScript" in str(error):
            raise ModelFileError(f"{path} is a TorchScript program, not weights; save its state_dict alone.") from error
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"{path} is damaged or cut short ({said}); download or copy it again.") from error
    about = getattr(value, "_metadata", {}).get("residuum", "{}") if isinstance(value, Mapping) else "{}"
    return value, json.loads(about)


def named(value: Any, where: str, key: str | None = None, about: Mapping[str, Any] | None = None) -> State:
    """Any nesting of weights -> State; see `read_state`."""
    notes: list[str] = []
    tensors = _unwrapped(value, where, key, notes)
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
        if value and all(isinstance(each, Tensor) for each in value.values()):
            return {str(name): each for name, each in value.items()}
    raise ModelFileError(
        f"{where} holds no state_dict: neither names with tensors nor such a mapping under {', '.join(NESTS)}; save the "
        "state_dict alone."
    )


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
    return plain, found
