"""What goes on inside a network: how strongly its layers respond, and what flows forwards and backwards through it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residuum.models.lesion import shared_twin
from residuum.models.resnet import ResNet
from residuum.nn.blocks import Block
from residuum.runtime import evaluating


class Signal(NamedTuple):
    """A layer in one step of training: variance of its BN's output, and norm of the loss's gradient there, per picture."""

    layer: str
    variance: float
    gradient: float


class Unit(NamedTuple):
    """One residual unit in one pass: x_l, F(x_l) and x_{l+1} of 2016 eq. 1; (B, C, H, W) each."""

    block: str
    x: Tensor
    residual: Tensor
    y: Tensor


class Identity(NamedTuple):
    """One unit beside the last of its stage (2016 eq. 4 and 5), whose output is x_L.

    Attributes:
        deviation: largest |x_L - x_l - sum of F| as a fraction of the largest |x_L|.
        kept: |dE/dx_l| / |dE/dx_L|, norms over all pictures.
        additive: |dE/dx_l - dE/dx_L| / |dE/dx_L|: the term that passes through weight layers.
        cosine: of dE/dx_l and dE/dx_L.
    """

    block: str
    deviation: float
    kept: float
    additive: float
    cosine: float


def responses(net: ResNet, x: Tensor) -> dict[str, float]:
    """The standard deviation of every layer's response: BN's output, before the nonlinearity and the addition (2015 Fig. 7).

    Taken over all pictures, channels and positions, in eval mode; projections are left out.

    Args:
        x: normalised pictures, (B, C, H, W).

    Returns:
        The BN's name -> its deviation, in the order of the forward pass.
    """
    found: dict[str, float] = {}

    def note(name: str, y: Tensor) -> None:
        found[name] = float(y.float().std())

    with evaluating(net):
        _watched(net, note, x)
    return found


def signals(net: ResNet, x: Tensor, labels: Tensor) -> list[Signal]:
    """What flows through a network in a step of training, with BN's statistics of the batch; the network stays as it is.

    Args:
        x: normalised pictures, (B, C, H, W).
        labels: int64 (B,).
    """
    net = copy.deepcopy(net).train()  # BN in training mode changes its running statistics
    variances: dict[str, float] = {}
    gradients: dict[str, float] = {}

    def note(name: str, y: Tensor) -> None:
        variances[name] = float(y.detach().float().var())
        y.register_hook(  # type: ignore[no-untyped-call]
            lambda g: gradients.__setitem__(name, float(g.float().flatten(1).norm(dim=1).mean()))
        )

    logits = _watched(net, note, x)
    F.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    return [Signal(name, variances[name], gradients[name]) for name in variances]


def units(net: ResNet, x: Tensor) -> tuple[list[Unit], Tensor]:
    """Every unit of a residual net in one pass, with gradients kept where they are wanted; and the logits (B, classes)."""
    twin = shared_twin(net).train(net.training)
    inputs: dict[str, Tensor] = {}
    residuals: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, block in twin.blocks():
        _record(block, name, inputs, residuals, outputs)
    logits = twin(x)
    return [Unit(name, inputs[name], residuals[name], outputs[name]) for name in outputs], logits


def identities(net: ResNet, x: Tensor, labels: Tensor) -> list[Identity]:
    """How far each unit is from 2016's x_L = x_l + sum of F, and what its gradient is made of; in float64, eval mode.

    Units that change their input's shape are left out, as the paper's equations leave them out. `net` stays as it is.
    """
    net = copy.deepcopy(net).double().eval()
    passed, logits = units(net, x.double())
    for unit in passed:
        for tensor in (unit.x, unit.y):
            tensor.retain_grad()
    F.cross_entropy(logits, labels, reduction="sum").backward()  # type: ignore[no-untyped-call]
    found = []
    for stage in range(1, len(net.spec.depths) + 1):
        inside = [unit for unit in passed if unit.block.startswith(f"layer{stage}.") and unit.x.shape == unit.y.shape]
        last = inside[-1] if inside else None
        for i, unit in enumerate(inside):
            assert last is not None and last.y.grad is not None and unit.x.grad is not None
            total = torch.stack([each.residual.detach() for each in inside[i:]]).sum(0)
            away = (last.y.detach() - unit.x.detach() - total).abs().max() / last.y.detach().abs().max()
            end, here = last.y.grad.flatten(), unit.x.grad.flatten()
            cosine = float(F.cosine_similarity(here, end, dim=0))
            sizes = float(here.norm() / end.norm()), float((here - end).norm() / end.norm())
            found.append(Identity(unit.block, float(away), *sizes, cosine))
    return found


def _watched(net: ResNet, note: Callable[[str, Tensor], None], x: Tensor) -> Tensor:
    """The logits of a pass in which `note` is told the output of every BN on the main path."""
    norms = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and ".downsample" not in n]
    hooks = [m.register_forward_hook(lambda _m, _x, y, name=name: note(name, y)) for name, m in norms]
    try:
        logits: Tensor = net(x)
        return logits
    finally:
        for hook in hooks:
            hook.remove()


def _record(block: Block, name: str, inputs: Any, residuals: Any, outputs: Any) -> None:
    """Has a block write down what enters it, its F and what leaves it."""
    plain = block.residual

    def residual(x: Tensor) -> Tensor:
        residuals[name] = y = plain(x)
        return y

    block.residual = residual  # type: ignore[method-assign]
    block.register_forward_pre_hook(lambda _, args: inputs.__setitem__(name, args[0]))
    block.register_forward_hook(lambda _, __, y: outputs.__setitem__(name, y))
