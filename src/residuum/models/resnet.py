"""Assembly of a network from its specification, and all initialisation.

Attribute names are torchvision's (`conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`), so that a `state_dict`
moves both ways.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residuum.errors import UsageError
from residuum.models.spec import Specification, specification
from residuum.nn import shortcuts
from residuum.nn.blocks import ORDERS, Block, Layer, ShortcutOptions, basic, bottleneck


class SmallPictureWarning(UserWarning):
    """Pictures of 64 px or less go into a network whose stem is made for ImageNet."""


class ResNet(nn.Module):
    """A residual (or plain) network: stem, stages of blocks, global average pool, fully connected layer (2015 §3.3, §4.2).

    Shapes: (B, channels, H, W) -> logits (B, classes). H and W may be any size; a stage of stride 2 halves it, rounded up.

    Attributes:
        recompute: while training, keep the maps between groups of about √n of the n blocks only, and compute the others again
            in the backward pass (Chen et al. 2016, arXiv 1604.06174).
    """

    recompute = False

    def __init__(self, spec: Specification) -> None:
        super().__init__()
        self.spec = spec
        order = ORDERS[spec.order]
        width = spec.widths[0]
        if spec.stem == "imagenet":
            self.conv1 = nn.Conv2d(spec.channels, width, 7, stride=2, padding=3, bias=spec.conv1_bias)
            # 3x3 windows of stride 2: torchvision's start one pixel outside, Caffe's inside and run over the far edge
            padding = {"padding": 1} if spec.maxpool == "padded" else {"ceil_mode": True}
            self.maxpool: nn.Module | None = nn.MaxPool2d(3, stride=2, **padding)
        else:
            self.conv1 = nn.Conv2d(spec.channels, width, 3, padding=1, bias=spec.conv1_bias)
            self.maxpool = None
        self.bn1 = nn.BatchNorm2d(width)
        c_in = width
        for i, blocks in enumerate(_plan(spec), 1):
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
            c_in = spec.out_widths[i - 1]
        # A pre-activated net ends in one extra activation, before pooling (2016, appendix).
        self.bn_last = nn.BatchNorm2d(c_in) if "b" in order.before else None
        self.fc = nn.Linear(c_in, spec.classes)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages, shallow to deep."""
        return [cast(nn.Sequential, getattr(self, f"layer{i}")) for i in range(1, len(self.spec.depths) + 1)]

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Every block with its name, in the order of the forward pass."""
        for i, stage in enumerate(self.stages, 1):
            for j, block in enumerate(stage):
                yield f"layer{i}.{j}", cast(Block, block)

    def features(self, x: Tensor, last: str | None = None) -> dict[str, Tensor]:
        """The maps that leave the stem ("C1") and each stage ("C2", …); the last one as the classifier sees it, unpooled.

        Args:
            last: the deepest map that is asked for; None for all. `models.backbone.levels` tells their channels and strides.
        """
        if self.maxpool is not None and min(x.shape[-2:]) <= 64:
            _warn_small(x, 2 ** (len(self.spec.depths) + 1))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (B, width, H', W')
        maps = {"C1": x}
        if self.maxpool is not None:
            x = self.maxpool(x)
        for i in range(1, len(self.spec.depths) + 1):
            if last in maps:
                return maps
            stage = cast(nn.Sequential, self.get_submodule(f"layer{i}"))
            x = maps[f"C{i + 1}"] = self._in_groups(stage, x) if self.recompute and self.training else stage(x)
        if ORDERS[self.spec.order].preactivated:
            x = F.relu(x if self.bn_last is None else self.bn_last(x))
            maps[f"C{len(self.spec.depths) + 1}"] = x
        return maps

    def _in_groups(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        """A stage, of which the backward pass finds the maps between groups of blocks and computes the others again."""
        from torch.utils.checkpoint import checkpoint

        size = max(1, round(math.sqrt(sum(self.spec.depths))))
        for start in range(0, len(stage), size):
            group = stage[start : start + size]
            contexts = partial(_contexts, group)
            x = checkpoint(group, x, use_reentrant=False, context_fn=contexts)
        return x

    def last_map(self, x: Tensor) -> Tensor:
        """The map that the classifier pools; (B, C, h, w)."""
        return self.features(x)[f"C{len(self.spec.depths) + 1}"]

    def class_maps(self, x: Tensor, window: tuple[int, int] = (1, 1)) -> Tensor:
        """Logits at every position, the fully connected layer as a 1x1 convolution; (B, classes, h', w').

        Before it stands an average over `window` positions of the last map, with stride 1: (1, 1) leaves the map as it is; the
        map of the training size gives what the network would say of every crop of that size (2015 §4.1, fully convolutional).
        """
        last = self.last_map(x)
        if window != (1, 1):
            last = F.avg_pool2d(last, window, stride=1)
        return F.conv2d(last, self.fc.weight[:, :, None, None], self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        last = self.last_map(x)
        return cast(Tensor, self.fc(last.mean((2, 3))))  # (B, C, h, w) -> (B, C) -> (B, classes)


def _contexts(net: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Of the forward pass, and of the second one that computes its maps again."""
    return contextlib.nullcontext(), _statistics_left_alone(net)


@contextlib.contextmanager
def _statistics_left_alone(net: nn.Module) -> Iterator[None]:
    """BN as in training, but without a second update of its moving averages by pictures that it has seen."""
    modules = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.momentum, m.num_batches_tracked) for m in modules]
    for module in modules:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, (momentum, count) in zip(modules, before, strict=True):
            module.momentum, module.num_batches_tracked = momentum, count


def _plan(spec: Specification) -> Iterator[list[Block]]:
    """The blocks of each stage."""
    order = ORDERS[spec.order]
    options = ShortcutOptions(
        name=spec.shortcut,
        zeros=spec.zeros,
        scale=spec.shortcut_scale,
        residual_scale=spec.residual_scale,
        gate_bias=spec.gate_bias,
        dropout=spec.shortcut_dropout,
    )
    c_in = spec.widths[0]
    for stage, (depth, width, c_out) in enumerate(zip(spec.depths, spec.widths, spec.out_widths, strict=True)):
        blocks = []
        for i in range(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            entry = "done" if stage == i == 0 else _entry(spec, reshapes=c_in != c_out or stride != 1)
            blocks.append(Block(_layers(spec, c_in, width, stride), order, options, entry))
            c_in = c_out
        yield blocks


def _layers(spec: Specification, c_in: int, width: int, stride: int) -> list[Layer]:
    if spec.block == "bottleneck":
        return bottleneck(c_in, width, stride, spec.stride_site)
    return basic(c_in, width, stride, spec.layers)


def _entry(spec: Specification, reshapes: bool) -> str:
    """Whether a pre-activated unit shares its first activation with the shortcut (2016, appendix)."""
    projects = spec.shortcut in shortcuts.PROJECT_EVERYWHERE or (spec.shortcut == "B" and reshapes)
    return "shared" if projects or (reshapes and spec.boundary == "shared") else "inside"


def _warn_small(x: Tensor, stride: int) -> None:
    height, width = x.shape[-2:]
    warnings.warn(
        f"pictures of {height}x{width} pixels in a network with ImageNet's 7x7 stem, which leaves them "
        f"{math.ceil(height / stride)}x{math.ceil(width / stride)} at the end; "
        "take a CIFAR net such as resnet20 or resnet56 instead.",
        SmallPictureWarning,
        stacklevel=3,
    )


def build(name: str, *, init: str = "fan_in", seed: int | None = None, **changes: Any) -> ResNet:
    """Builds and initialises a network by name.

    Args:
        name: a name of `residuum.models.spec`, such as "resnet20", "plain34", "preresnet164" or "resnet50v1.5".
        init: "fan_in" or "fan_out", the n of He et al.'s N(0, sqrt(2/n)) (arXiv 1502.01852).
        seed: initialise from this seed; None takes torch's global generator.
        **changes: any value of the specification, such as classes=10, channels=1, shortcut="C" or order="preact".

    Returns:
        A network in training mode, float32 (B, channels, H, W) -> logits (B, classes); its `spec` says what it is.

    Raises:
        UsageError: a name, key or value that is not known (the nearest known one is named).
    """
    return assemble(specification(name, **changes), init=init, seed=seed)


def assemble(
    spec: Specification, *, init: str = "fan_in", seed: int | None = None, zero_last_bn: bool = False
) -> ResNet:
    """The network of a specification, initialised."""
    with torch.device("meta"):
        net = ResNet(spec)
    initialise(net.to_empty(device="cpu"), init, seed, zero_last_bn)
    return net


def initialise(net: ResNet, init: str = "fan_in", seed: int | None = None, zero_last_bn: bool = False) -> None:
    """Sets every parameter and statistic: the one place where networks get their first values.

    Convolutions: N(0, sqrt(2/n)), n = k²·C_in ("fan_in") or k²·C_out ("fan_out"). BN: weight 1, bias 0, mean 0, variance 1.
    fc: uniform in ±1/sqrt(C), bias 0. Gates: bias b_g of the specification (2016 §3.1).

    Args:
        zero_last_bn: the BN that ends F starts at weight 0, so that a block starts as its shortcut (Goyal et al. 2017 §5.1).

    Raises UsageError for another `init` or seed, or where F does not end in a BN.
    """
    if zero_last_bn and ORDERS[net.spec.order].last != "b":  # a ReLU after it would let no gradient through
        raise UsageError(f"zero_init_last_bn needs an F that ends in BN, which order {net.spec.order!r} has not.")
    if init not in ("fan_in", "fan_out"):
        raise UsageError(f"init must be 'fan_in' or 'fan_out', not {init!r}.")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise UsageError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}.")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=init, nonlinearity="relu", generator=generator)  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, shortcuts.Gate):
            nn.init.constant_(cast(Tensor, module.conv.bias), module.initial_bias)
    if zero_last_bn:
        for _, block in net.blocks():
            nn.init.zeros_(cast(Tensor, block.get_submodule(f"bn{block.depth}").weight))
