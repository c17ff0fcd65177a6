"""Infers the specification of published weights from tensor names and shapes, and builds the network.

Names and shapes determine block, depths, widths, stem, shortcuts, channels and the number of classes. They do not determine
where a bottleneck has its stride, where option A puts its zero channels, the max-pool's alignment, the preprocessing or the
class names: those come from a known source, or must be given. Every assumption is reported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.errors import ModelFileError, UsageError, unknown_name_error
from resnetlab.formatting import format_list
from resnetlab.models.fold import find_foldable_pairs
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import Specification, check_network_size, parse_changes
from resnetlab.models.state_dicts import StateDictFile, list_head
from resnetlab.nn.blocks import ACTIVATION_ORDERS

SOURCES = {  # known values of the networks that a library or repository publishes
    "torchvision": {"stride_in": "3x3"},
    "timm": {"stride_in": "3x3"},
    "caffe": {"stride_in": "first", "maxpool": "ceil"},  # KaimingHe/deep-residual-networks
    "akamaster": {"zero_pad": "centre"},  # akamaster/pytorch_resnet_cifar10
    "mmpretrain": {"stride_in": "3x3"},  # style="pytorch", its default
    "transformers": {"stride_in": "3x3"},  # downsample_in_bottleneck=False, its default
}
SUPPORTED = {  # networks of each library that ours reproduce; others may have the same tensors
    "torchvision": ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "timm": ("resnet18", "resnet26", "resnet34", "resnet50", "resnet101", "resnet152", "resnet200"),
}
_IN_UNIT = re.compile(r"(layer\d+\.\d+)\.(?:conv|bn)(\d+)\.\w+")
# activation orders with the same names and shapes
AMBIGUOUS_ORDERS = ("original", "bn-after-add", "relu-before-add", "relu-only-preact")


def infer_specification(
    state: StateDictFile, source: str | None = None, changes: Mapping[str, str] | None = None
) -> tuple[Specification, list[str]]:
    """Infers the specification of a state dict; also returns notes on what it is based on.

    Args:
        source: a name of SOURCES, or None if unknown; timm's with the architecture's name, as "timm:resnet50".
        changes: known values, as in `--set key=value`.

    Raises:
        ModelFileError: the names are not those of a residual network that can be built.
        UsageError: a value that names and shapes do not determine is neither given nor known.
    """
    source, _, architecture = (source or "").partition(":")
    if source and source not in SOURCES:
        raise unknown_name_error("source", source, SOURCES)
    given = parse_changes(changes or {})
    if own := state.metadata.get("specification", state.specification):
        check_network_size(written := Specification.from_json(own), state.tensors)
        if not state.metadata:  # layers may have been replaced since
            written = replace(
                written, channels=state.tensors["conv1.weight"].shape[1], classes=len(state.tensors["fc.weight"])
            )
        return replace(written, **given), [
            f"written by {'resnetlab export' if state.metadata else 'a network of resnetlab'}"
        ]
    values = _infer_from_shapes(state.tensors)
    notes: list[str] = []
    source = source or state.layout
    _check_architecture(source, architecture, values)
    if source:
        values |= SOURCES[source]
        notes.append(f"source {source}: {', '.join(f'{k} {v}' for k, v in SOURCES[source].items())}")
    elif not (given.keys() & {"activation_order"}) and values["activation_order"] in AMBIGUOUS_ORDERS:
        others = ", ".join(order for order in AMBIGUOUS_ORDERS if order != values["activation_order"])
        notes.append(
            f"ASSUMED activation_order={values['activation_order']}; nets with {others} have the same tensors "
            "(change it with --set activation_order=…)"
        )
    values |= given
    if not source and values["stem"] == "imagenet" and "maxpool" not in given:
        notes.append("ASSUMED maxpool=padded, as torchvision's; Caffe's has the same tensors (--set maxpool=ceil)")
    if values["block"] == "bottleneck" and "stride_in" not in values:
        raise UsageError(
            "names and shapes do not determine where the bottlenecks have their stride: give --source torchvision (or "
            "timm:resnet50), or --set stride_in=3x3 (torchvision, timm, fb.resnet.torch) or --set stride_in=first (the "
            "paper, Caffe)."
        )
    if values["shortcut"] == "A":
        if "zero_pad" not in values:
            values["zero_pad"] = "centre" if state.has_linear else "append"
            reason = "the layer `linear`, as in akamaster's CIFAR nets" if state.has_linear else "no known source"
            notes.append(
                f"ASSUMED from {reason}: option A with zero_pad={values['zero_pad']}; change it with --set zero_pad=…"
            )
        if ACTIVATION_ORDERS[values["activation_order"]].preactivated and "preact_transition" not in given:
            notes.append(
                "ASSUMED preact_transition=shared; nets whose shortcuts take the raw input have the same tensors "
                "(--set preact_transition=raw)"
            )
        if "shortcut" not in given:
            notes.append(
                "ASSUMED: no projections, so shortcut=A; a plain net has the same tensors (--set shortcut=none)"
            )
    return Specification(**values), notes


def _check_architecture(source: str, architecture: str, values: Mapping[str, Any]) -> None:
    """Raises UsageError for an unsupported architecture of a library, or if timm's architecture is not given."""
    names = SUPPORTED.get(source, ())
    if architecture and architecture.split(".")[0] not in names:
        known = f"; use one of {', '.join(names)}" if names else ""
        raise UsageError(f"{source}'s {architecture} is not one of the papers' networks{known}.")
    if source == "timm" and not architecture:
        raise UsageError(
            "which of timm's networks is it? resnetaa50, resnetblur50 and similar ones have the same tensors but compute "
            "something else: give the name, such as --source timm:resnet50."
        )


def _infer_from_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The values of a specification that names and shapes determine."""
    stem, fc = tensors.get("conv1.weight"), tensors.get("fc.weight")
    units: dict[int, set[int]] = {}
    for name in tensors:
        if match := re.match(r"layer(\d+)\.(\d+)\.", name):
            units.setdefault(int(match[1]), set()).add(int(match[2]))
    if stem is not None and units and fc is None:
        raise ModelFileError(_describe_head(tensors))
    if stem is None or fc is None or not units or stem.dim() != 4 or fc.dim() != 2:
        found = {"conv1.weight": stem is not None, "layer1.0.conv1.weight": units, "fc.weight": fc is not None}
        missing = " and no ".join(name for name, exists in found.items() if not exists)
        first = ", ".join(list(tensors)[:5])
        raise ModelFileError(
            "the file does not hold a residual network of a known layout: conv1.weight, layer1.0.conv1.weight … and fc.weight "
            f"are expected, it has {first}{' …' if len(tensors) > 5 else ''}{f', but no {missing}' if missing else ''}."
        )
    if stem.shape[2] not in (3, 7):
        raise ModelFileError(
            f"conv1.weight is {_format_shape(stem)}; a stem of 3x3 (CIFAR) or 7x7 (ImageNet) is expected."
        )
    stages = range(1, len(units) + 1)
    if sorted(units) != list(stages) or any(units[i] != set(range(len(units[i]))) for i in stages):
        raise ModelFileError(
            f"stages or blocks are missing: there are only {_format_blocks(units)}; save the whole network."
        )
    bottleneck = _get_conv_weights(tensors, "layer1.0", 1)[0].shape[2] == 1
    layers = 3 if bottleneck else _count_layers(tensors)
    kernels = [_get_conv_weights(tensors, f"layer{i}.0", layers) for i in stages]
    widths = tuple(int(kernel[1 if bottleneck else 0].shape[0]) for kernel in kernels)
    depths = tuple(len(units[i]) for i in stages)
    values = {
        "block": "bottleneck" if bottleneck else "basic",
        "depths": depths,
        "widths": widths,
        "stem": "imagenet" if stem.shape[2] == 7 else "cifar",
        "shortcut": _infer_shortcut(tensors, depths),
        "activation_order": "preact" if "bn_last.weight" in tensors else "original",
        "conv1_bias": "conv1.bias" in tensors,
        "channels": int(stem.shape[1]),
        "classes": int(fc.shape[0]),
    }
    return values | ({} if bottleneck else {"layers": layers})


def _describe_head(tensors: Mapping[str, Tensor]) -> str:
    """What is wrong with the head of a network that has no fc.weight."""
    start = "its other layers can be a start: resnetlab train DATA --start-from FILE"
    if head := list_head(tensors):
        return f"the head is not one fully connected layer but {format_list(head, 6)}, which a residual network lacks; {start}."
    return f"the file holds a network without a head (there is no fc.weight), which classifies nothing; {start}."


def _count_layers(tensors: Mapping[str, Tensor]) -> int:
    """Counts the convolutions in F: the highest number in at least half of the units, so that one damaged unit is outvoted."""
    numbers: dict[int, set[str]] = {}
    for name in tensors:
        if match := _IN_UNIT.fullmatch(name):
            numbers.setdefault(int(match[2]), set()).add(match[1])
    units = {unit for found in numbers.values() for unit in found}
    return max([1, *(i for i, found in numbers.items() if 2 * len(found) >= len(units))])


def _get_conv_weights(tensors: Mapping[str, Tensor], unit: str, layers: int) -> list[Tensor]:
    """The convolution weights of a unit's F, each (C_out, C_in, k, k); raises ModelFileError if one is missing or not 4-D."""
    kernels = []
    for i in range(1, layers + 1):
        name = f"{unit}.conv{i}.weight"
        if name not in tensors:
            present = [other for other in tensors if other.startswith(f"{unit}.")]
            regular = re.compile(rf"{re.escape(unit)}\.((conv|bn)[1-9]\d*|downsample)\.")
            near = difflib.get_close_matches(name, [other for other in present if not regular.match(other)], n=1)
            raise ModelFileError(
                f"{name} is missing: its unit has only {format_list(present, 4)}; "
                + (f"{near[0]} is the closest, rename it." if near else "save the whole network.")
            )
        if tensors[name].dim() != 4:
            raise ModelFileError(
                f"{name} is {_format_shape(tensors[name])}; a convolution's weights, of 4 dimensions, are expected."
            )
        kernels.append(tensors[name])
    return kernels


def _infer_shortcut(tensors: Mapping[str, Tensor], depths: tuple[int, ...]) -> str:
    projected = {name.split(".downsample.")[0] for name in tensors if ".downsample." in name}
    if not projected:
        return "A"
    return "C" if len(projected) == sum(depths) > len(depths) else "B"


def _format_shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _format_blocks(units: Mapping[int, set[int]]) -> str:
    return ", ".join(f"layer{stage}.{{{','.join(map(str, sorted(found)))}}}" for stage, found in sorted(units.items()))


def build_from_state(state: StateDictFile, spec: Specification) -> ResNet:
    """Builds a network with the tensors of a state dict, in float32 and eval mode.

    BN's batch counters may be missing. Raises ModelFileError for any other missing, unexpected or misshapen tensor, with the
    nearest expected name.
    """
    with torch.device("meta"):
        net = ResNet(spec)
    expected = net.state_dict()
    tensors = dict(state.tensors)
    for name in expected:
        if name.endswith("num_batches_tracked"):
            tensors.setdefault(name, torch.zeros((), dtype=torch.long))
    if wrong := _describe_mismatch(tensors, expected):
        raise ModelFileError(
            f"the tensors do not fit the network that their names describe ({spec.block} blocks "
            f"{'-'.join(map(str, spec.depths))}, shortcut {spec.shortcut}): {wrong}."
        )
    float32 = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    nn.Module.load_state_dict(net, {name: float32[name].clone().contiguous() for name in expected}, assign=True)
    return net.eval().requires_grad_(True)


def fold_biases(state: StateDictFile, spec: Specification) -> StateDictFile:
    """The state dict without biases of convolutions before BN, which subtracts any constant; with a note if there were any.

    BN(conv(x) + b) is BN(conv(x)) with the running mean less b, and in training the batch's mean removes b.
    """
    with torch.device("meta"):
        blocks = list(ResNet(spec).blocks())
    tensors, folded = dict(state.tensors), 0
    pairs = [(f"{name}.{conv}", f"{name}.{norm}") for name, each in blocks for conv, norm in find_foldable_pairs(each)]
    for conv, norm in [*pairs, *((f"{name}.downsample.0", f"{name}.downsample.1") for name, _ in blocks)]:
        mean, bias = tensors.get(f"{norm}.running_mean"), tensors.get(f"{conv}.bias")
        if mean is not None and bias is not None and mean.shape == bias.shape:
            tensors[f"{norm}.running_mean"] = mean.float() - tensors.pop(f"{conv}.bias").float()
            folded += 1
    if not folded:
        return state
    note = f"{folded} biases of convolutions before BN, which it subtracts, are folded into its running means"
    return replace(state, tensors=tensors, notes=(*state.notes, note))


def _describe_mismatch(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Describes which tensors do not match, or returns an empty string."""
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} is {_format_shape(tensors[name])}, not {_format_shape(value)}"
        for name, value in expected.items()
        if name in tensors and tensors[name].shape != value.shape
    ]

    def nearest(name: str) -> str:
        near = difflib.get_close_matches(name, missing or list(expected), n=1)
        return f"{name} (nearest expected: {near[0]})" if near else name

    parts = [
        f"missing {format_list(missing, 4)}" if missing else "",
        f"not expected {format_list([*map(nearest, extra[:4]), *extra[4:]], 4)}" if extra else "",
        f"misshapen {format_list(misshapen, 4)}" if misshapen else "",
    ]
    return "; ".join(filter(None, parts))
