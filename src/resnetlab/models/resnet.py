"""Builds and initialises a network from its specification.

Attribute names are torchvision's (`conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`), so that a `state_dict`
can be exchanged in both directions.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnetlab.errors import UsageError, unknown_attribute_error
from resnetlab.models.spec import Specification, get_specification, nearest_name
from resnetlab.nn import shortcuts
from resnetlab.nn.batchnorm import FusedBatchNorm2d
from resnetlab.nn.blocks import (
    ACTIVATION_ORDERS,
    Block,
    ShortcutOptions,
    has_hooks,
    make_basic_layers,
    make_bottleneck_layers,
)
from resnetlab.peer_words import NETWORK_ATTRIBUTES
from resnetlab.random import active_generator, draw_from


class SmallImageWarning(UserWarning):
    """Images of 64 px or less are fed to a network with ImageNet's stem.

    A network says so once, and a command once, whatever the sizes of its images.
    """

    once_a_command = True


class ResNet(nn.Module):
    """A residual (or plain) network: stem, stages of blocks, global average pool, fully connected layer (2015 §3.3, §4.2).

    Shapes: (B, channels, H, W) -> logits (B, classes). H and W may be any size; a stage of stride 2 halves it, rounded up.

    Attributes:
        recompute: in training, keep only the maps between groups of about √n of the n blocks and recompute the others in the
            backward pass (gradient checkpointing, Chen et al. 2016, arXiv 1604.06174).
    """

    recompute = False
    warned_of_small_images = False

    def __init__(self, spec: Specification) -> None:
        super().__init__()
        self.spec = spec
        order = ACTIVATION_ORDERS[spec.activation_order]
        width = spec.widths[0]
        if spec.stem == "imagenet":
            self.conv1 = nn.Conv2d(spec.channels, width, 7, stride=2, padding=3, bias=spec.conv1_bias)
            # 3x3 windows of stride 2: torchvision pads one pixel on each side, Caffe only at the far edge
            padding = {"padding": 1} if spec.maxpool == "padded" else {"ceil_mode": True}
            self.maxpool: nn.Module | None = nn.MaxPool2d(3, stride=2, **padding)
        else:
            self.conv1 = nn.Conv2d(spec.channels, width, 3, padding=1, bias=spec.conv1_bias)
            self.maxpool = None
        self.bn1 = nn.BatchNorm2d(width)
        for i, blocks in enumerate(_make_stages(spec), 1):
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        # A pre-activated net ends with one extra activation, before pooling (2016, appendix).
        self.bn_last = nn.BatchNorm2d(self.num_features) if "b" in order.before else None
        self.fc = nn.Linear(self.num_features, spec.classes)

    @property
    def stages(self) -> list[nn.Sequential]:
        """The stages in forward order."""
        return [cast(nn.Sequential, getattr(self, f"layer{i}")) for i in range(1, len(self.spec.depths) + 1)]

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """Every block with its name, in forward order."""
        for i, stage in enumerate(self.stages, 1):
            for j, block in enumerate(stage):
                yield f"layer{i}.{j}", cast(Block, block)

    def features(self, x: Tensor, last: str | None = None) -> dict[str, Tensor]:
        """Feature maps of the stem ("C1") and of each stage ("C2", …); the last one is the classifier's input before pooling.

        Args:
            last: the deepest map to compute, by default all. `models.backbone.levels` gives their channels and strides.
        """
        # torch.fx traces with proxies, and torch.jit.trace warns of a condition on a size
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if isinstance(x, Tensor) and not traced:
            warn_small_image(self, x.shape[-2:])
        x = self.conv1(x)
        if isinstance(self.bn1, FusedBatchNorm2d):
            x = self.bn1(x, relu=True)  # (B, width, H', W')
        else:
            x = F.relu(self.bn1(x), inplace=not has_hooks(self.bn1))
        maps = {"C1": x}
        if self.maxpool is not None:
            x = self.maxpool(x)
        for i in range(1, len(self.spec.depths) + 1):
            if last in maps:
                return maps
            stage = cast(nn.Sequential, self.get_submodule(f"layer{i}"))
            # torch.fx, whose values are no tensors, cannot trace `checkpoint`
            recompute = self.recompute and self.training and isinstance(x, Tensor)
            x = maps[f"C{i + 1}"] = self._checkpoint_groups(stage, x) if recompute else stage(x)
        if ACTIVATION_ORDERS[self.spec.activation_order].preactivated:
            if isinstance(self.bn_last, FusedBatchNorm2d):
                x = self.bn_last(x, relu=True)
            else:
                x = F.relu(x if self.bn_last is None else self.bn_last(x))
            maps[f"C{len(self.spec.depths) + 1}"] = x
        return maps

    def _checkpoint_groups(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        """Runs a stage, storing only the maps between groups of blocks for the backward pass."""
        from torch.utils.checkpoint import checkpoint

        size = max(1, round(math.sqrt(sum(self.spec.depths))))
        for start in range(0, len(stage), size):
            group = stage[start : start + size]
            generator = active_generator()
            contexts = partial(_recompute_contexts, group, generator)
            x = checkpoint(group, x, use_reentrant=False, context_fn=contexts, preserve_rng_state=generator is None)
        return x

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, before pooling; (B, C, h, w)."""
        return self.features(x)[f"C{len(self.spec.depths) + 1}"]

    def forward_class_maps(self, x: Tensor, window: tuple[int, int] = (1, 1)) -> Tensor:
        """Logits at every position, with the fully connected layer as a 1x1 convolution; (B, classes, h', w').

        The last map is first averaged over `window` positions with stride 1. With the map size of training images the result
        is the network's logits for every crop of that size (2015 §4.1, fully convolutional); (1, 1) does not average.
        """
        last = self.forward_features(x)
        if window != (1, 1):
            last = F.avg_pool2d(last, window, stride=1)
        return F.conv2d(last, self.fc.weight[:, :, None, None], self.fc.bias)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """torch's, marked with the specification, which names and shapes do not determine."""
        state = super().state_dict(*args, **kwargs)
        if (own := getattr(state, "_metadata", {}).get(kwargs.get("prefix", "").rstrip("."))) is not None:
            own |= {"stride_in": self.spec.stride_in, "specification": self.spec.to_json()}
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """torch's; warns where weights do not say that bottlenecks have their stride where this network's have it."""
        mark = getattr(state_dict, "_metadata", {}).get("", {}).get("stride_in")
        if self.spec.block == "bottleneck" and mark != self.spec.stride_in and (mark or self.spec.stride_in == "first"):
            name = nearest_name(replace(self.spec, stride_in=mark or "3x3"))[0]
            theirs = f"from {name}" if mark else "that do not say where the bottlenecks have their stride"
            warnings.warn(
                f"weights {theirs} are loaded into {nearest_name(self.spec)[0]}; names and shapes are the same, but "
                f"torchvision's and timm's have it in the 3x3: build {name!r} for those.",
                stacklevel=2,
            )
        return super().load_state_dict(state_dict, strict, assign)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The logits (B, classes) of the last map (B, C, h, w); with `pre_logits` the pooled features (B, C) before `fc`."""
        pooled = features.mean((2, 3))  # (B, C, h, w) -> (B, C)
        return pooled if pre_logits else cast(Tensor, self.fc(pooled))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    if not TYPE_CHECKING:  # a type checker would accept every attribute

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                answers, layers = (
                    NETWORK_ATTRIBUTES,
                    [n for n in self.__dict__.get("_modules", ()) if n.startswith("layer")],
                )
                if layers and name.startswith("layer"):
                    answers = answers | {name: f"{layers[0]} to {layers[-1]}, the stages of this network"}
                raise unknown_attribute_error(self, name, answers) from None

    def __prepare_scriptable__(self) -> None:
        """Answers torch.jit.script, which would end in an error about a line of this class."""
        raise UsageError(
            "torch.jit.script, which torch has deprecated, does not take this network; use torch.compile(net), "
            "torch.export.export(net, (images,)), or for a file with its preprocessing `resnetlab export MODEL --to torch`."
        )

    @property
    def num_features(self) -> int:
        """The number of features before the fully connected layer."""
        return self.spec.out_widths[-1]

    @property
    def num_classes(self) -> int:
        """The number of outputs of the fully connected layer; 0 after `reset_classifier(0)`."""
        return self.fc.out_features if isinstance(self.fc, nn.Linear) else 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets `recompute`, by timm's name."""
        self.recompute = enable

    def get_classifier(self) -> nn.Module:
        """The fully connected layer; nn.Identity after `reset_classifier(0)`."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the fully connected layer by a newly initialised one; 0 leaves it out: `forward` gives features then.

        Raises UsageError for a pooling, timm's `global_pool`, other than the average.
        """
        if global_pool not in (None, "avg"):
            raise UsageError(
                f"the networks have average pooling, not {global_pool!r}; net.forward_features(images) gives the last map."
            )
        old = self.conv1.weight
        if not num_classes:
            self.fc = cast(nn.Linear, nn.Identity())
            return
        self.spec = replace(self.spec, classes=num_classes)
        self.fc = nn.Linear(self.num_features, num_classes, device=old.device, dtype=old.dtype)
        if not old.is_meta:
            _init_head(self.fc, None)


def _recompute_contexts(
    net: nn.Module, generator: torch.Generator | None
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts for the forward pass and for its recomputation, which draws the same numbers from a thread's generator.

    Without one the network draws from torch's global generator, whose state `checkpoint` keeps.
    """
    return contextlib.nullcontext(), _repeat(net, generator, None if generator is None else generator.get_state())


@contextlib.contextmanager
def _repeat(net: nn.Module, generator: torch.Generator | None, state: Tensor | None) -> Iterator[None]:
    """BN uses batch statistics as in training, without updating its running statistics a second time."""
    modules = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.momentum, m.num_batches_tracked) for m in modules]
    for module in modules:
        module.momentum, module.num_batches_tracked = 0.0, None
    draws: AbstractContextManager[None] = contextlib.nullcontext()
    if generator is not None and state is not None:  # torch's backward pass leaves the forward pass's `draw_from`
        draws = draw_from(generator.set_state(state))
    try:
        with draws:
            yield
    finally:
        for module, (momentum, count) in zip(modules, before, strict=True):
            module.momentum, module.num_batches_tracked = momentum, count


def _make_stages(spec: Specification) -> Iterator[list[Block]]:
    """The blocks of each stage."""
    order = ACTIVATION_ORDERS[spec.activation_order]
    options = ShortcutOptions(
        name=spec.shortcut,
        zero_pad=spec.zero_pad,
        scale=spec.shortcut_scale,
        residual_scale=spec.residual_scale,
        gate_bias=spec.gate_bias,
        dropout=spec.shortcut_dropout,
    )
    c_in = spec.widths[0]
    for stage, (depth, width, c_out) in enumerate(zip(spec.depths, spec.widths, spec.out_widths, strict=True)):
        blocks = []
        for i in range(depth):
            stride = 2 if stage > 0 and i == 0 else 1
            reshapes = c_in != c_out or stride != 1
            first_activation = "done" if stage == i == 0 else _place_first_activation(spec, reshapes)
            if spec.block == "bottleneck":
                layers = make_bottleneck_layers(c_in, width, stride, spec.stride_in)
            else:
                layers = make_basic_layers(c_in, width, stride, spec.layers)
            blocks.append(Block(layers, order, options, first_activation))
            c_in = c_out
        yield blocks


def _place_first_activation(spec: Specification, reshapes: bool) -> str:
    """Whether a pre-activated unit shares its first activation with the shortcut (2016, appendix)."""
    projects = spec.shortcut in shortcuts.PROJECT_EVERYWHERE or (spec.shortcut == "B" and reshapes)
    return "shared" if projects or (reshapes and spec.preact_transition == "shared") else "inside"


def warn_small_image(net: ResNet, image_size: Sequence[int]) -> None:
    """Warns, once a network, if ImageNet's stem gets an image, (H, W), with a side of at most 64 pixels."""
    if net.spec.stem == "imagenet" and min(image_size) <= 64 and not net.warned_of_small_images:
        net.warned_of_small_images = True
        height, width = image_size
        # of the network as it is: a segmenter's is dilated, a detector's ends before its last stage
        strides = [conv.stride[0] for block in net.modules() if isinstance(block, Block) for conv in block.convs]
        stride = 4 * math.prod(strides)
        level, frame = 1, inspect.currentframe()
        while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in ("resnetlab", "torch"):
            level, frame = level + 1, frame.f_back  # up to the caller's own line
        warnings.warn(
            f"images of {height}x{width} pixels in a network with ImageNet's 7x7 stem, which leaves them "
            f"{math.ceil(height / stride)}x{math.ceil(width / stride)} at the end; "
            "enlarge them, or use a CIFAR net such as resnet20 or resnet56, which are for classifiers.",
            SmallImageWarning,
            stacklevel=level,
        )


def build(name: str, *, init: str = "fan_in", seed: int | None = None, **changes: Any) -> ResNet:
    """Builds and initialises a network by name.

    Args:
        name: a name of `resnetlab.models.spec`, such as "resnet20", "plain34", "preresnet164" or "resnet50v1.5".
        init: "fan_in" or "fan_out", the n of He et al.'s N(0, sqrt(2/n)) (arXiv 1502.01852).
        seed: of the initialisation; by default torch's global generator is used.
        **changes: any value of the specification, such as classes=10, channels=1, shortcut="C" or activation_order="preact".

    Returns:
        A network in training mode, float32 (B, channels, H, W) -> logits (B, classes); its `spec` is its specification.

    Raises:
        UsageError: an unknown name, key or value (the message suggests the nearest known one).
    """
    return build_from_spec(get_specification(name, **changes), init=init, seed=seed)


def build_from_spec(
    spec: Specification, *, init: str = "fan_in", seed: int | None = None, zero_last_bn: bool = False
) -> ResNet:
    """Builds and initialises the network of a specification, on torch's default device; on "meta" without weights."""
    device = torch.get_default_device()  # also of a context such as `with torch.device("cuda")`
    with torch.device("meta"):
        net = ResNet(spec)
    if device.type == "meta":
        return net
    with torch.device("cpu"):  # the same bits on every device
        init_weights(allocate(net), init, seed, zero_last_bn)
    return net.to(device)


def allocate(net: ResNet) -> ResNet:
    """Gives a network on "meta" tensors on the CPU that hold anything; `Module.to_empty` would import SymPy: a second."""
    tensors = {name: torch.empty(meta.shape, dtype=meta.dtype, device="cpu") for name, meta in net.state_dict().items()}
    nn.Module.load_state_dict(net, tensors, assign=True)
    return net


def init_weights(net: ResNet, init: str = "fan_in", seed: int | None = None, zero_last_bn: bool = False) -> None:
    """Initialises every parameter and statistic of a network.

    Convolutions: N(0, sqrt(2/n)), n = k²·C_in ("fan_in") or k²·C_out ("fan_out"). BN: weight 1, bias 0, mean 0, variance 1.
    fc: uniform in ±1/sqrt(C), bias 0. Gates: bias b_g of the specification (2016 §3.1).

    Args:
        zero_last_bn: set the weight of F's last BN to 0, so that every block starts as its shortcut (Goyal et al. 2017 §5.1).

    Raises UsageError for an invalid `init` or seed, or for `zero_last_bn` if F does not end in BN.
    """
    # a ReLU after the last BN would let no gradient through
    if zero_last_bn and ACTIVATION_ORDERS[net.spec.activation_order].last != "b":
        raise UsageError(
            f"zero_init_last_bn needs an F that ends in BN, but activation order {net.spec.activation_order!r} does not."
        )
    if init not in ("fan_in", "fan_out"):
        raise UsageError(f"init must be 'fan_in' or 'fan_out', not {init!r}.")
    if seed is not None and (not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise UsageError(f"seed must be a whole number from 0 to 2^63 - 1, not {seed!r}.")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=init, nonlinearity="relu", generator=generator)  # type: ignore[arg-type]
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            _init_head(module, generator)
    for module in net.modules():
        if isinstance(module, shortcuts.GatedShortcut):
            nn.init.constant_(cast(Tensor, module.conv.bias), module.initial_bias)
    if zero_last_bn:
        for _, block in net.blocks():
            nn.init.zeros_(cast(Tensor, block.get_submodule(f"bn{block.num_convs}").weight))


def _init_head(fc: nn.Linear, generator: torch.Generator | None) -> None:
    bound = 1 / math.sqrt(fc.in_features)
    nn.init.uniform_(fc.weight, -bound, bound, generator=generator)
    nn.init.zeros_(fc.bias)
