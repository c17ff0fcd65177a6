"""Forms of batch normalisation: over all processes (on CPUs too, unlike torch's SyncBatchNorm), fixed, and fused with ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from resnetlab.distributed import World
from resnetlab.nn.kernel import load_kernel

N = TypeVar("N", bound=nn.BatchNorm2d)


class _SharedStatistics(torch.autograd.Function):
    """Mean and biased variance over the images of all processes, both (C,), of float32 (B, C, H, W); their number, (1,).

    One collective forward, of each process's sums and squared deviations, which Chan et al. (1979) combine without
    cancellation, and one backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
        channels, here = x.shape[1], x.numel() // x.shape[1]
        total = x.sum((0, 2, 3))
        deviations = (x - (total / here)[:, None, None]).square().sum((0, 2, 3))
        everywhere = world.all_gather(
            torch.cat([total, deviations, total.new_full((1,), here)])
        )  # (processes, 2 C + 1)
        totals, squares, counts = torch.split(everywhere, [channels, channels, 1], 1)
        n = counts.sum(0)
        mean = totals.sum(0) / n
        variance = (squares + counts * (totals / counts - mean).square()).sum(0) / n
        ctx.save_for_backward(x, mean, n)
        ctx.world = world
        ctx.mark_non_differentiable(n)
        return mean, variance, n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, mean, n = ctx.saved_tensors
        total = ctx.world.all_gather(torch.stack([of_mean, of_variance])).sum(0) / n
        return (x - mean[:, None, None]) * (2 * total[1])[:, None, None] + total[0][:, None, None], None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BN over the images of all processes; (B, C, H, W) -> (B, C, H, W)."""

    world: World

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x32 = x.float()
        if self.world.size == 1:
            n = torch.full((1,), float(x.numel() // x.shape[1]), device=x.device)
            mean = x32.sum((0, 2, 3)) / n  # (C,)
            centred = x32 - mean[:, None, None]
            variance = centred.square().sum((0, 2, 3)) / n
        else:
            mean, variance, n = cast(tuple[Tensor, Tensor, Tensor], _SharedStatistics.apply(x32, self.world))
            centred = x32 - mean[:, None, None]
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.momentum is not None
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * n / (n - 1), self.momentum)
                if self.num_batches_tracked is not None:
                    self.num_batches_tracked += 1
        scale: Tensor = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class FixedBatchNorm(nn.BatchNorm2d):
    """BN as a constant affine map of its statistics, in training too (2015, appendix A); it has nothing to train.

    `torch.nn.SyncBatchNorm.convert_sync_batchnorm` would make it an ordinary BN again: convert first, then freeze.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class FusedBatchNorm2d(nn.BatchNorm2d):
    """relu(bn(x) + residual) in one function that was compiled for this machine (`nn.kernel`), which saves passes over memory.

    (B, C, H, W) -> (B, C, H, W) in channels_last memory, float32 or bfloat16; sums are in float32 and float64. Torch computes
    what the function does not take, such as other dtypes or a residual of another dtype.

    Attributes:
        fixed: use the moving averages in training too, as `FixedBatchNorm`.
    """

    fixed = False

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        live = self.training and not self.fixed
        if self._takes(x, residual, live):
            return cast(Tensor, _FusedBatchNorm.apply(x, self.weight, self.bias, residual, _Form(self, relu, live)))
        y = FixedBatchNorm.forward(cast(FixedBatchNorm, self), x) if self.fixed else super().forward(x)
        y = y if residual is None else residual + y
        return F.relu(y, inplace=True) if relu else y

    def _takes(self, x: Tensor, residual: Tensor | None, live: bool) -> bool:
        return (
            load_kernel().library is not None
            and x.dtype in (torch.float32, torch.bfloat16)
            and x.device.type == "cpu"
            and x.ndim == 4
            and x.numel() > (x.shape[1] if live else 0)  # torch raises an error for one value per channel
            and self.weight.dtype == torch.float32
            and self.momentum is not None
            and (residual is None or (residual.dtype == x.dtype and residual.shape == x.shape))
        )


class _Form(NamedTuple):
    """What `_FusedBatchNorm` computes besides its tensors."""

    norm: FusedBatchNorm2d
    relu: bool
    live: bool  # with the batch's statistics


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, form: _Form) -> Tensor:
        norm, relu, live = form
        x = x.contiguous(memory_format=torch.channels_last)
        residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
        y, mean, inverse = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        tensors = (x, residual, y, weight, bias, norm.running_mean, norm.running_var, mean, inverse)
        _call("forward", x, tensors, norm.momentum, norm.eps, relu, live)
        ctx.save_for_backward(x, y if relu else x, weight, mean, inverse)
        ctx.adds, ctx.flags = residual is not None, (relu, live)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, y, weight, mean, inverse = ctx.saved_tensors
        gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dz = torch.empty_like(x), torch.empty_like(x) if ctx.adds else None
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        _call("backward", x, (gradient, x, y, dx, dz, weight, mean, inverse, dweight, dbias), *ctx.flags)
        return dx, dweight, dbias, dz, None


def _call(name: str, x: Tensor, tensors: tuple[Tensor | None, ...], *values: Any) -> None:
    """Calls the kernel's function for the dtype of x, (B, C, H, W)."""
    function = getattr(load_kernel().library, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    positions, channels = x.numel() // x.shape[1], x.shape[1]
    function(*(None if t is None else t.data_ptr() for t in tensors), positions, channels, *values)


def convert_sync_batchnorm(net: nn.Module, world: World) -> None:
    """Replaces every BN of a network, in place, by one with statistics over all processes."""
    for _, norm in _replace_batchnorms(net, SyncBatchNorm2d):
        norm.world = world


def fix_bn(net: nn.Module) -> None:
    """Replaces every BN inside a module, in place, by FixedBatchNorm; names and values stay."""
    for _, norm in _replace_batchnorms(net, FixedBatchNorm):
        norm.requires_grad_(False)


def fuse_batchnorm(net: nn.Module) -> None:
    """Replaces every BN of a network, in place, by a fused one."""
    for former, norm in _replace_batchnorms(net, FusedBatchNorm2d, (nn.BatchNorm2d, FixedBatchNorm)):
        norm.fixed = isinstance(former, FixedBatchNorm)


def _replace_batchnorms(
    net: nn.Module, new: type[N], kinds: tuple[type[nn.BatchNorm2d], ...] = (nn.BatchNorm2d,)
) -> Iterator[tuple[nn.BatchNorm2d, N]]:
    """Replaces every BN of exactly these kinds by one with the same parameter tensors and statistics; yields both."""
    for module in list(net.modules()):
        for name, former in list(module.named_children()):
            if isinstance(former, nn.BatchNorm2d) and type(former) in kinds:
                norm = new(former.num_features, former.eps, former.momentum, device="meta")
                norm._parameters, norm._buffers, norm.training = former._parameters, former._buffers, former.training
                setattr(module, name, norm)
                yield former, norm
