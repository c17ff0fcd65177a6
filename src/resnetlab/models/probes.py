"""Measurements inside a network: layer responses, blocks' contributions, and forward and backward signals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
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
    residuals: dict[str, Tensor] = {}
    units: list[UnitActivations] = []
    for name, block in net.blocks():
        block.residual = partial(_record_residual, block.residual, residuals, name)  # type: ignore[method-assign]
        block.register_forward_hook(
            lambda _, args, y, name=name: units.append(UnitActivations(name, args[0], residuals[name], y))
        )
    logits = net(x)
    return units, logits


def _record_residual(residual: Callable[[Tensor], Tensor], found: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """F(x) of a block, which is recorded."""
    found[name] = y = residual(x)
    return y


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


def measure_contributions(net: ResNet, x: Tensor) -> dict[str, Tensor]:
    """Measures |F(x)| / |shortcut| of every block: name -> float32 (B,), in forward order; empty for a plain net.

    Both are measured as they enter the addition, so gates and constant factors are included. The norms are L2 over an image's
    whole feature map (2015 §4.2, "Analysis of Layer Responses", measures F only).

    Args:
        net: in eval mode.
        x: normalised images, (B, C, H, W), on the network's device.
    """
    net = copy_sharing_weights(net)
    found: dict[str, Tensor] = {}
    for name, block in net.blocks():
        if not block.plain:
            block.residual = _record_ratio(name, block, found)  # type: ignore[assignment, method-assign]
    net(x)
    return found


def _record_ratio(name: str, block: Block, found: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """Wraps a block's F so that it also records the ratio of the norms."""
    original = block.residual

    def residual(x: Tensor) -> Tensor:
        f = original(x)
        shortcut = x if block.downsample is None else block.downsample(x)
        if block.junction is None:
            added, passed = f, shortcut
        else:  # linear in both, so each can be evaluated with the other at zero
            zero = f.new_zeros(())
            added, passed = block.junction(x, zero, f), block.junction(x, shortcut, zero)
        tiny = torch.finfo(torch.float32).tiny
        found[name] = _l2_norm(added) / _l2_norm(passed).clamp_min(tiny)
        return f

    return residual


def _l2_norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.float().flatten(1), dim=1)
    return norm
