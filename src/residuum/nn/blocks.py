"""The residual block: F of any number of layers, in any of the five orders, joined to any shortcut.

An order (2016 Fig. 4) is four little programs over "b" (BN) and "r" (ReLU): what stands before each convolution of F, between
its convolutions, after the last one, and after the addition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residuum.nn import shortcuts


class Order(NamedTuple):
    """Where BN ("b") and ReLU ("r") stand around the convolutions of a block (2016 §4.1)."""

    before: str
    between: str
    last: str
    after_add: str

    @property
    def preactivated(self) -> bool:
        """True where activations come before the convolutions, so that nothing stands on the way after the addition."""
        return bool(self.before)


ORDERS = {
    "original": Order(before="", between="br", last="b", after_add="r"),
    "bn-after-add": Order(before="", between="br", last="", after_add="br"),
    "relu-before-add": Order(before="", between="br", last="br", after_add=""),
    "relu-only-preact": Order(before="r", between="b", last="b", after_add=""),
    "preact": Order(before="br", between="", last="", after_add=""),
}


class Layer(NamedTuple):
    """One convolution of F."""

    c_in: int
    c_out: int
    kernel: int
    stride: int


def basic(c_in: int, width: int, stride: int, layers: int) -> list[Layer]:
    """F of `layers` 3x3 convolutions, the first with the stride (2015 Fig. 5 left, for two)."""
    return [Layer(c_in if i == 0 else width, width, 3, stride if i == 0 else 1) for i in range(layers)]


def bottleneck(c_in: int, width: int, stride: int, stride_site: str) -> list[Layer]:
    """F of 1x1, 3x3, 1x1 convolutions, the last four times as wide (2015 Fig. 5 right).

    `stride_site` is "first" (the first 1x1, as the paper and its released models) or "3x3" ("v1.5", as torchvision).
    """
    first, middle = (stride, 1) if stride_site == "first" else (1, stride)
    return [Layer(c_in, width, 1, first), Layer(width, width, 3, middle), Layer(width, 4 * width, 1, 1)]


@dataclass(frozen=True, kw_only=True)
class ShortcutOptions:
    """Which shortcut, and the numbers that some of them need (2016 §3.1)."""

    name: str
    zeros: str
    scale: float
    residual_scale: float
    gate_bias: float
    dropout: float


class Block(nn.Module):
    """One residual unit, y = after_add(h(x) + F(x)) (2016 eq. 1); (B, C_in, H, W) -> (B, C_out, ceil(H/s), ceil(W/s)).

    `entry` says what becomes of the activations before the first convolution (pre-activated orders only): "inside" F alone;
    "shared", before the split, so that the shortcut sees them too; "done", already applied by the stem (2016, appendix).

    Attributes:
        drop: while training, the share of pictures for which F is left out, the others' being scaled to the same mean
            (stochastic depth, Huang et al. 2016, arXiv 1603.09382); a matter of training, not of the specification.
    """

    drop = 0.0

    def __init__(self, layers: list[Layer], order: Order, shortcut: ShortcutOptions, entry: str) -> None:
        super().__init__()
        self.order, self.entry, self.depth = order, entry, len(layers)
        for i, layer in enumerate(layers, 1):
            padding = layer.kernel // 2
            self.add_module(
                f"conv{i}", nn.Conv2d(layer.c_in, layer.c_out, layer.kernel, layer.stride, padding, bias=False)
            )
            if "b" in order.before:
                if i > 1 or entry != "done":
                    self.add_module(f"bn{i}", nn.BatchNorm2d(layer.c_in))
            else:
                self.add_module(f"bn{i}", nn.BatchNorm2d(layer.c_out))
        c_in, c_out = layers[0].c_in, layers[-1].c_out
        stride = max(layer.stride for layer in layers)
        self.plain = shortcut.name == "none"
        self.downsample = self._path(c_in, c_out, stride, shortcut, batch_norm="b" not in order.before)
        self.junction = self._junction(c_in, c_out, stride, shortcut)

    @staticmethod
    def _path(c_in: int, c_out: int, stride: int, shortcut: ShortcutOptions, batch_norm: bool) -> nn.Module | None:
        reshapes = c_in != c_out or stride != 1
        if shortcut.name in shortcuts.PROJECT_EVERYWHERE or (shortcut.name == "B" and reshapes):
            return shortcuts.projection(c_in, c_out, stride, batch_norm)
        if reshapes and shortcut.name != "none":
            return shortcuts.ZeroPad(c_in, c_out, stride, shortcut.zeros)
        return None

    @staticmethod
    def _junction(c_in: int, c_out: int, stride: int, shortcut: ShortcutOptions) -> nn.Module | None:
        if shortcut.name == "constant":
            return shortcuts.Scale(shortcut.scale, shortcut.residual_scale)
        if shortcut.name in shortcuts.GATES:
            exclusive = shortcut.name == "exclusive-gate"
            return shortcuts.Gate(c_in, c_out, stride, shortcut.gate_bias, exclusive)
        return shortcuts.Dropout(shortcut.dropout) if shortcut.name == "dropout" else None

    def residual(self, x: Tensor) -> Tensor:
        """F(x), without the shortcut; x as the first convolution's own activations find it (unless `entry` is "inside")."""
        order = self.order
        for i in range(1, self.depth + 1):
            if i > 1 or self.entry == "inside":
                x = self._run(order.before, i, x)
            x = cast(Tensor, self._modules[f"conv{i}"](x))  # type: ignore[misc]
            x = self._run(order.between if i < self.depth else order.last, i, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        if self.entry == "shared":
            x = self._run(self.order.before, 1, x)
        y = self.residual(x)
        if self.drop and self.training:
            kept = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop
            y = y * (kept / (1 - self.drop)).to(y.dtype)
        if not self.plain:
            shortcut = x if self.downsample is None else self.downsample(x)
            y = shortcut + y if self.junction is None else self.junction(x, shortcut, y)
        return self._run(self.order.after_add, self.depth, y)

    def _run(self, program: str, i: int, x: Tensor) -> Tensor:
        """Applies a program of "b" (the i-th BN) and "r" to x.

        A ReLU writes over its input, which spares memory, but not where that is the block's own input.
        """
        fresh = self.order.before != "r"  # BN and the addition make tensors of their own
        for op in program:
            x = self._modules[f"bn{i}"](x) if op == "b" else F.relu(x, inplace=fresh)  # type: ignore[misc]
        return x
