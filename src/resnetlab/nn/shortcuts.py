"""The shortcuts of both papers: how a block's input reaches its output.

A shortcut has two parts. The *downsample* path matches the input's shape to the output's: identity, zero padding (option A)
or a projection (options B, C). The *junction* combines it with the residual F: addition, or one of the 2016 paper's scalings,
gates and dropout.

| name             | downsample path                                 | junction             | source                |
|------------------|-------------------------------------------------|----------------------|-----------------------|
| `none`           | no shortcut: the plain net                      | F                    | 2015 §3.3             |
| `A`              | identity; subsampling + zero channels           | x + F                | 2015 §4.1             |
| `B`              | identity; projection where the shape changes    | x + F                | 2015 §3.2, eq. 2      |
| `C`, `conv`      | projection everywhere                           | Wx + F               | 2015 §4.1; 2016 §3.1  |
| `constant`       | as A                                            | a·x + b·F            | 2016 §3.1             |
| `exclusive-gate` | as A                                            | (1-g)·x + g·F        | 2016 §3.1             |
| `shortcut-gate`  | as A                                            | (1-g)·x + F          | 2016 §3.1             |
| `dropout`        | as A                                            | dropout(x) + F       | 2016 §3.1             |

g = sigmoid(1x1 convolution of the block's input + bias), element-wise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PROJECT_EVERYWHERE = ("C", "conv")
GATES = ("exclusive-gate", "shortcut-gate")
SHORTCUTS = ("none", "A", "B", *PROJECT_EVERYWHERE, "constant", *GATES, "dropout")


class ZeroPad(nn.Module):
    """Option A: every stride-th pixel, extra channels zero; no parameters (2015 §3.3, §4.2).

    Shapes: (B, C_in, H, W) -> (B, C_out, ceil(H / stride), ceil(W / stride)). The paper leaves open where the zero channels
    go: "append" puts them after the input's, "centre" half before and half after (weights are not interchangeable).
    """

    def __init__(self, c_in: int, c_out: int, stride: int, zero_pad: str = "append") -> None:
        super().__init__()
        self.stride = stride
        before = (c_out - c_in) // 2 if zero_pad == "centre" else 0
        self.channels = (before, c_out - c_in - before)

    def forward(self, x: Tensor) -> Tensor:
        # the gradient of a slice is contiguous, and adding it to one in channels_last slow; a tracer's x is no Tensor
        if self.training and isinstance(x, Tensor) and x.is_contiguous(memory_format=torch.channels_last):
            x = x.permute(0, 2, 3, 1)[:, :: self.stride, :: self.stride]  # (B, H', W', C_in)
            return F.pad(x, self.channels).permute(0, 3, 1, 2)
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, *self.channels)) if any(self.channels) else x

    def extra_repr(self) -> str:
        return f"stride={self.stride}, zero_channels={self.channels}"


def make_projection(c_in: int, c_out: int, stride: int, batch_norm: bool) -> nn.Sequential:
    """A 1x1 convolution, followed by BN in original units but not in pre-activated ones (2016, appendix)."""
    conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out)) if batch_norm else nn.Sequential(conv)


class ScaledShortcut(nn.Module):
    """Constant scaling, shortcut·x + residual·F (2016 §3.1)."""

    def __init__(self, shortcut: float, residual: float) -> None:
        super().__init__()
        self.shortcut, self.residual = shortcut, residual

    def forward(self, x: Tensor, shortcut: Tensor, residual: Tensor) -> Tensor:
        return self.shortcut * shortcut + self.residual * residual

    def extra_repr(self) -> str:
        return f"shortcut={self.shortcut}, residual={self.residual}"


class GatedShortcut(nn.Module):
    """Exclusive gating, (1-g)·x + g·F, or shortcut-only gating, (1-g)·x + F (2016 §3.1)."""

    def __init__(self, c_in: int, c_out: int, stride: int, bias: float, exclusive: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1, stride, bias=True)
        self.initial_bias, self.exclusive = bias, exclusive

    def forward(self, x: Tensor, shortcut: Tensor, residual: Tensor) -> Tensor:
        gate = torch.sigmoid(self.conv(x))  # (B, C_out, H', W')
        return (1 - gate) * shortcut + (gate * residual if self.exclusive else residual)


class ShortcutDropout(nn.Module):
    """Dropout on the shortcut only: dropout(x) + F (2016 §3.1)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, shortcut: Tensor, residual: Tensor) -> Tensor:
        return F.dropout(shortcut, self.rate, self.training) + residual

    def extra_repr(self) -> str:
        return f"rate={self.rate}"
