"""Batch normalisation folded into the convolutions before it, for networks that only answer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from residuum.models.resnet import ResNet
from residuum.nn.blocks import Block


def folded(net: ResNet) -> ResNet:
    """A copy in eval mode that says the same with less work: BN that follows a convolution becomes its weights and bias.

    In eval mode BN is y = (x - mean) / sqrt(variance + eps) * weight + bias, which is linear. The given network stays as it is.
    """
    twin = copy.deepcopy(net).eval().requires_grad_(False)
    twin.conv1, twin.bn1 = _fuse(twin.conv1, twin.bn1), nn.Identity()  # type: ignore[assignment]
    for _, block in twin.blocks():
        for conv, norm in _pairs(block):
            block.add_module(
                conv, _fuse(cast(nn.Conv2d, getattr(block, conv)), cast(nn.BatchNorm2d, getattr(block, norm)))
            )
            block.add_module(norm, nn.Identity())
        if isinstance(block.downsample, nn.Sequential) and len(block.downsample) == 2:
            conv2d, norm2d = cast(nn.Conv2d, block.downsample[0]), cast(nn.BatchNorm2d, block.downsample[1])
            block.downsample = nn.Sequential(_fuse(conv2d, norm2d))
    return twin


def _pairs(block: Block) -> Iterator[tuple[str, str]]:
    """The names of each convolution and the BN that reads nothing but it."""
    order = block.order
    for i in range(1, block.depth + 1):
        after = order.between if i < block.depth else order.last
        if after.startswith("b"):
            yield f"conv{i}", f"bn{i}"
        elif not after and order.before.startswith("b") and i < block.depth:  # pre-activated: the next one's own BN
            yield f"conv{i}", f"bn{i + 1}"


def _fuse(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    mean, variance = cast(torch.Tensor, norm.running_mean), cast(torch.Tensor, norm.running_var)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias
    fused = copy.copy(conv)
    fused._parameters = dict(conv._parameters)
    fused.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
    fused.bias = nn.Parameter((bias - mean) * scale + norm.bias, requires_grad=False)
    return fused
