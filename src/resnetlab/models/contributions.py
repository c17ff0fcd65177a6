"""Relative size of each residual block's contribution, per image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnetlab.models.lesion import copy_sharing_weights
from resnetlab.models.resnet import ResNet
from resnetlab.nn.blocks import Block


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
