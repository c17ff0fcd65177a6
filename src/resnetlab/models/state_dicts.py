"""Finds the weights in what a weight file holds, and converts their names to torchvision's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnetlab.errors import ModelFileError, UsageError
from resnetlab.formatting import format_list
from resnetlab.models.weight_files import CLASS_KEYS, Inert, read_weight_file

NESTED_KEYS = ("state_dict", "model", "net", "model_ema")  # usual keys of nested state dicts
AVERAGED = "n_averaged"  # counter of torch.optim.swa_utils.AveragedModel
PREFIXES = ("module.", "_orig_mod.", "backbone.")
HEADS = ("fc", "linear", "classifier", "head", "last_linear")  # first part of the name of the fully connected layer
# beside a network in Lightning's modules, thop's counters, mmengine's averages
BESIDE_NETWORK = re.compile(
    r"(?!layer\d|conv1|bn1|fc)(criterion|loss\w*|\w*(acc|accuracy|metrics?|auroc|f1|confmat)\w*|ema_\w+)(\..*)?"
    r"|(.*\.)?total_(ops|params)"
)
MAX_NESTING = 6
TRANSFORMERS_NAMES = (  # of transformers' ResNets, and torchvision's
    (r"^(module\.|model\.)?(resnet\.)?(?=embedder|encoder|classifier)", ""),
    (r"^embedder\.embedder\.convolution\.", "conv1."),
    (r"^embedder\.embedder\.normalization\.", "bn1."),
    (r"^encoder\.stages\.(\d+)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
    (r"\.layer\.(\d+)\.convolution\.", lambda m: f".conv{int(m[1]) + 1}."),
    (r"\.layer\.(\d+)\.normalization\.", lambda m: f".bn{int(m[1]) + 1}."),
    (r"\.shortcut\.convolution\.", ".downsample.0."),
    (r"\.shortcut\.normalization\.", ".downsample.1."),
)


@dataclass(frozen=True, eq=False)
class StateDictFile:
    """Weights with torchvision's names.

    Attributes:
        tensors: name -> value, floating point except for counters.
        metadata: written by `resnetlab export`; empty for other programs' files.
        specification: of the network of ours whose state_dict it is, which that is marked with; empty where it is not.
        layout: whose names the file had where that is clear: "caffe", "transformers", or "".
        has_linear: whether the fully connected layer was called `linear`.
        notes: sentences on how the file's names were changed.
        classes: the names of the classes beside the weights, in the order of the outputs; empty where there are none.
    """

    tensors: dict[str, Tensor]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    specification: Mapping[str, Any] = field(default_factory=dict)
    layout: str = ""
    has_linear: bool = False
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


def read_state_dict(path: Path, key: str | None = None) -> StateDictFile:
    """Reads a weight file and converts its names to torchvision's.

    Args:
        key: which of several state dicts in the file to read, such as "model_ema", or which of several networks in one.

    Raises:
        ModelFileError: the file is missing, empty, truncated, cannot be read without executing code, or has no weights.
        UsageError: `key` is not in the file, the file has several state dicts and `key` is not given, or it is resnetlab's.
    """
    value, metadata, notes = read_weight_file(path)
    return parse_state_dict(value, str(path), key, metadata, notes)


def parse_state_dict(
    value: Any,
    where: str,
    key: str | None = None,
    metadata: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
) -> StateDictFile:
    """Extracts the weights from any nesting of mappings and converts their names; see `read_state_dict`."""
    notes = list(notes or ())
    classes = _find_class_names(value)
    found, key = _unwrap(value, where, key, notes)
    marks = [mark for mark in dict(getattr(found, "_metadata", {})).values() if isinstance(mark, Mapping)]
    own = [mark["specification"] for mark in marks if isinstance(mark.get("specification"), Mapping)]
    tensors, layout = _select_tensors(found, where, notes), ""
    if any(re.match(r"(res|bn|scale)\d[a-z]\d*_branch", name) for name in tensors):
        from resnetlab.models.caffe_names import convert_caffe_names

        _check_dense(tensors, where)
        tensors, layout = convert_caffe_names(tensors, where), "caffe"
        notes.append(
            "Caffe's layer names; inputs changed from BGR to RGB, BN's statistics divided by their scale factor"
        )
    elif any("embedder.embedder.convolution." in name for name in tensors):
        tensors, layout = {_convert_transformers_name(k): v for k, v in tensors.items()}, "transformers"
        notes.append("transformers' layer names")
    tensors = _select_network(_strip_prefixes(tensors, notes), where, key, notes)
    has_linear = any(name.startswith("linear.") for name in tensors)
    tensors = _rename_head(tensors, notes)
    renamed = {".".join("downsample" if p == "shortcut" else p for p in k.split(".")): v for k, v in tensors.items()}
    if renamed.keys() != tensors.keys():
        notes.append("shortcut is downsample")
    if duplicates := len(tensors) - len(renamed):
        raise ModelFileError(
            f"{where} has {duplicates} duplicate names without prefixes; save only one network's state_dict."
        )
    _check_dense(renamed, where)
    is_own = len(own) == 1 and {"conv1.weight", "fc.weight"} <= renamed.keys()
    return StateDictFile(renamed, metadata or {}, own[0] if is_own else {}, layout, has_linear, tuple(notes), classes)


def _find_class_names(value: Any, depth: int = 0) -> tuple[str, ...]:
    """The names of the classes in a checkpoint, in the order of the outputs: beside the weights, or in a table of settings."""
    if not isinstance(value, Mapping) or depth > MAX_NESTING:
        return ()
    by_key = {key.lower(): each for key, each in value.items() if isinstance(key, str)}
    found = next(filter(None, (_order_class_names(by_key.get(key)) for key in CLASS_KEYS)), ())
    return found or next(filter(None, (_find_class_names(each, depth + 1) for each in value.values())), ())


def _order_class_names(names: Any) -> tuple[str, ...]:
    """Names in the order of the outputs, of a list, {name: output} or {output: name}; () for anything else."""
    if isinstance(names, Mapping):
        pairs = [pair if isinstance(pair[1], str) else pair[::-1] for pair in names.items()]
        outputs = {str(output): name for output, name in pairs}  # JSON has made strings of numbers
        names = [outputs.get(str(i)) for i in range(len(pairs))]
    is_list = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return tuple(names) if is_list else ()


def _check_dense(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises ModelFileError for tensors that cannot be weights: sparse, quantised, complex, or views larger than their data."""
    if odd := [name for name, tensor in tensors.items() if not _can_be_weight(tensor)]:
        kind = f"{tensors[odd[0]].layout} {tensors[odd[0]].dtype}".replace("torch.", "")
        raise ModelFileError(
            f"{where}: {format_list(odd, 4)} cannot be weights ({kind}); "
            "weights are dense floating point tensors: save the network before it is quantised or made sparse."
        )


def _can_be_weight(tensor: Tensor) -> bool:
    """Whether a tensor can be a weight: dense, real, floating point; counters and BN's factors may be integers."""
    usable = tensor.layout == torch.strided and tensor.device.type == "cpu" and not tensor.is_quantized
    # a view of more values than there are would take memory that the file does not have
    if not usable or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return False
    return tensor.is_floating_point() or (tensor.numel() == 1 and not tensor.is_complex())


def _holds_weights(value: Any, depth: int = 0) -> bool:
    """Whether a value is a whole set of weights, or contains one: names with at least four convolutions."""
    if not isinstance(value, Mapping) or depth > MAX_NESTING:
        return False
    if sum(isinstance(k, str) and isinstance(v, Tensor) and v.dim() == 4 for k, v in value.items()) >= 4:
        return True
    return any(isinstance(k, str) and _holds_weights(v, depth + 1) for k, v in value.items())


def _unwrap(
    value: Any, where: str, key: str | None, notes: list[str], depth: int = 0
) -> tuple[Mapping[Any, Any], str | None]:
    """Finds the mapping of names to tensors in `value`; also returns `key` if it did not name a mapping."""
    if isinstance(value, Inert):
        raise ModelFileError(
            f"{where} holds an object of {value.name}, not weights; save only the state_dict where it was made: "
            "torch.save(net.state_dict(), FILE)."
        )
    if isinstance(value, Mapping) and depth <= MAX_NESTING:
        if key is not None and isinstance(value.get(key), Mapping):
            if is_average(key):
                notes.append(f"{key}: the moving average of the weights")
            return _unwrap(value[key], where, None, notes, depth + 1)
        nests = [name for name, each in value.items() if isinstance(name, str) and _holds_weights(each)]
        nests = nests or [name for name in NESTED_KEYS if isinstance(value.get(name), Mapping)]
        if len(nests) > 1:
            averaged = [name for name in nests if is_average(name)]
            about = f" ({format_list(averaged, 3)}: the moving average, which is usually evaluated)" if averaged else ""
            raise UsageError(
                f"{where} has several sets of weights: {', '.join(nests)}; choose one with --key {nests[0]}{about}."
            )
        if nests:
            average = ", the moving average of the weights" if is_average(nests[0]) else ""
            notes.append(f"nested under {nests[0]}{average}")
            return _unwrap(value[nests[0]], where, key, notes, depth + 1)
        if any(isinstance(each, Tensor) for each in value.values()):
            return value, key
    raise ModelFileError(
        f"{where} has no state_dict: neither a mapping of names to tensors nor one under {', '.join(NESTED_KEYS)}; save only "
        "the state_dict."
    )


def is_average(key: str) -> bool:
    """Whether a key names a moving average of weights: model_ema, state_dict_ema, averaged_model, swa_state_dict."""
    return bool(re.search(r"(^|_)(ema|swa|avg|averaged?)(_|$)", key.lower()))


def _select_tensors(value: Mapping[Any, Any], where: str, notes: list[str]) -> dict[str, Tensor]:
    """Selects the tensors of a mapping; plain values such as epoch counters are ignored, with a note."""
    ignored = [name for name, each in value.items() if each is None or isinstance(each, int | float | str | Inert)]
    ignored += [name for name, each in value.items() if str(name).lower() in CLASS_KEYS and _order_class_names(each)]
    if AVERAGED in value:
        notes.append("the moving average of the weights (torch's AveragedModel)")
        ignored.append(AVERAGED)
    tensors = {str(name): each for name, each in value.items() if name not in ignored}
    if odd := [name for name, each in tensors.items() if not isinstance(each, Tensor)]:
        raise ModelFileError(
            f"{where}: {odd[0]} among the weights is not a tensor but a {type(tensors[odd[0]]).__name__}; save only the "
            "state_dict."
        )
    if ignored:
        notes.append(f"ignored, not weights: {', '.join(map(str, ignored))}")
    return tensors


def _convert_transformers_name(name: str) -> str:
    for pattern, replacement in TRANSFORMERS_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _strip_prefixes(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors without the prefixes that wrappers of a network add."""
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
    if found:
        notes.append(f"without the prefix {', '.join(found)}")
    return plain


def _select_network(tensors: dict[str, Tensor], where: str, key: str | None, notes: list[str]) -> dict[str, Tensor]:
    """The tensors of the one network among them; a network nested in a module has that attribute's name as its prefix.

    A head beside the nested network is kept, anything else ignored, with a note.
    """
    prefixes = [
        name.removesuffix("conv1.weight")
        for name in tensors
        if name.endswith("conv1.weight") and f"{name.removesuffix('conv1.weight')}layer1.0.conv1.weight" in tensors
    ]
    if key is not None:
        prefixes = [prefix for prefix in prefixes if f".{prefix}".endswith(f".{key}.")]
        if not prefixes:
            has = format_list(list(dict.fromkeys(name.split(".")[0] for name in tensors)), 12)
            raise UsageError(f"--key {key}: {where} has no weights under it; it has {has}.")
    if len(prefixes) > 1:
        raise UsageError(
            f"{where} has several networks: {', '.join(prefix.rstrip('.') or 'one without a prefix' for prefix in prefixes)}; "
            f"choose one with --key {next(filter(None, prefixes)).rstrip('.')}."
        )
    prefix = prefixes[0] if prefixes else ""
    if not prefix:
        beside = [name for name in tensors if BESIDE_NETWORK.fullmatch(name)]
        network = {name: value for name, value in tensors.items() if name not in beside}
    else:
        notes.append(f"without the prefix {prefix}")
        network = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
        outside = {name: v for name, v in tensors.items() if not name.startswith(prefix)}
        if not any(name.split(".")[0] in HEADS for name in network):
            network |= {name: v for name, v in outside.items() if name.split(".")[0] in HEADS}
        beside = [name for name in outside if name not in network]
    if beside:
        notes.append(f"ignored, beside the network: {format_list(beside, 4)}")
    return network


def _rename_head(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors with their one fully connected layer, such as classifier.1 of a Sequential, under fc."""
    head = [name for name in tensors if name.split(".")[0] in HEADS]
    layers = {name.rpartition(".")[0] for name in head}
    if len(layers) != 1 or layers == {"fc"}:
        return tensors
    layer = layers.pop()
    notes.append(f"{layer} is fc")
    return {f"fc.{name.rpartition('.')[2]}" if name in head else name: value for name, value in tensors.items()}


def list_head(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that belong to the head."""
    return [name for name in tensors if name.split(".")[0] in HEADS]
