"""Lesions: the same trained network without some of its residual blocks, or with blocks in another place.

A residual net without a block still has a way through it, the shortcut; a plain net without one has lost a layer that the
others count on (Veit, Wilber, Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", 2016, §4).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import chain
from typing import cast

from torch import Tensor, nn

from residuum.errors import UsageError, unknown
from residuum.models.resnet import ResNet
from residuum.nn.blocks import Block


def blocks(net: ResNet) -> list[str]:
    """The names of the blocks that can be left out, in the order of the forward pass.

    In a residual net that is every block. In a plain net it is those that keep their input's shape: there is no way past the
    others.
    """
    return [name for name, block in net.blocks() if not block.plain or _keeps_shape(block)]


def movable(net: ResNet) -> list[list[str]]:
    """The names of the blocks that can change places, stage by stage: those that keep their input's shape and begin alike."""
    stages = []
    for i, stage in enumerate(net.stages, 1):
        inside = [(f"layer{i}.{j}", cast(Block, block)) for j, block in enumerate(stage)]
        stages.append([name for name, block in inside if _keeps_shape(block) and _begins_itself(block)])
    return stages


def without(net: ResNet, names: str | Iterable[str]) -> ResNet:
    """A twin of the network, sharing its weights, in which F of some blocks is zero: what their shortcuts pass on remains.

    A block of a plain net hands its input on instead. `net` itself stays as it is, and the twin costs next to no memory.

    Args:
        names: of blocks, such as "layer2.1".

    Raises:
        UsageError: a name that is no block (the nearest is named), or a plain net's block that changes its input's shape.
    """
    twin = shared_twin(net)
    known = dict(twin.blocks())
    for name in [names] if isinstance(names, str) else names:
        if name not in known:
            raise unknown("block", name, known)
        block = known[name]
        if block.plain and not _keeps_shape(block):
            raise UsageError(
                f"{name} changes its input's shape and has no shortcut, so a plain net cannot do without it."
            )
        block.residual = _same if block.plain else _nothing  # type: ignore[method-assign]
    return twin


def swapped(net: ResNet, pairs: Iterable[tuple[str, str]]) -> ResNet:
    """A twin of the network, sharing its weights, in which pairs of blocks have changed places, one pair after the other.

    Raises:
        UsageError: blocks that are not `movable` within one stage.
    """
    twin = shared_twin(net)
    stages = [set(names) for names in movable(net)]
    for a, b in pairs:
        if not any({a, b} <= names for names in stages):
            raise UsageError(f"{a} and {b} cannot change places: only blocks of one stage that keep its shape can.")
        stage = cast(nn.Sequential, getattr(twin, a.split(".")[0]))
        i, j = (int(name.split(".")[1]) for name in (a, b))
        stage[i], stage[j] = stage[j], stage[i]
    return twin


def shared_twin(net: ResNet) -> ResNet:
    """A copy of the network's modules around the same weights and statistics."""
    tensors = chain(net.parameters(), net.buffers())
    return copy.deepcopy(net, {id(tensor): tensor for tensor in tensors})


def _keeps_shape(block: Block) -> bool:
    first, last = (cast(nn.Conv2d, getattr(block, f"conv{i}")) for i in (1, block.depth))
    strides = [cast(nn.Conv2d, getattr(block, f"conv{i}")).stride[0] for i in range(1, block.depth + 1)]
    return first.in_channels == last.out_channels and max(strides) == 1


def _begins_itself(block: Block) -> bool:
    """Not one whose first activation stands elsewhere, or for its shortcut too (pre-activated orders)."""
    return not block.order.before or block.entry == "inside"


def _nothing(x: Tensor) -> Tensor:
    return x.new_zeros(())  # added, scaled or gated, it is zero in any shape


def _same(x: Tensor) -> Tensor:
    return x.clone()  # the ReLU after it writes in place
