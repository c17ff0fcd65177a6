"""Weights published elsewhere -> a network: its specification inferred from names and shapes, never guessed in silence.

Names and shapes tell block, depths, widths, stem, shortcuts, order, channels and the number of classes. They do not tell where
a bottleneck has its stride, where option A puts its zero channels, the max-pool's alignment, the preprocessing and the classes'
names: those come from a source that is known, or are given.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from residuum.errors import ModelFileError, UsageError, unknown
from residuum.models.resnet import ResNet
from residuum.models.spec import Specification, parse_changes
from residuum.models.states import State
from residuum.nn.blocks import ORDERS

SOURCES = {  # what is known of the networks that a program or publisher hands out
    "torchvision": {"stride_site": "3x3"},
    "timm": {"stride_site": "3x3"},
    "caffe": {"stride_site": "first", "maxpool": "ceil"},  # KaimingHe/deep-residual-networks
    "akamaster": {"zeros": "centre"},  # akamaster/pytorch_resnet_cifar10
}
PLAIN = {  # the networks of each publisher that ours compute; others may have the same tensors
    "torchvision": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "timm": ("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"),
}
_IN_UNIT = re.compile(r"(layer\d+\.\d+)\.(?:conv|bn)(\d+)\.\w+")
LOOKALIKES = "resnetaa50, resnetblur50 and their kin have the same tensors and compute something else"
SAME_TENSORS = (
    "original",
    "bn-after-add",
    "relu-before-add",
    "relu-only-preact",
)  # orders that names and shapes do not tell apart


def infer(
    state: State, source: str | None = None, changes: Mapping[str, str] | None = None
) -> tuple[Specification, list[str]]:
    """The specification of a state dict, and sentences on what it rests on.

    Args:
        source: a name of SOURCES, or None where it is not known; timm's with the architecture's name, as "timm:resnet50".
        changes: values that are given, as `--set key=value` has them.

    Raises:
        ModelFileError: the names are not those of a residual network that can be built.
        UsageError: a value that names and shapes do not tell is neither given nor known; the message says which.
    """
    source, _, architecture = (source or "").partition(":")
    if source and source not in SOURCES:
        raise unknown("source", source, SOURCES)
    given = parse_changes(changes or {})
    if state.about:
        return replace(Specification.from_json(state.about["specification"]), **given), ["written by residuum export"]
    values = _from_shapes(state.tensors)
    notes: list[str] = []
    source = source or ("caffe" if state.caffe else "")
    _plain_network(source, architecture, values)
    if source:
        values |= SOURCES[source]
        notes.append(f"source {source}: {', '.join(f'{k} {v}' for k, v in SOURCES[source].items())}")
    elif not (given.keys() & {"order"}) and values["order"] in SAME_TENSORS:
        others = ", ".join(order for order in SAME_TENSORS if order != values["order"])
        notes.append(
            f"ASSUMED order={values['order']}; nets of {others} have the same tensors (--set order=… says otherwise)"
        )
    values |= given
    if not source and values["stem"] == "imagenet" and "maxpool" not in given:
        notes.append("ASSUMED maxpool=padded, as torchvision's; Caffe's has the same tensors (--set maxpool=ceil)")
    if values["block"] == "bottleneck" and "stride_site" not in values:
        raise UsageError(
            "names and shapes do not tell where the bottlenecks have their stride: give --source torchvision (or "
            "timm:resnet50), or --set stride_site=3x3 (torchvision, timm, fb.resnet.torch) or --set stride_site=first (the "
            "paper, Caffe)."
        )
    if values["shortcut"] == "A":
        if "zeros" not in values:
            values["zeros"] = "centre" if state.renamed else "append"
            where = "the layer `linear`, as akamaster's CIFAR nets have it" if state.renamed else "no known source"
            notes.append(f"ASSUMED from {where}: option A with zeros={values['zeros']}; --set zeros=… says otherwise")
        if ORDERS[values["order"]].preactivated and "boundary" not in given:
            notes.append(
                "ASSUMED boundary=shared; nets whose shortcuts take the raw input have the same tensors (--set boundary=raw)"
            )
        if "shortcut" not in given:
            notes.append(
                "ASSUMED: no projections, so shortcut=A; a plain net has the same tensors (--set shortcut=none)"
            )
    return Specification(**values), notes


def _plain_network(source: str, architecture: str, values: Mapping[str, Any]) -> None:
    """Raises UsageError where it is not said that timm's weights are of one of its plain networks, or others are named."""
    names = PLAIN.get(source, ())
    if architecture and architecture.split(".")[0] not in names:
        known = f"; take one of {', '.join(names)}" if names else ""
        raise UsageError(f"{source}'s {architecture} is none of the networks of the papers{known}.")
    if source == "timm" and not architecture:
        raise UsageError(
            f"which of timm's networks is it? {LOOKALIKES}: give its name, such as --source timm:resnet50."
        )


def _from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """All of a specification that names and shapes tell."""
    stem, fc = tensors.get("conv1.weight"), tensors.get("fc.weight")
    units: dict[int, set[int]] = {}
    for name in tensors:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    if stem is None or fc is None or not units or stem.dim() != 4 or fc.dim() != 2:
        there = {"conv1.weight": stem is not None, "layer1.0.conv1.weight": units, "fc.weight": fc is not None}
        missing = " and no ".join(name for name, found in there.items() if not found)
        shown = ", ".join(list(tensors)[:5])
        raise ModelFileError(
            "the file does not hold a residual network of a known layout: conv1.weight, layer1.0.conv1.weight … and fc.weight "
            f"are expected, it has {shown}{' …' if len(tensors) > 5 else ''}{f', but no {missing}' if missing else ''}."
        )
    if stem.shape[2] not in (3, 7):
        raise ModelFileError(f"conv1.weight is {_shape(stem)}; a stem of 3x3 (CIFAR) or 7x7 (ImageNet) is expected.")
    stages = range(1, len(units) + 1)
    if sorted(units) != list(stages) or any(units[i] != set(range(len(units[i]))) for i in stages):
        raise ModelFileError(f"stages or blocks are missing: there are only {_blocks(units)}; save the whole network.")
    bottleneck = _convolutions(tensors, "layer1.0", 1)[0].shape[2] == 1
    layers = 3 if bottleneck else _layers(tensors)
    kernels = [_convolutions(tensors, f"layer{i}.0", layers) for i in stages]
    widths = tuple(int(kernel[1 if bottleneck else 0].shape[0]) for kernel in kernels)
    depths = tuple(len(units[i]) for i in stages)
    values = {
        "block": "bottleneck" if bottleneck else "basic",
        "depths": depths,
        "widths": widths,
        "stem": "imagenet" if stem.shape[2] == 7 else "cifar",
        "shortcut": _shortcut(tensors, depths),
        "order": "preact" if "bn_last.weight" in tensors else "original",
        "conv1_bias": "conv1.bias" in tensors,
        "channels": int(stem.shape[1]),
        "classes": int(fc.shape[0]),
    }
    return values | ({} if bottleneck else {"layers": layers})


def _layers(tensors: Mapping[str, Tensor]) -> int:
    """Convolutions in F: the highest number that half of the units have, or their BNs, so that one mishap decides nothing."""
    numbers: dict[int, set[str]] = {}
    for name in tensors:
        if match := _IN_UNIT.fullmatch(name):
            numbers.setdefault(int(match[2]), set()).add(match[1])
    units = {unit for found in numbers.values() for unit in found}
    return max([1, *(i for i, found in numbers.items() if 2 * len(found) >= len(units))])


def _convolutions(tensors: Mapping[str, Tensor], unit: str, layers: int) -> list[Tensor]:
    """The convolutions of a unit's F, each (C_out, C_in, k, k); ModelFileError where one is missing or is none."""
    kernels = []
    for i in range(1, layers + 1):
        name = f"{unit}.conv{i}.weight"
        if name not in tensors:
            there = [other for other in tensors if other.startswith(f"{unit}.")]
            strange = [
                other for other in there if not re.match(r"(conv|bn)[1-9]\d*\.|downsample\.", other[len(unit) + 1 :])
            ]
            near = difflib.get_close_matches(name, strange, n=1)
            raise ModelFileError(
                f"{name} is missing: of its unit there is only {_some(there)}; "
                + (f"{near[0]} comes nearest, give it that name." if near else "save the whole network.")
            )
        if tensors[name].dim() != 4:
            raise ModelFileError(
                f"{name} is {_shape(tensors[name])}; a convolution's weights, of 4 dimensions, are expected."
            )
        kernels.append(tensors[name])
    return kernels


def _shortcut(tensors: Mapping[str, Tensor], depths: tuple[int, ...]) -> str:
    projected = {name.split(".downsample.")[0] for name in tensors if ".downsample." in name}
    if not projected:
        return "A"
    return "C" if len(projected) == sum(depths) > len(depths) else "B"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _blocks(units: Mapping[int, set[int]]) -> str:
    return ", ".join(f"layer{stage}.{{{','.join(map(str, sorted(found)))}}}" for stage, found in sorted(units.items()))


def network(state: State, spec: Specification) -> ResNet:
    """The network of a specification with a state's values, in float32 and eval mode.

    Counts of batches that BN has seen may be missing. Raises ModelFileError where anything else is missing, too much or of
    another shape, naming it and what comes nearest.
    """
    with torch.device("meta"):
        net = ResNet(spec)
    expected = net.state_dict()
    tensors = dict(state.tensors)
    for name in expected:
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros((), dtype=torch.long))
    if wrong := _misfits(tensors, expected):
        raise ModelFileError(
            f"the tensors do not fit the network that their names tell ({spec.block} blocks {'-'.join(map(str, spec.depths))}, "
            f"shortcut {spec.shortcut}): {wrong}."
        )
    float32 = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    net.load_state_dict({name: float32[name].clone().contiguous() for name in expected}, assign=True)
    return net.eval().requires_grad_(True)


def _misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What does not fit, as half a sentence; empty where all does."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} is {_shape(tensors[name])}, not {_shape(value)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]

    def nearest(name: str) -> str:
        near = difflib.get_close_matches(name, missing or list(expected), n=1)
        return f"{name} (nearest expected: {near[0]})" if near else name

    parts = [
        f"missing {_some(missing)}" if missing else "",
        f"not expected {_some([nearest(name) for name in extra[:4]], len(extra))}" if extra else "",
        f"misshapen {_some(misshapen)}" if misshapen else "",
    ]
    return "; ".join(filter(None, parts))


def _some(names: list[str], total: int | None = None) -> str:
    total = len(names) if total is None else total
    return ", ".join(names[:4]) + (f" and {total - 4} more" if total > 4 else "")
