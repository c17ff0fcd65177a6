"""The specification of a network, and the names of specifications.

| name                      | what it is                                                           | source                |
|---------------------------|----------------------------------------------------------------------|-----------------------|
| `resnet20` … `resnet1202` | CIFAR nets of depth 6n+2, basic blocks, option A                     | 2015 §4.2             |
| `resnet164`, `resnet1001` | CIFAR nets of depth 9n+2, bottlenecks, option B                      | 2016, appendix        |
| `resnet18` … `resnet200`  | ImageNet nets, option B, stride in the first 1x1                     | 2015 Table 1; 2016 §5 |
| `resnet50v1.5` …          | the same with the stride in the 3x3, as torchvision, timm, fb.resnet | not in the papers     |
| `plain…`                  | the same without shortcuts                                           | 2015 §3.3             |
| `preresnet…`              | full pre-activation                                                  | 2016 §4.1             |
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from resnetlab.errors import ModelFileError, UsageError, unknown_name_error
from resnetlab.nn import shortcuts
from resnetlab.nn.blocks import ACTIVATION_ORDERS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor

S = TypeVar("S", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Specification:
    """Everything that determines a network's layers.

    docs/differences.md lists the defaults for what the papers leave open.
    """

    block: str  # "basic" (3x3 convolutions) or "bottleneck" (1x1, 3x3, 1x1)
    depths: tuple[int, ...]  # blocks in each stage
    widths: tuple[int, ...]  # channels of the 3x3 convolutions in each stage
    stem: str  # "cifar" (3x3, stride 1) or "imagenet" (7x7, stride 2, then a 3x3 max-pool of stride 2)
    shortcut: str = "A"  # nn.shortcuts.SHORTCUTS
    activation_order: str = "original"  # nn.blocks.ACTIVATION_ORDERS
    stride_in: str = "first"  # where a bottleneck has its stride: "first" (1x1) or "3x3"
    layers: int = 2  # convolutions in F of a basic block
    zero_pad: str = "append"  # where option A puts its zero channels: "append" or "centre"
    # the shortcut's input in pre-activated units that change shape without a projection: "shared" activation or "raw" x
    preact_transition: str = "shared"
    shortcut_scale: float = 0.5  # `constant`: factor of x
    residual_scale: float = 0.5  # `constant`: factor of F
    gate_bias: float = -6.0  # gates: initial bias b_g
    shortcut_dropout: float = 0.5  # `dropout`: rate
    maxpool: str = "padded"  # of the ImageNet stem: "padded" (1 pixel, as torchvision) or "ceil" (none, as Caffe)
    conv1_bias: bool = False  # the released Caffe ResNet-50 has one
    channels: int = 3  # of the input images
    classes: int = 1000

    def __post_init__(self) -> None:
        choices: dict[str, tuple[str, ...]] = {
            "block": ("basic", "bottleneck"),
            "stem": ("cifar", "imagenet"),
            "shortcut": shortcuts.SHORTCUTS,
            "activation_order": tuple(ACTIVATION_ORDERS),
            "stride_in": ("first", "3x3"),
            "zero_pad": ("append", "centre"),
            "preact_transition": ("shared", "raw"),
            "maxpool": ("padded", "ceil"),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise unknown_name_error(key, str(getattr(self, key)), known)
        for key in ("depths", "widths"):
            value = getattr(self, key)
            if not isinstance(value, list | tuple) or not value or not all(map(_is_count, value)):
                raise UsageError(f"{key} must be whole numbers from 1 up, one for each stage, not {value!r}.")
            object.__setattr__(self, key, tuple(value))
        if len(self.depths) != len(self.widths):
            raise UsageError(
                f"depths {self.depths} and widths {self.widths} differ in length; give one of each per stage."
            )
        pads = self.shortcut not in ("none", "B", *shortcuts.PROJECT_EVERYWHERE)
        if pads and list(self.widths) != sorted(self.widths):
            raise UsageError(
                f"widths {self.widths} shrink, but shortcut {self.shortcut!r} only adds channels; use 'B'."
            )
        for key in ("layers", "channels", "classes"):
            if not _is_count(value := getattr(self, key)):
                raise UsageError(f"{key} must be a whole number from 1 up, not {value!r}.")
        for key in ("shortcut_scale", "residual_scale", "gate_bias", "shortcut_dropout"):
            value = getattr(self, key)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise UsageError(f"{key} must be a finite number, not {value!r}.")
        if self.block == "bottleneck" and self.layers != 2:
            raise UsageError(
                f"a bottleneck always has three layers, so layers={self.layers} has no effect; leave it out."
            )
        if sum(self.depths) * self.layers > 100_000:
            raise UsageError(
                f"{sum(self.depths):,} blocks of {self.layers} layers are too many; the limit is 100,000 layers."
            )
        if not isinstance(self.conv1_bias, bool):
            raise UsageError(f"conv1_bias must be true or false, not {self.conv1_bias!r}.")
        if not 0 <= self.shortcut_dropout < 1:
            raise UsageError(f"shortcut_dropout must be in [0, 1), not {self.shortcut_dropout}.")

    @property
    def out_widths(self) -> tuple[int, ...]:
        """Output channels of each stage."""
        return tuple(4 * w if self.block == "bottleneck" else w for w in self.widths)

    @property
    def depth(self) -> int:
        """Layers as the papers count them: convolutions and the fully connected layer, without projections."""
        return 2 + sum(self.depths) * (3 if self.block == "bottleneck" else self.layers)

    @property
    def summary(self) -> str:
        """The network in a few words."""
        return f"{self.depth} layers, {self.block} blocks {'-'.join(map(str, self.depths))}"

    def canonical(self) -> Specification:
        """The same network, with the defaults for values that mean nothing for it, such as a basic block's `stride_in`."""
        projects = self.shortcut in ("B", *shortcuts.PROJECT_EVERYWHERE)
        used = {
            "stride_in": self.block == "bottleneck",
            "maxpool": self.stem == "imagenet",
            "zero_pad": not projects and self.shortcut != "none",
            "preact_transition": not projects and ACTIVATION_ORDERS[self.activation_order].preactivated,
            "shortcut_scale": self.shortcut == "constant",
            "residual_scale": self.shortcut == "constant",
            "gate_bias": self.shortcut in shortcuts.GATES,
            "shortcut_dropout": self.shortcut == "dropout",
        }
        defaults: dict[str, Any] = {field.name: field.default for field in fields(self)}
        return replace(self, **{key: defaults[key] for key, is_used in used.items() if not is_used})

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary, as in the model file."""
        return asdict(self) | {"depths": list(self.depths), "widths": list(self.widths)}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Specification:
        """Reads what `to_json` wrote; raises ModelFileError for keys or values that this version does not know."""
        return read_specification(Specification, values, "the specification")


def read_specification(kind: type[S], values: Mapping[str, Any], name: str) -> S:
    """A specification of a model file; raises ModelFileError for keys or values that this version does not know."""
    if unknown := sorted(set(values) - {f.name for f in fields(kind)}):
        raise ModelFileError(f"{name} has unknown keys {unknown}; it was written by a newer version of resnetlab.")
    try:
        return kind(**values)
    except (TypeError, UsageError) as error:
        raise ModelFileError(f"{name} cannot be used: {error}") from error


def check_network_size(spec: Specification, tensors: Mapping[str, Tensor]) -> None:
    """Raises ModelFileError if a file's network is far larger than its tensors: building it would take hours, or all memory."""
    weights = sum(9 * width**2 * (depth - 1) for width, depth in zip(spec.widths, spec.depths, strict=True))
    weights = max(weights, max(spec.widths) ** 2, spec.widths[0] * spec.channels)
    if sum(spec.depths) > len(tensors) or weights > sum(tensor.numel() for tensor in tensors.values()):
        raise ModelFileError("its specification is of a network far larger than its tensors")


def _is_count(value: Any) -> bool:
    """Whether a value is an integer from 1 to 10 million."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10_000_000


IMAGENET_DEPTHS = {  # depth: (block, blocks in each stage), 2015 Table 1; 200: 2016 §5
    18: ("basic", (2, 2, 2, 2)),
    34: ("basic", (3, 4, 6, 3)),
    50: ("bottleneck", (3, 4, 6, 3)),
    101: ("bottleneck", (3, 4, 23, 3)),
    152: ("bottleneck", (3, 8, 36, 3)),
    200: ("bottleneck", (3, 24, 36, 3)),
}
CIFAR_BOTTLENECK = (164, 1001)  # 9n+2, 2016 appendix; every other 6n+2 is a basic net
CIFAR_DEPTHS = (20, 32, 44, 56, 110, 1202)  # 2015 Table 6

_PREFIXES = {"resnet": {}, "plain": {"shortcut": "none"}, "preresnet": {"activation_order": "preact"}}
_OTHERS = re.compile(  # kinds of networks that other packages build
    r"wide|wrn|resnext|res2net|resnest|regnet|se_?-?resnet|resnet_?v2|resnet\d+[a-z]+$|densenet|vgg|alexnet|inception|xception|"
    r"mobilenet|efficientnet|convnext|nfnet|vit|deit|swin|beit|eva|mixer|yolo|clip"
)
_NAME = re.compile(r"(preresnet|resnet|plain)([1-9][0-9]*)(v1\.5)?")


def list_network_names() -> list[str]:
    """Lists the names of the papers' networks (other depths of 6n+2 are valid names too)."""
    depths = sorted({*CIFAR_DEPTHS, *CIFAR_BOTTLENECK, *IMAGENET_DEPTHS})
    names = [f"{prefix}{depth}" for prefix in _PREFIXES for depth in depths]
    return names + [f"resnet{depth}v1.5" for depth, (block, _) in IMAGENET_DEPTHS.items() if block == "bottleneck"]


def is_network_name(name: str) -> bool:
    """Whether a word has the form of a network's name."""
    return _NAME.fullmatch(name) is not None


def get_specification(name: str, **changes: Any) -> Specification:
    """The specification of a network name, with any of its values changed.

    >>> get_specification("resnet34", shortcut="C", classes=10).depth
    34

    Raises UsageError for an unknown name (the message suggests the nearest), an unknown key or a value out of range.
    """
    if not isinstance(name, str):
        raise UsageError(f"a network is given by its name, such as 'resnet50', not {name!r}.")
    match = _NAME.fullmatch(name)
    if not match:
        if name.endswith((".pt", ".pth", ".safetensors", ".ckpt", ".bin")) or ("/" in name and Path(name).exists()):
            raise UsageError(
                f"{name!r} is a path, not a network; weights bring theirs: `resnetlab train DATA --start-from {name}`, "
                f"in Python weights={name!r}."
            )
        if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
            raise UsageError(f"{name!r} is not a network; a model of the Hugging Face hub is weights, 'hf:{name}'.")
        if name.lower().strip("-_") in _PREFIXES or name.isdigit():
            raise UsageError(
                f"unknown network {name!r}; a name has the depth in it: resnet50, plain20 or preresnet110."
            )
        publisher, _, rest = name.rpartition(":")
        if is_network_name(net := rest.partition(".")[0]):
            weights = name if publisher else f"timm:{name}"
            raise UsageError(
                f"{name!r} names weights, not a network; give the network, {net!r}, and {weights!r} as its weights."
            )
        if _OTHERS.search(name.lower()):
            raise UsageError(
                f"{name!r} is not one of the papers' networks, which are built here (`resnetlab models` lists them); any "
                "torch.nn.Module, of torchvision or timm too, is trained from Python: resnetlab.train(data, net=module)."
            )
        raise unknown_name_error("network", name, list_network_names())
    prefix, depth, v15 = match[1], int(match[2]), match[3]
    known = [f.name for f in fields(Specification)]
    for key in changes:
        if key not in known:
            raise unknown_name_error("key of a network's specification", key, known)
    if depth in IMAGENET_DEPTHS:
        block, depths = IMAGENET_DEPTHS[depth]
        base = Specification(block=block, depths=depths, widths=(64, 128, 256, 512), stem="imagenet", shortcut="B")
    else:
        base = _cifar_specification(name, depth)
    if v15:
        if base.block != "bottleneck":
            raise UsageError(
                f"{name!r}: v1.5 moves a bottleneck's stride, and depth {depth} has no bottlenecks; use {prefix}{depth}."
            )
        base = replace(base, stride_in="3x3")
    return replace(base, **(_PREFIXES[prefix] | changes))


def _cifar_specification(name: str, depth: int) -> Specification:
    widths = (16, 32, 64)
    if depth in CIFAR_BOTTLENECK:
        n = (depth - 2) // 9
        return Specification(block="bottleneck", depths=(n,) * 3, widths=widths, stem="cifar", shortcut="B", classes=10)
    n, rest = divmod(depth - 2, 6)
    if rest or n < 1:
        raise UsageError(
            f"unknown network {name!r}: CIFAR nets have 6n+2 layers, so the nearest depths are {nearest_depths(depth)}; "
            f"ImageNet nets have {', '.join(map(str, IMAGENET_DEPTHS))}."
        )
    return Specification(block="basic", depths=(n,) * 3, widths=widths, stem="cifar", classes=10)


def nearest_depths(depth: int) -> str:
    """The two depths of basic CIFAR nets, 6n+2, nearest to a number of layers, as text: "20 and 26"."""
    others = {*IMAGENET_DEPTHS, *CIFAR_BOTTLENECK}  # their names are those of other networks
    basic = [d for d in range(max(8, depth - depth % 6 - 10), depth + 25, 6) if d not in others]
    return " and ".join(map(str, sorted(sorted(basic, key=lambda d: abs(d - depth))[:2])))


def parse_changes(pairs: Mapping[str, str]) -> dict[str, Any]:
    """Parses changes to a specification, as in `--set key=value`.

    Raises UsageError for an unknown key (the message suggests the nearest) or a value of the wrong type.
    """
    kinds = {f.name: str(f.type) for f in fields(Specification)}
    for key in pairs:
        if key not in kinds:
            raise unknown_name_error("key of a network's specification", key, kinds)
    return {key: parse_value(key, text, kinds[key]) for key, text in pairs.items()}


def parse_value(key: str, text: str, kind: str) -> Any:
    """Parses a value as a dataclass field's annotated type `kind`; raises UsageError if it is invalid."""
    try:
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text)
        if kind == "float":
            return float(text)
        if kind.startswith("tuple"):
            return tuple(int(part) for part in text.strip("[]() ").split(",") if part.strip())
        return text
    except (KeyError, ValueError):
        kinds = {"bool": "true or false", "int": "a whole number", "float": "a number"}
        raise UsageError(f"{key} takes {kinds.get(kind, 'whole numbers separated by commas')}, not {text!r}.") from None


def nearest_name(spec: Specification) -> tuple[str, dict[str, Any]]:
    """The name nearest to a specification, and the changes to it; without channels and classes."""
    own = asdict(spec.canonical())
    best: tuple[str, dict[str, Any]] | None = None
    for name in [*list_network_names(), *(f"{prefix}{spec.depth}" for prefix in _PREFIXES)]:
        try:
            named = asdict(get_specification(name).canonical())
        except UsageError:  # no network of the papers' kinds has this depth
            continue
        changes = {k: v for k, v in own.items() if v != named[k] and k not in ("channels", "classes")}
        if best is None or len(changes) < len(best[1]):
            best = name, changes
    assert best is not None
    return best
