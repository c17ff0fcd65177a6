"""How much each residual block adds to what its shortcut passes on, picture by picture."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from residuum.models.lesion import shared_twin
from residuum.models.resnet import ResNet
from residuum.nn.blocks import Block


def contributions(net: ResNet, x: Tensor) -> dict[str, Tensor]:
    """block -> |F(x)| / |shortcut|, float32 (B,), in the order of the forward pass; none for a plain net, which adds nothing.

    Both are measured as they enter the addition: a gate's or a constant's share is taken in. The norms are Euclidean, over a
    picture's whole map (2015 §4.2, "Analysis of Layer Responses", looks at F alone).

    Args:
        x: normalised pictures, (B, C, H, W), on the network's device; the network is in eval mode.
    """
    twin = shared_twin(net)
    found: dict[str, Tensor] = {}
    for name, block in twin.blocks():
        if not block.plain:
            block.residual = _watched(name, block, found)  # type: ignore[assignment, method-assign]
    twin(x)
    return found


def _watched(name: str, block: Block, found: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """F of a block, which also notes how large it is beside the shortcut."""
    inner = block.residual

    def residual(x: Tensor) -> Tensor:
        f = inner(x)
        shortcut = x if block.downsample is None else block.downsample(x)
        if block.junction is None:
            added, passed = f, shortcut
        else:  # linear in both, so each can be seen alone
            nothing = f.new_zeros(())
            added, passed = block.junction(x, nothing, f), block.junction(x, shortcut, nothing)
        tiny = torch.finfo(torch.float32).tiny
        found[name] = _norm(added) / _norm(passed).clamp_min(tiny)
        return f

    return residual


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x.float().flatten(1), dim=1)
    return norm
