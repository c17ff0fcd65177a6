"""Lesions: a trained network with some of its residual blocks removed or swapped.

When a block of a residual net is removed, its shortcut still passes the input on; a plain net loses a layer that the others
depend on (Veit, Wilber, Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", 2016, §4).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import cast

from torch import Tensor, nn

from resnetlab.errors import UsageError, unknown_name_error
from resnetlab.models.resnet import ResNet
from resnetlab.nn.blocks import Block


def removable_blocks(net: ResNet) -> list[str]:
    """Names of the blocks that can be removed, in forward order: all in a residual net, the shape-preserving in a plain one."""
    return [name for name, block in net.blocks() if not block.plain or _keeps_shape(block)]


def movable_blocks(net: ResNet) -> list[list[str]]:
    """Names of the blocks that can be swapped, per stage: those that keep the shape and begin with the same operations."""
    stages = []
    for i, stage in enumerate(net.stages, 1):
        blocks = [(f"layer{i}.{j}", cast(Block, block)) for j, block in enumerate(stage)]
        stages.append([name for name, block in blocks if _keeps_shape(block) and _has_own_activation(block)])
    return stages


def remove_blocks(net: ResNet, names: str | Iterable[str]) -> ResNet:
    """Copies a network, sharing its weights, with F of some blocks set to zero so that only their shortcuts remain.

    A block of a plain net becomes the identity. `net` is not changed, and the copy takes almost no memory.

    Args:
        names: of blocks, such as "layer2.1".

    Raises:
        UsageError: an unknown block (the message suggests the nearest), or a plain net's block that changes the shape.
    """
    net = copy_sharing_weights(net)
    known = dict(net.blocks())
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise unknown_name_error("block", name, known)
        block = known[name]
        if block.plain and not _keeps_shape(block):
            raise UsageError(
                f"{name} changes its input's shape and has no shortcut, so a plain net cannot do without it."
            )
        block.residual = _identity_residual if block.plain else _zero_residual  # type: ignore[method-assign]
    return net


def swap_blocks(net: ResNet, pairs: Iterable[tuple[str, str]]) -> ResNet:
    """Copies a network, sharing its weights, with pairs of blocks swapped, one pair after the other.

    Raises UsageError for blocks that are not `movable_blocks` of one stage.
    """
    swapped = copy_sharing_weights(net)
    stages = [set(names) for names in movable_blocks(net)]
    for a, b in pairs:
        if not any({a, b} <= names for names in stages):
            raise UsageError(f"{a} and {b} cannot change places: only blocks of one stage that keep its shape can.")
        stage = cast(nn.Sequential, getattr(swapped, a.split(".")[0]))
        i, j = (int(name.split(".")[1]) for name in (a, b))
        stage[i], stage[j] = stage[j], stage[i]
    return swapped


def copy_sharing_weights(net: ResNet) -> ResNet:
    """Copies the modules of a network; parameters and buffers are shared."""
    tensors = chain(net.parameters(), net.buffers())
    return copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})


def _keeps_shape(block: Block) -> bool:
    convs = block.convs
    return convs[0].in_channels == convs[-1].out_channels and all(conv.stride[0] == 1 for conv in convs)


def _has_own_activation(block: Block) -> bool:
    """Whether the first activation is not in the stem and not shared with the shortcut (pre-activated orders)."""
    return not block.activation_order.before or block.first_activation == "inside"


def _zero_residual(x: Tensor) -> Tensor:
    return x.new_zeros(())  # zero in any shape, whether added, scaled or gated


def _identity_residual(x: Tensor) -> Tensor:
    return x.clone()  # the ReLU after it is in place
