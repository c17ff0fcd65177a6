"""What a network costs: parameters and multiply-adds, layer by layer, beside the papers' figures.

Multiply-adds are those of convolutions and fully connected layers, as the papers count them (2015 Table 1). The network runs
on the meta device, so nothing is computed; a test holds the counts against torch's own flop counter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from residuum.errors import UsageError
from residuum.models.resnet import ResNet
from residuum.models.spec import Specification, specification

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
    """What a network costs for one picture of `size`, with the papers' rounded figures where they print them."""

    size: tuple[int, int]
    layers: tuple[LayerCost, ...]
    parameters: int
    multiply_adds: int
    depth: int
    convolutions: int
    paper_parameters: float | None
    paper_multiply_adds: float | None
    source: str | None  # where the papers print it

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for `inspect --json`."""
        return {
            "size": list(self.size),
            "depth": self.depth,
            "convolutions": self.convolutions,
            "parameters": self.parameters,
            "multiply_adds": self.multiply_adds,
            "paper_parameters": self.paper_parameters,
            "paper_multiply_adds": self.paper_multiply_adds,
            "source": self.source,
            "layers": [vars(layer) | {"output": list(layer.output)} for layer in self.layers],
        }


def parameters(net: nn.Module) -> int:
    """The number of learned values; BN's weight and bias count, its running statistics do not."""
    return sum(p.numel() for p in net.parameters())


def natural_size(spec: Specification) -> int:
    """The size of picture that the paper's figures hold for, in pixels: 32 (CIFAR) or 224 (ImageNet)."""
    return 32 if spec.stem == "cifar" else 224


def cost(spec: Specification, size: tuple[int, int] | None = None) -> Cost:
    """Counts a network for one picture of size (H, W) in pixels; None takes the paper's size.

    Raises UsageError for a size below 1.
    """
    height, width = size or (natural_size(spec),) * 2
    if min(height, width) < 1:
        raise UsageError(f"a picture of {height}x{width} pixels has no pixel; give a size from 1 up.")
    if max(height, width) > 100_000:
        raise UsageError(f"a picture of {height}x{width} pixels is too large; give a size up to 100,000.")
    with torch.device("meta"):
        net = ResNet(spec).eval()
        layers = _run(net, torch.empty(1, spec.channels, height, width))
    printed = _printed(spec, (height, width))
    return Cost(
        size=(height, width),
        layers=tuple(layers),
        parameters=parameters(net),
        multiply_adds=sum(layer.multiply_adds for layer in layers),
        depth=spec.depth,
        convolutions=sum(isinstance(m, nn.Conv2d) for m in net.modules()),
        paper_parameters=printed and printed[0],
        paper_multiply_adds=printed and printed[1],
        source=printed and printed[2],
    )


def _printed(spec: Specification, size: tuple[int, int]) -> tuple[float | None, float | None, str] | None:
    """Parameters, multiply-adds and their place, where a paper prints one of them for this very network and picture size."""
    depth, shortcuts, name = spec.depth, {"none", "A"}, f"resnet{spec.depth}"
    figures: tuple[float | None, float | None, str]
    if spec.stem == "imagenet" and depth in PAPER_MULTIPLY_ADDS:
        figures = None, PAPER_MULTIPLY_ADDS[depth], "2015 Table 1"
        shortcuts = {"none", "A", "B"} if spec.block == "basic" else {"B"}
    elif spec.stem == "cifar" and spec.order == "preact" and depth in PREACT_PARAMETERS:
        figures, name = (PREACT_PARAMETERS[depth], None, "2016 Table 4"), f"preresnet{depth}"
        shortcuts = {specification(name).shortcut}
    elif spec.stem == "cifar" and depth in PAPER_PARAMETERS:
        figures = PAPER_PARAMETERS[depth], None, "2015 Table 6"
    else:
        return None
    own = replace(specification(name), shortcut=spec.shortcut, zeros=spec.zeros)
    return figures if spec == own and spec.shortcut in shortcuts and size == (natural_size(spec),) * 2 else None


def _run(net: ResNet, x: Tensor) -> list[LayerCost]:
    """The layers in the order in which they run."""
    names = {module: name for name, module in net.named_modules()}
    layers: list[LayerCost] = []

    def note(module: nn.Module, _: Any, y: Tensor) -> None:
        own = sum(p.numel() for p in module.parameters())
        layers.append(
            LayerCost(names[module], type(module).__name__, tuple(y.shape[1:]), own, _multiply_adds(module, y))
        )

    hooks = [
        m.register_forward_hook(note) for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)
    ]
    net(x)
    for hook in hooks:
        hook.remove()
    return layers


def _multiply_adds(module: nn.Module, y: Tensor) -> int:
    """Weights times output positions."""
    if isinstance(module, nn.Conv2d):
        return module.weight.numel() * y.shape[-2] * y.shape[-1]
    return module.weight.numel() if isinstance(module, nn.Linear) else 0
