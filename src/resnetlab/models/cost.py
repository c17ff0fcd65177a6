"""Parameters and multiply-adds of a network, per layer, with the papers' figures.

Multiply-adds are those of convolutions and fully connected layers, as the papers count them (2015 Table 1). The network runs
on the meta device, so nothing is computed. A test checks the counts against torch's flop counter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.errors import UsageError
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import Specification, get_specification

PAPER_MULTIPLY_ADDS = {18: 1.8e9, 34: 3.6e9, 50: 3.8e9, 101: 7.6e9, 152: 11.3e9}  # 2015 Table 1, at 224x224
PAPER_PARAMETERS = {20: 0.27e6, 32: 0.46e6, 44: 0.66e6, 56: 0.85e6, 110: 1.7e6, 1202: 19.4e6}  # 2015 Table 6
PREACT_PARAMETERS = {164: 1.7e6, 1001: 10.2e6}  # 2016 Table 4; the second is the count without BN's weights and biases


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

    image_size: tuple[int, int]
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
        return {
            "image_size": list(self.image_size),
            "depth": self.depth,
            "convolutions": self.convolutions,
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "paper_parameters": self.paper_parameters,
            "paper_multiply_adds": self.paper_multiply_adds,
            "source": self.source,
            "layers": [vars(layer) | {"output": list(layer.output)} for layer in self.layers],
        }


def count_parameters(net: nn.Module) -> int:
    """Counts the parameters; BN's weight and bias are included, its running statistics are not."""
    return sum(p.numel() for p in net.parameters())


def default_image_size(spec: Specification) -> int:
    """Side of the paper's images, in pixels: 32 (CIFAR) or 224 (ImageNet)."""
    return 32 if spec.stem == "cifar" else 224


def compute_cost(spec: Specification, image_size: tuple[int, int] | None = None) -> Cost:
    """Counts a network for one image of size (H, W) in pixels, by default the paper's.

    Raises UsageError for a size below 1 or above 100,000.
    """
    height, width = image_size or (default_image_size(spec),) * 2
    if min(height, width) < 1:
        raise UsageError(f"an image of {height}x{width} pixels has no pixel; give a size from 1 up.")
    if max(height, width) > 100_000:
        raise UsageError(f"an image of {height}x{width} pixels is too large; give a size up to 100,000.")
    with torch.device("meta"):
        net = ResNet(spec).eval()
        layers = _trace_layers(net, torch.empty(1, spec.channels, height, width))
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
    return (
        figures
        if spec == own and spec.shortcut in shortcuts and image_size == (default_image_size(spec),) * 2
        else None
    )


def _trace_layers(net: ResNet, x: Tensor) -> list[LayerCost]:
    """The layers in forward order."""
    names = {module: name for name, module in net.named_modules()}
    layers: list[LayerCost] = []

    def record(module: nn.Module, _: Any, y: Tensor) -> None:
        kind, output = type(module).__name__, tuple(y.shape[1:])
        layers.append(LayerCost(names[module], kind, output, count_parameters(module), _count_multiply_adds(module, y)))

    kinds = nn.Conv2d | nn.BatchNorm2d | nn.Linear
    hooks = [module.register_forward_hook(record) for module in net.modules() if isinstance(module, kinds)]
    net(x)
    for hook in hooks:
        hook.remove()
    return layers


def _count_multiply_adds(module: nn.Module, y: Tensor) -> int:
    """The number of weights times the number of output positions."""
    if isinstance(module, nn.Conv2d):
        return module.weight.numel() * y.shape[-2] * y.shape[-1]
    return module.weight.numel() if isinstance(module, nn.Linear) else 0
