"""3x3 convolutions by Winograd's algorithm on a CPU (Lavin and Gray 2015, arXiv 1509.09308), compiled for the machine."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnetlab.nn.kernel import load_kernel

MOST_IN_BF16 = 128  # channels; with 256 and more torch's own convolution is faster there (docs/log.md)


class WinogradConv2d(nn.Conv2d):
    """A convolution of 3x3 kernels, stride 1 and padding 1, with a quarter of the products (`nn/winograd.cpp`).

    (B, C, H, W) -> (B, K, H, W) in channels_last memory, float32 or, under autocast, bfloat16. What is computed is float32,
    with relative rounding errors of about 1e-6, some four times those of torch in float32; under autocast the weights are not
    rounded to bfloat16. Torch computes what the kernel does not take: other dtypes, other devices.

    Attributes:
        threads: that share each operation. Their number decides the last bits of the weights' gradient, of nothing else.
    """

    threads = 1

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
        if (
            load_kernel().library is None
            or dtype not in (torch.float32, torch.bfloat16)
            or x.dtype not in (torch.float32, dtype)
            or self.weight.dtype != torch.float32
            or x.device.type != "cpu"
            or x.ndim != 4
            or x.shape[1] != self.in_channels
        ):
            return super().forward(x)
        # batches that are evaluated side by side have fewer
        threads = self.threads if self.training else min(self.threads, torch.get_num_threads())
        return cast(Tensor, _WinogradConvolution.apply(x.to(dtype), self.weight, threads))


class _WinogradConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, threads: int) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(x, weight)
        ctx.threads = threads
        batch, channels, height, width = x.shape
        taps = weight.permute(2, 3, 1, 0).contiguous()  # (3, 3, C, K)
        y = torch.empty(batch, len(weight), height, width, dtype=x.dtype, memory_format=torch.channels_last)
        _run_kernel("forward", (x, taps, y), (batch, height, width, channels, len(weight), threads))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        of_x, of_weight = (torch.empty_like(t) if ctx.needs_input_grad[i] else None for i, t in enumerate((x, weight)))
        batch, channels, height, width = x.shape
        sizes = (batch, height, width, channels, len(weight), ctx.threads)
        _run_kernel("backward", (x, gradient, weight, of_x, of_weight), sizes)
        return of_x, of_weight, None


def _run_kernel(name: str, tensors: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Calls the kernel's function for the dtype of the first tensor, (B, C, H, W). Raises MemoryError."""
    assert tensors[0] is not None
    function = getattr(load_kernel().library, f"winograd_{name}_{str(tensors[0].dtype).removeprefix('torch.')}")
    if not function(*(None if t is None else t.data_ptr() for t in tensors), *sizes):
        *_, channels, outputs, _ = sizes
        raise MemoryError(f"there is no memory for a convolution of {channels} to {outputs} channels")


def use_winograd(net: nn.Module, threads: int = 1, precision: str = "fp32") -> None:
    """Replaces the convolutions of a network that the kernel takes, in place, by Winograd's; weights and names stay.

    Of a net trained in bf16 only narrow ones, since a processor computes twice as many products in bf16 as in float32.
    """
    library = load_kernel().library
    register = 1 if library is None else int(library.winograd_width())
    for module in list(net.modules()):
        for name, conv in list(module.named_children()):
            if type(conv) is nn.Conv2d and _is_taken(conv, register, MOST_IN_BF16 if precision == "bf16" else None):
                new = WinogradConv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False, device="meta")
                new._parameters, new.training, new.threads = conv._parameters, conv.training, threads
                setattr(module, name, new)


def _is_taken(conv: nn.Conv2d, register: int, most: int | None) -> bool:
    """Whether the kernel takes a convolution, whose channels fill registers and are at most so many."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    plain = conv.groups == 1 and conv.bias is None and conv.padding_mode == "zeros"
    return (
        plain
        and shape == ((3, 3), (1, 1), (1, 1), (1, 1))
        and not (conv.in_channels % register or conv.out_channels % register)
        and (most is None or max(conv.in_channels, conv.out_channels) <= most)
    )
