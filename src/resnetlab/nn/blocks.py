"""The residual block: F with any number of convolutions, any of the five activation orders, and any shortcut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from resnetlab.nn import shortcuts
from resnetlab.nn.batchnorm import FusedBatchNorm2d
from resnetlab.nn.fused_block import Layers, fuses_block, run_block


class ActivationOrder(NamedTuple):
    """Which of BN ("b") and ReLU ("r") are applied where in a block (2016 §4.1 and Fig. 4)."""

    before: str  # each convolution of F
    between: str  # two convolutions of F
    last: str  # after the last convolution
    after_add: str

    @property
    def preactivated(self) -> bool:
        """Whether activations precede the convolutions, so that the addition's result is passed on unchanged."""
        return bool(self.before)


ACTIVATION_ORDERS = {
    "original": ActivationOrder(before="", between="br", last="b", after_add="r"),
    "bn-after-add": ActivationOrder(before="", between="br", last="", after_add="br"),
    "relu-before-add": ActivationOrder(before="", between="br", last="br", after_add=""),
    "relu-only-preact": ActivationOrder(before="r", between="b", last="b", after_add=""),
    "preact": ActivationOrder(before="br", between="", last="", after_add=""),
}


class ConvLayer(NamedTuple):
    """One convolution of F."""

    c_in: int
    c_out: int
    kernel: int
    stride: int


def make_basic_layers(c_in: int, width: int, stride: int, layers: int) -> list[ConvLayer]:
    """F of `layers` 3x3 convolutions, the first with the stride (2015 Fig. 5 left, for two)."""
    return [ConvLayer(c_in if i == 0 else width, width, 3, stride if i == 0 else 1) for i in range(layers)]


def make_bottleneck_layers(c_in: int, width: int, stride: int, stride_in: str) -> list[ConvLayer]:
    """F of 1x1, 3x3, 1x1 convolutions, the last four times as wide (2015 Fig. 5 right).

    `stride_in` is "first" (the first 1x1, as the paper and its released models) or "3x3" ("v1.5", as torchvision).
    """
    first, middle = (stride, 1) if stride_in == "first" else (1, stride)
    return [ConvLayer(c_in, width, 1, first), ConvLayer(width, width, 3, middle), ConvLayer(width, 4 * width, 1, 1)]


@dataclass(frozen=True, kw_only=True)
class ShortcutOptions:
    """The kind of shortcut, and the values that some kinds need (2016 §3.1)."""

    name: str
    zero_pad: str
    scale: float
    residual_scale: float
    gate_bias: float
    dropout: float


class Block(nn.Module):
    """One residual unit, y = after_add(h(x) + F(x)) (2016 eq. 1); (B, C_in, H, W) -> (B, C_out, ceil(H/s), ceil(W/s)).

    Args:
        first_activation: where the activations before the first convolution are applied (pre-activated orders only):
            "inside" F only; "shared", before the split, so that the shortcut gets them too; "done" by the stem already
            (2016, appendix).

    Attributes:
        inplace: apply ReLU in place, to save memory; it is not where a hook on one of the block's modules would see that.
        drop_path: in training, the share of images whose F is dropped; the others' is scaled to keep the mean (stochastic
            depth, Huang et al. 2016, arXiv 1603.09382). The recipe sets it; it is not part of the specification.
    """

    drop_path = 0.0
    inplace = True

    def __init__(
        self, layers: list[ConvLayer], order: ActivationOrder, shortcut: ShortcutOptions, first_activation: str
    ) -> None:
        super().__init__()
        self.activation_order, self.first_activation, self.num_convs = order, first_activation, len(layers)
        for i, (c_in, c_out, kernel, stride) in enumerate(layers, 1):
            self.add_module(f"conv{i}", nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False))
            if "b" in order.before:
                if i > 1 or first_activation != "done":
                    self.add_module(f"bn{i}", nn.BatchNorm2d(c_in))
            else:
                self.add_module(f"bn{i}", nn.BatchNorm2d(c_out))
        c_in, c_out = layers[0].c_in, layers[-1].c_out
        stride = max(layer.stride for layer in layers)
        self.plain = shortcut.name == "none"
        self.downsample = self._make_downsample(c_in, c_out, stride, shortcut, batch_norm="b" not in order.before)
        self.junction = self._make_junction(c_in, c_out, stride, shortcut)

    @staticmethod
    def _make_downsample(
        c_in: int, c_out: int, stride: int, shortcut: ShortcutOptions, batch_norm: bool
    ) -> nn.Module | None:
        reshapes = c_in != c_out or stride != 1
        if shortcut.name in shortcuts.PROJECT_EVERYWHERE or (shortcut.name == "B" and reshapes):
            return shortcuts.make_projection(c_in, c_out, stride, batch_norm)
        if reshapes and shortcut.name != "none":
            return shortcuts.ZeroPad(c_in, c_out, stride, shortcut.zero_pad)
        return None

    @staticmethod
    def _make_junction(c_in: int, c_out: int, stride: int, shortcut: ShortcutOptions) -> nn.Module | None:
        if shortcut.name == "constant":
            return shortcuts.ScaledShortcut(shortcut.scale, shortcut.residual_scale)
        if shortcut.name in shortcuts.GATES:
            exclusive = shortcut.name == "exclusive-gate"
            return shortcuts.GatedShortcut(c_in, c_out, stride, shortcut.gate_bias, exclusive)
        return shortcuts.ShortcutDropout(shortcut.dropout) if shortcut.name == "dropout" else None

    @property
    def convs(self) -> list[nn.Conv2d]:
        """The convolutions of F, in their order."""
        return [cast(nn.Conv2d, self._modules[f"conv{i}"]) for i in range(1, self.num_convs + 1)]

    def residual(self, x: Tensor) -> Tensor:
        """F(x), without the shortcut; unless `first_activation` is "inside", x has been activated already."""
        return self._residual(x, None)

    def _residual(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """F(x), or with a shortcut relu(shortcut + F(x)) of a block whose F ends in BN."""
        order = self.activation_order
        for i in range(1, self.num_convs + 1):
            if i > 1 or self.first_activation == "inside":
                x = self._apply_bn_relu(order.before, i, x)
            x = cast(Tensor, self._modules[f"conv{i}"](x))  # type: ignore[misc]
            if i == self.num_convs and shortcut is not None:
                return cast(Tensor, self.get_submodule(f"bn{i}")(x, shortcut, relu=True))
            x = self._apply_bn_relu(order.between if i < self.num_convs else order.last, i, x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        layers = self._layers_of_one_call()
        if layers is not None and fuses_block(layers, x):
            return run_block(layers, x)
        if self.first_activation == "shared":
            x = self._apply_bn_relu(self.activation_order.before, 1, x)
        if self._fuses_addition():
            return self._residual(x, x if self.downsample is None else self.downsample(x))
        y = self.residual(x)
        if self.drop_path and self.training:
            kept = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop_path
            y = y * (kept / (1 - self.drop_path)).to(y.dtype)
        if not self.plain:
            shortcut = x if self.downsample is None else self.downsample(x)
            y = shortcut + y if self.junction is None else self.junction(x, shortcut, y)
        return self._apply_bn_relu(self.activation_order.after_add, self.num_convs, y)

    def _layers_of_one_call(self) -> Layers | None:
        """The layers of a block that may be one compiled call: two convolutions in the original order, the identity or nothing
        beside them, and no hook that would see a layer.
        """
        modules = self._modules
        if (
            self.num_convs != 2
            or self.activation_order != ACTIVATION_ORDERS["original"]
            or self.downsample is not None
            or self.junction is not None
            or self.drop_path
            or any(map(has_hooks, modules.values()))
        ):
            return None
        return Layers(modules["conv1"], modules["bn1"], modules["conv2"], modules["bn2"], not self.plain)

    def _fuses_addition(self) -> bool:
        """Whether F's last BN, the addition and the last ReLU are one function."""
        order, norm = self.activation_order, self._modules.get(f"bn{self.num_convs}")
        return (
            isinstance(norm, FusedBatchNorm2d)
            and (order.last, order.after_add) == ("b", "r")
            and not (self.plain or self.junction is not None or (self.drop_path and self.training))
        )

    def _apply_bn_relu(self, ops: str, i: int, x: Tensor) -> Tensor:
        """Applies a sequence of "b" (the i-th BN) and "r" (ReLU) to x.

        ReLU is in place to save memory, except where x may be the block's own input, or a hook has seen it.
        """
        norm = self._modules.get(f"bn{i}")
        if ops == "br" and isinstance(norm, FusedBatchNorm2d):
            return cast(Tensor, norm(x, relu=True))
        inplace = self.inplace and self.activation_order.before != "r"  # BN and the addition make new tensors
        inplace = inplace and not any(map(has_hooks, self._modules.values()))
        for op in ops:
            x = self._modules[f"bn{i}"](x) if op == "b" else F.relu(x, inplace=inplace)  # type: ignore[misc]
        return x


def has_hooks(module: nn.Module | None) -> bool:
    """Whether a hook sees what goes through a module: one of its own, or one on all modules."""
    if module is None:
        return False
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    on_all = (_global_forward_hooks, _global_forward_pre_hooks, _global_backward_hooks, _global_backward_pre_hooks)
    return any(own) or any(on_all)
