"""Folds batch normalisation into the preceding convolutions, for inference."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from resnetlab.models.own_network import Network
from resnetlab.models.resnet import ResNet
from resnetlab.nn.blocks import Block


def fold_batchnorm(net: Network) -> Network:
    """Copies a network in eval mode, with each BN that follows a convolution folded into its weights and bias.

    In eval mode BN is y = (x - mean) / sqrt(variance + eps) * weight + bias, which is linear. `net` is not changed. A
    network of the user's own is copied as it is.
    """
    net = copy.deepcopy(net).eval().requires_grad_(False)
    if not isinstance(net, ResNet):
        return net
    net.conv1, net.bn1 = _fuse_conv_bn(net.conv1, net.bn1), nn.Identity()  # type: ignore[assignment]
    for _, block in net.blocks():
        for conv, norm in find_foldable_pairs(block):
            pair = cast(nn.Conv2d, getattr(block, conv)), cast(nn.BatchNorm2d, getattr(block, norm))
            block.add_module(conv, _fuse_conv_bn(*pair))
            block.add_module(norm, nn.Identity())
        if isinstance(block.downsample, nn.Sequential) and len(block.downsample) == 2:
            conv2d, norm2d = cast(nn.Conv2d, block.downsample[0]), cast(nn.BatchNorm2d, block.downsample[1])
            block.downsample = nn.Sequential(_fuse_conv_bn(conv2d, norm2d))
    return net


def find_foldable_pairs(block: Block) -> Iterator[tuple[str, str]]:
    """The names of each convolution and of the BN that is applied to nothing but its output."""
    order = block.activation_order
    for i in range(1, block.num_convs + 1):
        after = order.between if i < block.num_convs else order.last
        if after.startswith("b"):
            yield f"conv{i}", f"bn{i}"
        elif not after and order.before.startswith("b") and i < block.num_convs:  # the next convolution's BN
            yield f"conv{i}", f"bn{i + 1}"


def _fuse_conv_bn(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    mean, variance = cast(torch.Tensor, norm.running_mean), cast(torch.Tensor, norm.running_var)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    bias = torch.zeros_like(mean) if conv.bias is None else conv.bias
    fused = copy.copy(conv)
    fused._parameters = dict(conv._parameters)
    fused.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
    fused.bias = nn.Parameter((bias - mean) * scale + norm.bias, requires_grad=False)
    return fused
