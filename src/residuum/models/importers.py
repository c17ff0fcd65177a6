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

SOURCES = {  # what is known of the networks that a program or publisher hands out
    "torchvision": {"stride_site": "3x3"},
    "timm": {"stride_site": "3x3"},
    "caffe": {"stride_site": "first", "maxpool": "ceil"},  # KaimingHe/deep-residual-networks
    "akamaster": {"zeros": "centre"},  # akamaster/pytorch_resnet_cifar10
}


def infer(
    state: State, source: str | None = None, changes: Mapping[str, str] | None = None
) -> tuple[Specification, list[str]]:
    """The specification of a state dict, and sentences on what it rests on.

    Args:
        source: a name of SOURCES, or None where it is not known.
        changes: values that are given, as `--set key=value` has them.

    Raises:
        ModelFileError: the names are not those of a residual network that can be built.
        UsageError: a value that names and shapes do not tell is neither given nor known; the message says which.
    """
    if source is not None and source not in SOURCES:
        raise unknown("source", source, SOURCES)
    given = parse_changes(changes or {})
    if state.about:
        return replace(Specification.from_json(state.about["specification"]), **given), ["written by residuum export"]
    values = _from_shapes(state.tensors)
    notes: list[str] = []
    source = source or ("caffe" if state.caffe else None)
    if source is not None:
        values |= SOURCES[source]
        notes.append(f"source {source}: {', '.join(f'{k} {v}' for k, v in SOURCES[source].items())}")
    values |= given
    if values["block"] == "bottleneck" and "stride_site" not in values:
        raise UsageError(
            "names and shapes do not tell where the bottlenecks have their stride: give --source torchvision (or timm), or "
            "--set stride_site=3x3 (torchvision, timm, fb.resnet.torch) or --set stride_site=first (the paper, Caffe)."
        )
    if values["shortcut"] == "A":
        if "zeros" not in values:
            values["zeros"] = "centre" if state.renamed else "append"
            where = "the layer `linear`, as akamaster's CIFAR nets have it" if state.renamed else "no known source"
            notes.append(f"ASSUMED from {where}: option A with zeros={values['zeros']}; --set zeros=… says otherwise")
        if "shortcut" not in given:
            notes.append(
                "ASSUMED: no projections, so shortcut=A; a plain net has the same tensors (--set shortcut=none)"
            )
    return Specification(**values), notes


def _from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """All of a specification that names and shapes tell."""
    stem, fc = tensors.get("conv1.weight"), tensors.get("fc.weight")
    units: dict[int, set[int]] = {}
    for name in tensors:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    if stem is None or fc is None or not units or stem.dim() != 4 or fc.dim() != 2:
        shown = ", ".join(list(tensors)[:5])
        raise ModelFileError(
            "the file does not hold a residual network of a known layout: conv1.weight, layer1.0.conv1.weight … and fc.weight "
            f"are expected, it has {shown}{' …' if len(tensors) > 5 else ''}."
        )
    if stem.shape[2] not in (3, 7):
        raise ModelFileError(f"conv1.weight is {_shape(stem)}; a stem of 3x3 (CIFAR) or 7x7 (ImageNet) is expected.")
    stages = range(1, len(units) + 1)
    if sorted(units) != list(stages) or any(units[i] != set(range(len(units[i]))) for i in stages):
        raise ModelFileError(f"stages or blocks are missing: there are only {_blocks(units)}; save the whole network.")
    first = {int(m[1]) for name in tensors if (m := re.fullmatch(r"layer1\.0\.conv(\d+)\.weight", name))}
    kernel = tensors.get("layer1.0.conv1.weight")
    bottleneck = kernel is not None and kernel.dim() == 4 and kernel.shape[2] == 1
    width_of = "conv2" if bottleneck else "conv1"
    widths = tuple(
        int(tensors[f"layer{i}.0.{width_of}.weight"].shape[0])
        for i in stages
        if f"layer{i}.0.{width_of}.weight" in tensors
    )
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
    return values | ({} if bottleneck else {"layers": max(first, default=2)})


def _shortcut(tensors: Mapping[str, Tensor], depths: tuple[int, ...]) -> str:
    projected = {name.split(".downsample.")[0] for name in tensors if ".downsample." in name}
    if not projected:
        return "A"
    return "C" if len(projected) == sum(depths) > len(depths) else "B"


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))


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
