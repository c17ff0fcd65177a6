"""3x3 convolutions by Winograd's algorithm on a CPU (Lavin and Gray 2015, arXiv 1509.09308), compiled for the machine."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnetlab.nn.kernel import load_kernel


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3x3 kernels, stride 1 and padding 1, with a quarter of the products (`nn/winograd.cpp`).

    (B, C, H, W) -> (B, K, H, W) in channels_last memory and float32; relative rounding errors are about 1e-6, some four times
    those of torch. Torch computes what the kernel does not take: other dtypes, autocast, other devices.

    Attributes:
        threads: that share each operation. Their number decides the last bits of the weights' gradient, of nothing else.
    """

    threads = 1

    def forward(self, x: Tensor) -> Tensor:
        if (
            load_kernel().library is None
            or not x.dtype == self.weight.dtype == torch.float32
            or x.device.type != "cpu"
            or x.ndim != 4
            or x.shape[1] != self.in_channels
            or torch.is_autocast_enabled("cpu")
        ):
            return super().forward(x)
        return cast(Tensor, _WinogradConvolution.apply(x, self.weight, self.threads))


class _WinogradConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, threads: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.threads = threads
        return _convolve(x, weight.permute(2, 3, 1, 0), threads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            turned = weight.flip(2, 3).permute(2, 3, 0, 1)  # by 180 degrees
            of_x = _convolve(gradient, turned, ctx.threads)
        if ctx.needs_input_grad[1]:
            taps = torch.empty(3, 3, x.shape[1], gradient.shape[1])  # (3, 3, C, K)
            _run_kernel("winograd_weights", x, gradient, taps, ctx.threads)
            of_weight = torch.empty_like(weight).copy_(taps.permute(3, 2, 0, 1))
        return of_x, of_weight, None


def _convolve(x: Tensor, taps: Tensor, threads: int) -> Tensor:
    """x (B, C, H, W) with weights (3, 3, C, K) -> (B, K, H, W)."""
    taps = taps.contiguous()
    batch, _, height, width = x.shape
    y = torch.empty(batch, taps.shape[3], height, width, memory_format=torch.channels_last)
    _run_kernel("winograd_forward", x, taps, y, threads)
    return y


def _run_kernel(name: str, x: Tensor, second: Tensor, result: Tensor, threads: int) -> None:
    """Calls a function of the kernel on x, (B, C, H, W). Raises MemoryError."""
    batch, channels, height, width = x.shape
    outputs = result.shape[1] if name == "winograd_forward" else second.shape[1]
    pointers = (x.data_ptr(), second.data_ptr(), result.data_ptr())
    if not getattr(load_kernel().library, name)(*pointers, batch, height, width, channels, outputs, threads):
        raise MemoryError(f"there is no memory for a convolution of {channels} to {outputs} channels")


def use_winograd(net: nn.Module, threads: int = 1) -> None:
    """Replaces the convolutions of a network that the kernel takes, in place, by Winograd's; weights and names stay."""
    library = load_kernel().library
    register = 1 if library is None else int(library.winograd_width())
    for module in list(net.modules()):
        for name, conv in list(module.named_children()):
            if type(conv) is nn.Conv2d and _is_taken(conv, register):
                new = WinogradConv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False, device="meta")
                new._parameters, new.training, new.threads = conv._parameters, conv.training, threads
                setattr(module, name, new)


def _is_taken(conv: nn.Conv2d, register: int) -> bool:
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    plain = conv.groups == 1 and conv.bias is None and conv.padding_mode == "zeros"
    return (
        plain
        and shape == ((3, 3), (1, 1), (1, 1), (1, 1))
        and not (conv.in_channels % register or conv.out_channels % register)
    )
