"""Measurements inside a network: layer responses, and forward and backward signals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.device import eval_mode
from resnetlab.models.lesion import copy_sharing_weights
from resnetlab.models.resnet import ResNet
from resnetlab.nn.blocks import Block
from resnetlab.nn.shortcuts import ScaledShortcut


class LayerSignal(NamedTuple):
    """One layer in a training step: the variance of its BN's output and the mean per-image norm of the gradient there."""

    layer: str
    variance: float
    gradient: float


class UnitActivations(NamedTuple):
    """One residual unit in a forward pass: x_l, F(x_l) and x_{l+1} of 2016 eq. 1; (B, C, H, W) each."""

    block: str
    x: Tensor
    residual: Tensor
    y: Tensor


class IdentityFlow(NamedTuple):
    """One unit compared with the output x_L of the last unit of its stage (2016 eq. 4 and 5).

    Attributes:
        deviation: largest |x_L - P·x_l - sum of F'| as a fraction of the largest |x_L|; P is `product`, and F' is F with its
            scale and those of the shortcuts behind it (2016 eq. 7), which are 1 for identity shortcuts.
        gradient_ratio: |dE/dx_l| / |dE/dx_L|, norms over all images.
        additive: |dE/dx_l - P·dE/dx_L| / |dE/dx_L|: the term that passes through weight layers.
        cosine: similarity of dE/dx_l and dE/dx_L.
        product: of the shortcuts' scales from here to the stage's end (2016 eq. 8); 1 for identity shortcuts.
        passed: the same, measured: the share of dE/dx_L that reaches x_l where nothing goes back through F.
    """

    block: str
    deviation: float
    gradient_ratio: float
    additive: float
    cosine: float
    product: float
    passed: float


def measure_responses(net: ResNet, x: Tensor) -> dict[str, float]:
    """Measures the standard deviation of every layer's response: BN's output, before ReLU and addition (2015 Fig. 7).

    It is taken over all images, channels and positions, in eval mode; projections are excluded.

    Args:
        x: normalised images, (B, C, H, W).

    Returns:
        Name of the BN -> standard deviation, in forward order.
    """
    found: dict[str, float] = {}

    def record(name: str, y: Tensor) -> None:
        found[name] = float(y.float().std())

    with eval_mode(net):
        _forward_with_hook(net, record, x)
    return found


def measure_signals(net: ResNet, x: Tensor, labels: Tensor) -> list[LayerSignal]:
    """Measures the signals of a training step, with BN's batch statistics; `net` is not changed.

    Args:
        x: normalised images, (B, C, H, W).
        labels: int64 (B,).
    """
    net = copy.deepcopy(net).train()  # BN in training mode changes its running statistics
    variances: dict[str, float] = {}
    gradients: dict[str, float] = {}

    def record(name: str, y: Tensor) -> None:
        variances[name] = float(y.detach().float().var())
        y.register_hook(  # type: ignore[no-untyped-call]
            lambda g: gradients.__setitem__(name, float(g.float().flatten(1).norm(dim=1).mean()))
        )

    logits = _forward_with_hook(net, record, x)
    F.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    return [LayerSignal(name, variances[name], gradients[name]) for name in variances]


def trace_units(net: ResNet, x: Tensor) -> tuple[list[UnitActivations], Tensor]:
    """Runs a residual net and returns the activations of every unit, and the logits (B, classes)."""
    net = copy_sharing_weights(net).train(net.training)
    inputs: dict[str, Tensor] = {}
    residuals: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, block in net.blocks():
        _record_unit(block, name, inputs, residuals, outputs)
    logits = net(x)
    return [UnitActivations(name, inputs[name], residuals[name], outputs[name]) for name in outputs], logits


def measure_identity_flow(net: ResNet, x: Tensor, labels: Tensor) -> list[IdentityFlow]:
    """Measures how far each unit is from x_L = x_l + sum of F (2016 eq. 4; eq. 7), and the terms of its gradient (eq. 5; 8).

    Computed in float64 and eval mode. Units that change the shape are excluded, as in the paper's equations. `net` is not
    changed.
    """
    net = copy.deepcopy(net).double().eval()
    units = _backpropagate(net, x.double(), labels)
    shortcuts_alone = copy.deepcopy(net)
    for _, block in shortcuts_alone.blocks():
        block.residual = lambda x, f=block.residual: f(x.detach())  # type: ignore[method-assign, misc]
    through_shortcuts = {unit.block: unit for unit in _backpropagate(shortcuts_alone, x.double(), labels)}
    scales = {
        name: (b.junction.shortcut, b.junction.residual) if isinstance(b.junction, ScaledShortcut) else (1.0, 1.0)
        for name, b in net.blocks()
    }
    found = []
    for stage in range(1, len(net.spec.depths) + 1):
        inside = [unit for unit in units if unit.block.startswith(f"layer{stage}.") and unit.x.shape == unit.y.shape]
        last = inside[-1] if inside else None
        for i, unit in enumerate(inside):
            assert last is not None and last.y.grad is not None and unit.x.grad is not None
            expected, product = unit.x.detach(), 1.0
            for each in inside[i:]:
                shortcut, residual = scales[each.block]
                expected, product = shortcut * expected + residual * each.residual.detach(), product * shortcut
            deviation = (last.y.detach() - expected).abs().max() / last.y.detach().abs().max()
            end, here = last.y.grad.flatten(), unit.x.grad.flatten()
            cosine = float(F.cosine_similarity(here, end, dim=0))
            ratios = float(here.norm() / end.norm()), float((here - product * end).norm() / end.norm())
            start, arrived = through_shortcuts[last.block].y.grad, through_shortcuts[unit.block].x.grad
            assert start is not None and arrived is not None
            passed = float((arrived * start).sum() / (start * start).sum())
            found.append(IdentityFlow(unit.block, float(deviation), *ratios, cosine, product, passed))
    return found


def _backpropagate(net: ResNet, x: Tensor, labels: Tensor) -> list[UnitActivations]:
    """Every unit's activations, with their gradients of the summed loss."""
    units, logits = trace_units(net, x)
    for unit in units:
        for tensor in (unit.x, unit.y):
            tensor.retain_grad()
    F.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    return units


def _forward_with_hook(net: ResNet, hook: Callable[[str, Tensor], None], x: Tensor) -> Tensor:
    """Runs the network, calling `hook` with name and output of every BN that is not in a projection; returns the logits."""
    norms = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and ".downsample" not in n]
    handles = [m.register_forward_hook(lambda _m, _x, y, name=name: hook(name, y)) for name, m in norms]
    try:
        logits: Tensor = net(x)
        return logits
    finally:
        for handle in handles:
            handle.remove()


def _record_unit(block: Block, name: str, inputs: Any, residuals: Any, outputs: Any) -> None:
    """Makes a block record its input, F and output."""
    original = block.residual

    def residual(x: Tensor) -> Tensor:
        residuals[name] = y = original(x)
        return y

    block.residual = residual  # type: ignore[method-assign]
    block.register_forward_pre_hook(lambda _, args: inputs.__setitem__(name, args[0]))
    block.register_forward_hook(lambda _, __, y: outputs.__setitem__(name, y))
