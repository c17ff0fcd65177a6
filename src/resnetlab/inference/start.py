"""Weights to start from: a model file, a published name, or other programs' weights with or without a head."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from resnetlab.device import standard_torch_state
from resnetlab.errors import ModelFileError, UsageError
from resnetlab.formatting import find_name_problem
from resnetlab.inference.download import download_model, find_model, find_trained, get_scheme, import_folder
from resnetlab.inference.import_model import IMAGENET_MEAN, IMAGENET_STD, ImportOptions, import_state_dict
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import Specification, get_specification, nearest_name
from resnetlab.models.state_dicts import StateDictFile, list_head, read_state_dict
from resnetlab.models.weight_files import SUFFIXES
from resnetlab.tensor_file import read_metadata

NO_HEAD = ("no head",)  # the classes of weights without a head
PRETRAINED = {  # a network: its best ImageNet weights at torchvision
    "resnet18": "torchvision:resnet18.IMAGENET1K_V1",
    "resnet34": "torchvision:resnet34.IMAGENET1K_V1",
    **{f"resnet{depth}": f"torchvision:resnet{depth}.IMAGENET1K_V2" for depth in (50, 101, 152)},
}


class Start(NamedTuple):
    """A model to start from, 16 hex digits that identify its weights, and sentences on what was assumed."""

    model: TrainedModel
    digest: str
    notes: list[str]


def find_pretrained(net: str | None, default: str = "") -> str:
    """The name of a network's published ImageNet weights (v1.5 for bottlenecks); raises UsageError if there are none.

    `default` is the network that a recipe has, where none is named.
    """
    if (name := PRETRAINED.get((net or default).removesuffix("v1.5"))) is None:
        none = f"there are none of {net}" if net else f"there are none of {default}, the recipe's network: give it"
        raise UsageError(
            f"--pretrained takes the ImageNet weights of {', '.join(PRETRAINED)}, named by --net; {none}. Other weights: "
            "--start-from NAME or FILE."
        )
    return name


def find_weights(net: str, weights: str) -> str:
    """The published name of a network's weights that are given as torchvision does, DEFAULT or ResNet18_Weights.IMAGENET1K_V1.

    "imagenet" is DEFAULT; anything else stays as it is.
    """
    if not (match := re.fullmatch(r"(?:ResNet(\d+)_Weights\.)?(DEFAULT|imagenet|IMAGENET1K_V\d)", weights)):
        return weights
    net = f"resnet{match[1]}" if match[1] else net.removesuffix("v1.5")
    return f"torchvision:{net}.{match[2]}" if match[2].startswith("IMAGENET1K") else find_pretrained(net)


def resolve_start(name: str, folder: Path) -> str:
    """A published name, or that of a model of the package, as it is; a path relative to a folder; "" for none."""
    return name if not name or get_scheme(name) or find_trained(name) else str(folder / name)


@standard_torch_state()
def load_start(name: str, changes: Mapping[str, Any] | None = None) -> Start:
    """Loads weights to start from.

    Args:
        name: a published name such as "torchvision:resnet18.IMAGENET1K_V1", a model file, a run folder, or a weight file of
            another program, also of a network without a head.
        changes: values of the network's specification that names and shapes do not determine.

    Raises:
        ModelFileError: the file is missing or damaged, or holds no residual network; or the download fails.
        UsageError: there is no such published model, or it is the name of a network.
    """
    if get_scheme(name):
        model, notes = download_model(name)
        return Start(model, _hash_weights(model.resnet), notes)
    given = path = Path(name)
    if (path / "config.json").is_file() and not (path / "model.safetensors").exists():
        path /= "pytorch_model.bin"  # as older versions of transformers save it
    if path.is_dir() or not path.exists():
        path = Path(find_model(given))
    foreign = path.name.endswith(SUFFIXES) and path.is_file() and not read_metadata(path)
    if not foreign:
        model, notes = load_trained_model(path), []
    elif (given / "config.json").is_file():  # a folder as transformers and timm save it
        try:
            model, notes = import_folder(given, ImportOptions())
        except ModelFileError as error:  # a trainer's checkpoint has no preprocessing, a backbone has no head
            model, notes = _import_start(path, changes or {})
            notes.append(f"the folder's configuration is not used: {error}")
    else:
        model, notes = _import_start(path, changes or {})
    return Start(model, hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest(), notes)


def _hash_weights(net: ResNet) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for tensor in net.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _import_start(path: Path, changes: Mapping[str, Any]) -> tuple[TrainedModel, list[str]]:
    """Imports another program's weights; what they do not contain and training replaces is assumed, with notes."""
    state, notes = read_state_dict(path), []
    if state.tensors.get("fc.weight", torch.empty(0)).dim() != 2 or len(list_head(state.tensors)) > 2:
        state = _replace_head(state)
        notes.append("the file has no head of one fully connected layer; a new one is trained")
    outputs = len(state.tensors["fc.weight"])
    channels = state.tensors["conv1.weight"].shape[1] if "conv1.weight" in state.tensors else 3
    text = {key: str(value) for key, value in changes.items() if key not in ("classes", "channels")}
    named = len(state.classes) == outputs and find_name_problem(state.classes) is None
    classes = state.classes if named else [f"class {i}" for i in range(outputs)]
    options = ImportOptions(classes=NO_HEAD if outputs == 1 else classes, changes=text)
    if not state.metadata:
        rgb = channels == 3
        options = replace(options, mean=IMAGENET_MEAN if rgb else (0.5,), std=IMAGENET_STD if rgb else (0.25,))
        notes.append(
            "ASSUMED: ImageNet's mean and standard deviation; --set normalise='per-channel mean and std' takes the data's"
        )
    else:
        options = replace(options, classes=None)
    try:
        model, found = import_state_dict(state, options, str(path))
    except UsageError as error:
        if "stride" not in str(error):
            raise
        options = replace(options, changes={**text, "stride_in": "3x3"})
        model, found = import_state_dict(state, options, str(path))
        notes.append("ASSUMED: stride_in=3x3, as torchvision's and timm's; --set stride_in=first for the paper's")
    model.recipe = {}
    return model, [*(note for note in found if "mean" not in note and "--classes" not in note), *notes]


def _replace_head(state: StateDictFile) -> StateDictFile:
    """The state dict with a head of zeros for one class."""
    tensors = {name: value for name, value in state.tensors.items() if name not in list_head(state.tensors)}
    last = max((name for name in tensors if name.startswith("layer")), default="").split(".")[0]
    outputs = [v.shape[0] for name, v in sorted(tensors.items()) if name.startswith(f"{last}.0.conv") and v.dim() == 4]
    width = outputs[-1] if outputs else 1
    return replace(state, tensors=tensors | {"fc.weight": torch.zeros(1, width), "fc.bias": torch.zeros(1)})


def choose_specification(where: str, start: Specification, net: str, changes: Mapping[str, Any]) -> list[str]:
    """Checks that weights fit the network that is asked for; returns a note where they bring another place of the stride.

    Values that mean nothing for a network, such as the stride's place in basic blocks, are not compared.

    Args:
        where: the weights' name, for messages.
        net: the name of a network; "" takes the weights' own.
        changes: values of the specification that are asked for.

    Raises UsageError if they hold another network.
    """
    ignored: dict[str, Any] = {"classes": 1, "channels": 3}
    own = replace(start, **ignored)
    asked = replace(get_specification(net, **changes), **ignored) if net else replace(own, **dict(changes) | ignored)
    if asked.canonical() == own.canonical():
        return []
    if net and "stride_in" not in changes and replace(asked, stride_in=own.stride_in).canonical() == own.canonical():
        place = "3x3" if own.stride_in == "3x3" else "first 1x1"
        return [f"{where} brings its own network, {nearest_name(start)[0]}: {net} with the stride in the {place}"]
    other = nearest_name(start)[0]
    raise UsageError(
        f"{where} holds another network than {net or 'one with ' + ', '.join(changes)}: it holds {other}, not the "
        f"{net or 'network'} that is asked for; leave out --net and the values of its specification."
    )
