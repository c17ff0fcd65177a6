"""A residual block of two 3x3 convolutions in one compiled call, forward and backward (`nn/block.cpp`).

Its layers are those of `WinogradConv2d` and `FusedBatchNorm2d`, and the results are bit-identical to theirs. Micro-batches side
by side in threads meet at Python's lock in every call, so fewer calls let them wait less.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnetlab.nn.batchnorm import FusedBatchNorm2d
from resnetlab.nn.convolution import WinogradConv2d
from resnetlab.nn.kernel import load_kernel

CHANNELS_LAST = torch.channels_last


class Layers(NamedTuple):
    """The layers of a block: conv, BN, ReLU, conv, BN, and whether its input is added before the last ReLU."""

    conv1: nn.Module | None
    bn1: nn.Module | None
    conv2: nn.Module | None
    bn2: nn.Module | None
    add: bool


def fuses_block(layers: Layers, x: Tensor) -> bool:
    """Whether the compiled call takes a block in training, of equally many channels everywhere, and its input."""
    convs, norms = (layers.conv1, layers.conv2), (layers.bn1, layers.bn2)
    if not (
        all(isinstance(conv, WinogradConv2d) and conv.threads == 1 for conv in convs)
        and all(isinstance(norm, FusedBatchNorm2d) and norm.training and not norm.fixed for norm in norms)
    ):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    tensors = [p for layer in (*convs, *norms) for p in cast(nn.Module, layer).parameters()]
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and all(p.requires_grad and p.dtype == torch.float32 for p in tensors)
        and x.dtype == dtype
        and dtype in (torch.float32, torch.bfloat16)
        and x.device.type == "cpu"
        and all(len(p) == x.shape[1] for p in tensors)
        and all(cast(WinogradConv2d, conv).in_channels == x.shape[1] for conv in convs)
        and all(cast(FusedBatchNorm2d, norm).momentum is not None for norm in norms)
        and x.numel() > x.shape[1]  # torch raises an error for one value per channel
        and load_kernel().library is not None
    )


def run_block(layers: Layers, x: Tensor) -> Tensor:
    """The block's output; (B, C, H, W) -> (B, C, H, W) in channels_last memory.

    Raises MemoryError.
    """
    conv1, bn1, conv2, bn2, _ = cast(Any, layers)
    return cast(
        Tensor, _OneCall.apply(x, conv1.weight, conv2.weight, bn1.weight, bn1.bias, bn2.weight, bn2.bias, layers)
    )


class _Norm(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "running_mean", "running_var", "mean", "inverse")),
        *((name, ctypes.c_void_p) for name in ("of_weight", "of_bias")),
        *((name, ctypes.c_float) for name in ("momentum", "eps")),
    )


class _Shape(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("images", "height", "width", "channels"))


class _OneCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> Tensor:
        (*affine, layers) = rest
        x = x.contiguous(memory_format=CHANNELS_LAST)
        w1, w2 = (w.contiguous(memory_format=CHANNELS_LAST) for w in (w1, w2))
        a, b, c, y = (torch.empty_like(x) for _ in range(4))
        statistics = affine[0].new_empty(4, x.shape[1])  # mean and inverse deviation of both BNs
        norms = _make_norms(affine, statistics, layers=layers)
        _call_kernel("block_forward", x, (a, b, c, y, w1, w2), norms, int(layers.add))
        ctx.save_for_backward(x, a, b, c, y, w1, w2, *affine, statistics)
        ctx.add = layers.add
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, c, y, w1, w2, *affine, statistics = ctx.saved_tensors
        gradient = gradient.to(x.dtype).contiguous(memory_format=CHANNELS_LAST)
        one, two, dx = (torch.empty_like(x) for _ in range(3))
        dz = torch.empty_like(x) if ctx.add else None
        dw1, dw2 = torch.empty_like(w1), torch.empty_like(w2)
        of_affine = [torch.empty_like(p) for p in affine]
        _call_kernel(
            "block_backward", gradient, (x, a, b, c, y, one, two, dz, dx, w1, w2, dw1, dw2),
            _make_norms(affine, statistics, of_affine=of_affine),
        )  # fmt: skip
        return dx, dw1, dw2, *of_affine, None


def _make_norms(
    affine: list[Tensor], statistics: Tensor, *, layers: Layers | None = None, of_affine: list[Tensor] | None = None
) -> Any:
    """What the call takes of both BNs: (weight, bias) of each in `affine`."""
    norms = (_Norm * 2)()
    for i, norm in enumerate(norms):
        norm.weight, norm.bias = (p.data_ptr() for p in affine[2 * i : 2 * i + 2])
        norm.mean, norm.inverse = (s.data_ptr() for s in statistics[2 * i : 2 * i + 2])
        if of_affine is not None:
            norm.of_weight, norm.of_bias = (p.data_ptr() for p in of_affine[2 * i : 2 * i + 2])
        if layers is not None:
            bn = cast(FusedBatchNorm2d, (layers.bn1, layers.bn2)[i])
            norm.running_mean, norm.running_var = (
                None if s is None else s.data_ptr() for s in (bn.running_mean, bn.running_var)
            )
            norm.momentum, norm.eps = bn.momentum, bn.eps
    return norms


def _call_kernel(name: str, x: Tensor, tensors: tuple[Tensor | None, ...], norms: Any, *values: int) -> None:
    """Calls the kernel's function for the dtype of the first map, x, (B, C, H, W)."""
    batch, channels, height, width = x.shape
    function = getattr(load_kernel().library, f"{name}_{str(x.dtype).removeprefix('torch.')}")
    pointers = [None if t is None else t.data_ptr() for t in (x, *tensors)]
    if not function(*pointers, norms, ctypes.byref(_Shape(batch, height, width, channels)), *values):
        raise MemoryError(f"there is no memory for a block of {channels} channels")
