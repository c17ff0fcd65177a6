"""Parameters and multiply-adds of a network, per layer, with the papers' figures.

Multiply-adds are those of convolutions and fully connected layers, as the papers count them (2015 Table 1). Tests check the
counts against torch's flop counter, and the layers against a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from resnetlab.errors import UsageError
from resnetlab.models.resnet import ResNet, warn_small_image
from resnetlab.models.spec import Specification, get_specification
from resnetlab.nn.blocks import Block

PAPER_MULTIPLY_ADDS = {18: 1.8e9, 34: 3.6e9, 50: 3.8e9, 101: 7.6e9, 152: 11.3e9}  # 2015 Table 1, at 224x224
PAPER_PARAMETERS = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6, 1202: 19.4e6}  # 2015 Table 6
PREACT_PARAMETERS = {164: 1.7e6, 1001: 10.2e6}  # 2016 Table 4; the second is the count without BN's weights and biases

Size = tuple[int, int]  # height and width, in pixels


@dataclass(frozen=True)
class LayerCost:
    """One convolution, BN or fully connected layer."""

    name: str
    kind: str
    output: tuple[int, ...]  # (C, H, W) or (classes,)
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Cost:
    """The cost of a network for one image of `image_size` (H, W), with the papers' rounded figures where they are published."""

    image_size: Size
    layers: tuple[LayerCost, ...]
    parameters: int
    multiply_adds: int
    depth: int
    convolutions: int
    paper_parameters: float | None
    paper_multiply_adds: float | None
    source: str | None  # the table that the published figures are from

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for `inspect --json`."""
        layers = [vars(layer) | {"output": list(layer.output)} for layer in self.layers]
        return vars(self) | {"image_size": list(self.image_size), "layers": layers}


def count_parameters(net: nn.Module) -> int:
    """Counts the parameters; BN's weight and bias are included, its running statistics are not."""
    return sum(p.numel() for p in net.parameters())


def default_image_size(spec: Specification) -> int:
    """Side of the paper's images, in pixels: 32 (CIFAR) or 224 (ImageNet)."""
    return 32 if spec.stem == "cifar" else 224


def compute_cost(spec: Specification, image_size: Size | None = None) -> Cost:
    """Counts a network for one image of size (H, W) in pixels, by default the paper's.

    Raises UsageError for a size below 1 or above 100,000.
    """
    height, width = image_size or (default_image_size(spec),) * 2
    if min(height, width) < 1:
        raise UsageError(f"an image of {height}x{width} pixels has no pixel; give a size from 1 up.")
    if max(height, width) > 100_000:
        raise UsageError(f"an image of {height}x{width} pixels is too large; give a size up to 100,000.")
    with torch.device("meta"):
        net = ResNet(spec)
    layers = _trace_layers(net, (height, width))
    published = _published_figures(spec, (height, width))
    return Cost(
        image_size=(height, width),
        layers=tuple(layers),
        parameters=count_parameters(net),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        depth=spec.depth,
        convolutions=sum(isinstance(m, nn.Conv2d) for m in net.modules()),
        paper_parameters=published and published[0],
        paper_multiply_adds=published and published[1],
        source=published and published[2],
    )


def compute_totals(spec: Specification) -> tuple[int, int]:
    """(parameters, multiply-adds) as `compute_cost` counts them for the paper's image size, in a fraction of its time.

    All blocks of a stage but the first are equal, so two of each stage are counted.
    """
    cost = compute_cost(replace(spec, depths=tuple(min(depth, 2) for depth in spec.depths)))
    parameters = multiply_adds = 0
    for layer in cost.layers:
        stage, _, rest = layer.name.partition(".")
        second = stage.startswith("layer") and rest.startswith("1.")
        times = spec.depths[int(stage.removeprefix("layer")) - 1] - 1 if second else 1
        parameters += times * layer.parameters
        multiply_adds += times * layer.multiply_adds
    return parameters, multiply_adds


def _published_figures(
    spec: Specification, image_size: tuple[int, int]
) -> tuple[float | None, float | None, str] | None:
    """(parameters, multiply-adds, table) if a paper publishes one of them for exactly this network and image size."""
    depth, shortcuts, name = spec.depth, {"none", "A"}, f"resnet{spec.depth}"
    figures: tuple[float | None, float | None, str]
    if spec.stem == "imagenet" and depth in PAPER_MULTIPLY_ADDS:
        figures = None, PAPER_MULTIPLY_ADDS[depth], "2015 Table 1"
        shortcuts = {"none", "A", "B"} if spec.block == "basic" else {"B"}
    elif spec.stem == "cifar" and spec.activation_order == "preact" and depth in PREACT_PARAMETERS:
        figures, name = (PREACT_PARAMETERS[depth], None, "2016 Table 4"), f"preresnet{depth}"
        shortcuts = {get_specification(name).shortcut}
    elif spec.stem == "cifar" and depth in PAPER_PARAMETERS:
        figures = PAPER_PARAMETERS[depth], None, "2015 Table 6"
    else:
        return None
    own = replace(get_specification(name), shortcut=spec.shortcut, zero_pad=spec.zero_pad)
    is_same = spec == own and spec.shortcut in shortcuts and image_size == (default_image_size(spec),) * 2
    return figures if is_same else None


def _trace_layers(net: ResNet, size: Size) -> list[LayerCost]:
    """The layers in forward order, for an image of this size.

    Shapes are computed here: running the network on the meta device would import torch's compiler, which takes seconds.
    """
    layers: list[LayerCost] = []

    def add(name: str, module: nn.Module, size: Size) -> Size:
        """Appends a layer with an input of this size; returns the size of its output."""
        output: tuple[int, ...] = (net.spec.classes,)
        multiply_adds = 0 if isinstance(module, nn.BatchNorm2d) else cast(Tensor, module.weight).numel()
        if isinstance(module, nn.Conv2d):  # odd kernels with half of their size as padding
            stride = module.stride[0]
            size = (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1
            output, multiply_adds = (module.out_channels, *size), multiply_adds * size[0] * size[1]
        elif isinstance(module, nn.BatchNorm2d):
            output = (module.num_features, *size)
        layers.append(LayerCost(name, type(module).__name__, output, count_parameters(module), multiply_adds))
        return size

    warn_small_image(net, size)
    size = add("conv1", net.conv1, size)
    add("bn1", net.bn1, size)
    if net.maxpool is not None:
        rounding = 1 if net.spec.maxpool == "padded" else 0
        size = (size[0] + rounding) // 2, (size[1] + rounding) // 2
    if 0 in size:
        raise UsageError("the image is too small for the network's max-pool; give a larger size.")
    for name, block in net.blocks():
        size = _trace_block(name, block, size, add)
    if net.bn_last is not None:
        add("bn_last", net.bn_last, size)
    add("fc", net.fc, size)
    return layers


def _trace_block(name: str, block: Block, size: Size, add: Callable[[str, nn.Module, Size], Size]) -> Size:
    """Adds the layers of a block in forward order; returns the size of its output."""
    order, modules, n, out = block.activation_order, dict(block.named_modules()), block.num_convs, size
    for i in range(1, n + 1):
        if "b" in order.before and f"bn{i}" in modules:
            add(f"{name}.bn{i}", modules[f"bn{i}"], out)
        out = add(f"{name}.conv{i}", modules[f"conv{i}"], out)
        if "b" in (order.between if i < n else order.last):
            add(f"{name}.bn{i}", modules[f"bn{i}"], out)
    for path, path_size in (("downsample.0", size), ("downsample.1", out), ("junction.conv", size)):
        if path in modules:
            add(f"{name}.{path}", modules[path], path_size)
    if "b" in order.after_add:
        add(f"{name}.bn{n}", modules[f"bn{n}"], out)
    return out
