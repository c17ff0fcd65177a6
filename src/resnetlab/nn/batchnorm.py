"""Batch normalisation with statistics over all processes. It also works on CPUs, where torch's SyncBatchNorm does not."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from resnetlab.distributed import World


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes; the gradient is summed likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        total = x.clone()
        world.tree_all_reduce_(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].contiguous().clone()
        ctx.world.tree_all_reduce_(total)
        return total, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BN over the images of all processes; (B, C, H, W) -> (B, C, H, W)."""

    world: World

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.float()
        n = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
        sums = cast(Tensor, _AllReduceSum.apply(torch.cat([x32.sum((0, 2, 3)), n]), self.world))
        total, n = torch.split(sums, [x.shape[1], 1])
        mean = total / n  # (C,)
        centred = x32 - mean[:, None, None]
        variance = cast(Tensor, _AllReduceSum.apply(centred.square().sum((0, 2, 3)), self.world)) / n
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * n / (n - 1), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
        scale: Tensor = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def convert_sync_batchnorm(net: nn.Module, world: World) -> None:
    """Replaces every BN of a network, in place, by one with statistics over all processes and the same parameter tensors."""
    for module in net.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                norm = SyncBatchNorm2d(child.num_features, child.eps, device="meta")
                norm.world, norm._parameters, norm._buffers = world, child._parameters, child._buffers
                setattr(module, name, norm)
