"""A classifier's network as the backbone of other programs' detectors and segmenters.

net = resnetlab.build("resnet50v1.5")
dilate(net, output_stride=16)                       # later stages keep the map's size and dilate their convolutions
freeze(net, "C2")                                   # stem and first stage do not train
fix_bn(net)                                         # BN as a constant affine map (2015, appendix A)
Backbone(net, {"C2": "0", "C3": "1"})               # torchvision: a dictionary of maps, `out_channels`
Features(net, ("C2", "C3"))                         # timm's features_only: a list, `feature_info`
Encoder(net)                                        # segmentation_models_pytorch: [x, C1, …, C5], `out_channels`
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from resnetlab.errors import UsageError, unknown_name_error
from resnetlab.formatting import format_count
from resnetlab.models.resnet import ResNet
from resnetlab.nn.batchnorm import fix_bn
from resnetlab.nn.blocks import Block
from resnetlab.nn.shortcuts import ZeroPad


@dataclass(frozen=True)
class Level:
    """One feature map of `net.features(x)`: name ("C1": the stem's, "C2": the first stage's), channels, stride, module."""

    name: str
    channels: int
    stride: int
    module: str


def levels(net: ResNet) -> dict[str, Level]:
    """The feature maps of a network, shallow to deep, with their present strides (`dilate` changes them)."""
    stride = net.conv1.stride[0]
    maps = [Level("C1", net.spec.widths[0], stride, "bn1")]
    stride *= 2 if net.maxpool is not None else 1
    for i, (stage, channels) in enumerate(zip(net.stages, net.spec.out_widths, strict=True), 1):
        for conv in cast(Block, stage[0]).convs:
            stride *= conv.stride[0]
        maps.append(Level(f"C{i + 1}", channels, stride, f"layer{i}"))
    return {level.name: level for level in maps}


def find_level(net: ResNet, name: str, kind: str = "map") -> Level:
    """The feature map of a name, "C2", or of the module that gives it, "layer1".

    Raises UsageError for another name; `kind` is what the message calls it.
    """
    maps = levels(net)
    if not isinstance(name, str):
        named = ", ".join(f"{level.name!r} ({level.module})" for level in maps.values())
        raise UsageError(f"a {kind} is one of {named}, not {name!r}.")
    by_name = maps | {level.module: level for level in maps.values()}
    if name not in by_name:
        raise unknown_name_error(kind, name, by_name)
    return by_name[name]


def dilate(net: ResNet, output_stride: int) -> None:
    """Limits a network to an output stride: later strides become 1, and later 3x3 convolutions are dilated by as much.

    Every unit keeps its receptive field: the new map, sampled at the old stride, is the old map up to rounding (Chen et al.,
    arXiv 1412.7062, "à trous"). As timm's `output_stride` and torchvision's `replace_stride_with_dilation`.

    Raises UsageError for a stride that no map of the network has, or if the network is dilated already.
    """
    if any(conv.dilation[0] > 1 for _, block in net.blocks() for conv in block.convs):
        raise UsageError("the network is dilated already; build a new one for another output stride.")
    strides = [level.stride for level in levels(net).values()][1:]
    if output_stride not in strides:
        raise UsageError(
            f"output_stride must be one of {', '.join(map(str, sorted(set(strides))))}, not {output_stride}."
        )
    dilation = 1
    for stage, stride in zip(net.stages, strides, strict=True):
        previous, dilation = dilation, max(1, stride // output_stride)
        for i, block in enumerate(stage):
            _dilate_block(cast(Block, block), previous if i == 0 else dilation, dilation)


def _dilate_block(block: Block, before: int, after: int) -> None:
    """Removes a block's stride; convolutions up to the stride get the dilation `before`, later ones `after`."""
    if after == 1:
        return
    dilation = after if all(conv.stride[0] == 1 for conv in block.convs) else before
    for conv in block.convs:
        conv.padding = tuple(dilation * (k // 2) for k in conv.kernel_size)
        conv.dilation = (dilation, dilation)
        if conv.stride[0] > 1:
            conv.stride, dilation = (1, 1), after
    for module in (m for branch in (block.downsample, block.junction) if branch is not None for m in branch.modules()):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, ZeroPad):
            module.stride = 1


def modules_up_to(net: ResNet, last: str, kind: str = "map") -> list[nn.Module]:
    """The stem's convolution and BN, and the stages up to and including the map `last` ("C1": the stem).

    Raises UsageError for a name that is not a map of the network; `kind` is what the message calls it.
    """
    return [net.conv1, net.bn1, *net.stages[: int(find_level(net, last, kind).name[1:]) - 1]]


def freeze(net: ResNet, last: str) -> None:
    """Freezes everything up to and including the map `last`: weights and BN statistics stay.

    "C1" is the stem, "C2" the first stage, which "layer1" names too. Freeze after torch's `convert_sync_batchnorm`, which
    makes every BN train.

    Raises UsageError for a name that is not a map of the network.
    """
    frozen = nn.ModuleList(modules_up_to(net, last))
    fix_bn(frozen)
    net.bn1 = cast(nn.BatchNorm2d, frozen[1])
    frozen.requires_grad_(False)


def prepare_backbone(net: ResNet, frozen: str, bn: str) -> None:
    """Removes the classifier, and freezes stages and BN as `frozen` and `bn` of a `HeadSpec` say."""
    net.fc = cast(nn.Linear, nn.Identity())
    if frozen:
        freeze(net, frozen)
    if bn == "fixed":
        fix_bn(net)


class Backbone(nn.Module):
    """Selected maps of a network as a dictionary, for torchvision's detectors and segmenters and its feature pyramid.

    Attributes:
        channels: of each map, in order.
        reduction: stride of each map.
        out_channels: channels of the last map.
    """

    def __init__(self, net: ResNet, names: Mapping[str, str]) -> None:
        """`names` gives each map its key, such as {"C2": "0", "layer4": "out"}; raises UsageError for an unknown map."""
        super().__init__()
        found = {find_level(net, name): key for name, key in names.items()}
        self.body, self.names = net, {level.name: key for level, key in found.items()}
        self.deepest = max(self.names)
        self.channels = [level.channels for level in found]
        self.reduction = [level.stride for level in found]
        self.out_channels = self.channels[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body.features(x, self.deepest)
        return OrderedDict((new, maps[name]) for name, new in self.names.items())


class Features(nn.Module):
    """Selected maps of a network as a list, as timm's `features_only=True` returns them."""

    def __init__(self, net: ResNet, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.backbone = Backbone(net, {name: name for name in names or levels(net)})
        self.feature_info = FeatureInfo([levels(net)[name] for name in self.backbone.names])

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.backbone(x).values())


@dataclass(frozen=True)
class FeatureInfo:
    """Information on maps, as timm's models have it."""

    maps: list[Level]

    def channels(self) -> list[int]:
        return [level.channels for level in self.maps]

    def reduction(self) -> list[int]:
        return [level.stride for level in self.maps]

    def module_name(self) -> list[str]:
        return [level.module for level in self.maps]

    def get_dicts(self) -> list[dict[str, Any]]:
        return [{"num_chs": m.channels, "reduction": m.stride, "module": m.module} for m in self.maps]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.get_dicts())


class Encoder(nn.Module):
    """The image and the maps of a network, as an encoder of segmentation_models_pytorch.

    Either replace a model's own, `model.encoder = Encoder(net)`, if both have the same channels, or register it by name:

        smp.encoders.encoders["ours"] = {"encoder": Encoder, "params": {"net": net}}
        smp.Unet("ours", encoder_weights=None, classes=3)

    Attributes:
        out_channels: channels of the image and of each map.
        output_stride: stride of the last map.
    """

    def __init__(self, net: ResNet, depth: int = 5, output_stride: int = 32) -> None:
        """Uses the first `depth` maps; dilates the network, in place, if its last map is coarser than `output_stride`."""
        super().__init__()
        if output_stride < list(levels(net).values())[-1].stride:
            dilate(net, output_stride)
        maps = list(levels(net).values())[:depth]
        self.features = Features(net, [level.name for level in maps])
        self.out_channels = [net.spec.channels, *(level.channels for level in maps)]
        self.output_stride = maps[-1].stride

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Raises UsageError for another number of channels than the network's specification has."""
        if in_channels != self.out_channels[0]:
            has = self.out_channels[0]
            raise UsageError(
                f"the network takes images of {format_count(has, 'channel')}, not {in_channels}; build it with as many."
            )

    def make_dilated(self, output_stride: int) -> None:
        """Does nothing: `__init__` has dilated the network."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, *self.features(x)]
