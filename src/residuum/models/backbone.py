"""A classifier's network as the backbone of other programs' detectors and segmenters.

net = residuum.build("resnet50v1.5")
dilate(net, output_stride=16)                       # stages keep their map's size, convolutions spread instead
freeze(net, "C2")                                   # stem and first stage as they are
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
from torch.nn import functional as F

from residuum.errors import UsageError, unknown
from residuum.models.resnet import ResNet
from residuum.nn.blocks import Block
from residuum.nn.shortcuts import ZeroPad


@dataclass(frozen=True)
class Level:
    """One map of `net.features(x)`: its name ("C1" leaves the stem, "C2" the first stage), channels, pixels a step, module."""

    name: str
    channels: int
    stride: int
    module: str


def levels(net: ResNet) -> dict[str, Level]:
    """The maps of a network, shallow to deep, as it is now (`dilate` changes strides)."""
    stride = net.conv1.stride[0]
    found = [Level("C1", net.spec.widths[0], stride, "bn1")]
    stride *= 2 if net.maxpool is not None else 1
    for i, (stage, channels) in enumerate(zip(net.stages, net.spec.out_widths, strict=True), 1):
        for conv in _convolutions(cast(Block, stage[0])):
            stride *= conv.stride[0]
        found.append(Level(f"C{i + 1}", channels, stride, f"layer{i}"))
    return {level.name: level for level in found}


def _convolutions(block: Block) -> list[nn.Conv2d]:
    """The convolutions of F, in their order."""
    return [cast(nn.Conv2d, block.get_submodule(f"conv{i}")) for i in range(1, block.depth + 1)]


def dilate(net: ResNet, output_stride: int) -> None:
    """Keeps the map's size from `output_stride` pixels a step on: strides become 1, later 3x3 convolutions spread by as much.

    Every unit then sees the inputs it saw before: the new map, sampled at the old steps, is the old map, to the bit but for
    rounding (Chen et al., arXiv 1412.7062, "à trous"). timm's `output_stride` and torchvision's `replace_stride_with_dilation`.

    Raises UsageError for a stride that the network does not pass through, or where it is done already.
    """
    if any(conv.dilation[0] > 1 for _, block in net.blocks() for conv in _convolutions(block)):
        raise UsageError("the network is dilated already; build it anew for another output stride.")
    before = levels(net)
    strides = [level.stride for level in before.values()][1:]
    if output_stride not in strides:
        raise UsageError(
            f"output_stride must be one of {', '.join(map(str, sorted(set(strides))))}, not {output_stride}."
        )
    dilation = 1
    for stage, stride in zip(net.stages, strides, strict=True):
        entering, dilation = dilation, max(1, stride // output_stride)
        for i, block in enumerate(stage):
            _spread(cast(Block, block), entering if i == 0 else dilation, dilation)


def _spread(block: Block, entering: int, leaving: int) -> None:
    """Removes a block's stride where its stage spreads; what comes before the stride keeps the dilation it had."""
    if leaving == 1:
        return
    here = leaving if all(conv.stride[0] == 1 for conv in _convolutions(block)) else entering
    for conv in _convolutions(block):
        conv.padding = tuple(here * (k // 2) for k in conv.kernel_size)
        conv.dilation = (here, here)
        if conv.stride[0] > 1:
            conv.stride, here = (1, 1), leaving
    for module in (m for part in (block.downsample, block.junction) if part is not None for m in part.modules()):
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
        elif isinstance(module, ZeroPad):
            module.stride = 1


class FixedBatchNorm(nn.BatchNorm2d):
    """BN as the constant affine map of its statistics, in training too (2015, appendix A); nothing in it learns."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


def fix_bn(module: nn.Module) -> None:
    """Replaces every BN inside a module by its fixed form; names and values stay."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            fixed = FixedBatchNorm(child.num_features, child.eps, device=child.weight.device, dtype=child.weight.dtype)
            fixed.load_state_dict(child.state_dict())
            setattr(module, name, fixed.requires_grad_(False).train(child.training))
        else:
            fix_bn(child)


def freeze(net: ResNet, last: str) -> None:
    """Lets nothing learn up to and including the map `last` ("C1": the stem): weights stay, and BN is fixed.

    Raises UsageError for a name that is no map of the network.
    """
    known = list(levels(net))
    if last not in known:
        raise unknown("map", last, known)
    stem = nn.ModuleDict({"conv1": net.conv1, "bn1": net.bn1})
    fix_bn(stem)
    net.bn1 = cast(nn.BatchNorm2d, stem["bn1"])
    for part in (stem, *net.stages[: known.index(last)]):
        fix_bn(part)
        part.requires_grad_(False)


class Backbone(nn.Module):
    """Chosen maps of a network as a dictionary, for torchvision's detectors and segmenters and its feature pyramid.

    Attributes:
        channels, reduction: of each map, in order.
        out_channels: of the one map, or of the last where there are several (a pyramid over them has a number of its own).
    """

    def __init__(self, net: ResNet, names: Mapping[str, str]) -> None:
        """Takes `names`, what each map is to be called, such as {"C2": "0", "C5": "out"}; raises UsageError for no map."""
        super().__init__()
        known = levels(net)
        for name in names:
            if name not in known:
                raise unknown("map", name, known)
        self.body, self.names = net, dict(names)
        self.deepest = max(names, key=list(known).index)
        self.channels = [known[name].channels for name in names]
        self.reduction = [known[name].stride for name in names]
        self.out_channels = self.channels[-1]

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = self.body.features(x, self.deepest)
        return OrderedDict((new, maps[name]) for name, new in self.names.items())


class Features(nn.Module):
    """Chosen maps of a network as a list, as timm's `features_only=True` gives them."""

    def __init__(self, net: ResNet, names: Sequence[str] = ()) -> None:
        super().__init__()
        self.backbone = Backbone(net, {name: name for name in names or levels(net)})
        self.feature_info = FeatureInfo([levels(net)[name] for name in self.backbone.names])

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.backbone(x).values())


@dataclass(frozen=True)
class FeatureInfo:
    """What timm's models tell of their maps."""

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
    """The maps of a network, the picture itself first, as segmentation_models_pytorch asks of an encoder.

    Either in the place of a model's own, `model.encoder = Encoder(net)`, where both have the same channels, or by a name:

        smp.encoders.encoders["ours"] = {"encoder": Encoder, "params": {"net": net}}
        smp.Unet("ours", encoder_weights=None, classes=3)

    Attributes:
        out_channels: of the picture and of each map.
        output_stride: of the last map.
    """

    def __init__(self, net: ResNet, depth: int = 5, output_stride: int = 32) -> None:
        """Takes the first `depth` maps; a network whose last one is coarser than `output_stride` is dilated, in place."""
        super().__init__()
        if output_stride < list(levels(net).values())[-1].stride:
            dilate(net, output_stride)
        taken = list(levels(net).values())[:depth]
        self.features = Features(net, [level.name for level in taken])
        self.out_channels = [net.spec.channels, *(level.channels for level in taken)]
        self.output_stride = taken[-1].stride

    def set_in_channels(self, in_channels: int, pretrained: bool = True) -> None:
        """Raises UsageError for another number than the network has: its specification says it."""
        if in_channels != self.out_channels[0]:
            has = self.out_channels[0]
            raise UsageError(f"the network takes pictures of {has} channels, not {in_channels}; build it with as many.")

    def make_dilated(self, output_stride: int) -> None:
        """Nothing that `__init__` has not done."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x, *self.features(x)]
