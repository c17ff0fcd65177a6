"""Builds networks by name, with random or published weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.errors import UsageError, public
from resnetlab.inference.start import (
    NO_HEAD,
    PRETRAINED,
    choose_specification,
    find_pretrained,
    find_weights,
    load_start,
)
from resnetlab.models import resnet
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import get_specification, list_network_names


@public
def build(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    weights: str | Path | None = None,
    pretrained: bool = False,
    device: str | torch.device | None = None,
    init: str = "fan_in",
    seed: int | None = None,
    **changes: Any,
) -> ResNet:
    """Builds a network by name.

    Args:
        name: a name of `resnetlab.models.spec`, such as "resnet20", "plain34", "preresnet164" or "resnet50v1.5".
        num_classes: outputs, also called `classes`. With weights of another number the head is new. 0 leaves the head
            out, as in timm: the network gives its features (B, C).
        in_chans: channels of the images, also called `channels`. With weights the first convolution is converted as timm does:
            its kernels are summed for one channel, repeated and scaled for other numbers.
        weights: a published name such as "torchvision:resnet50.IMAGENET1K_V2", a model file or a weight file; None for random
            ones. Weights bring their own place of the stride: "resnet50" with torchvision's is "resnet50v1.5", with a warning.
        pretrained: take torchvision's ImageNet weights.
        device: of the network; by default torch's, as `torch.device(…)` as a context sets it.
        init: "fan_in" or "fan_out", the n of He et al.'s N(0, sqrt(2/n)) (arXiv 1502.01852).
        seed: of the initialisation; by default torch's global generator is used.
        **changes: any value of the specification, such as shortcut="C" or activation_order="preact".

    Returns:
        A network in training mode, float32 (B, channels, H, W) -> logits (B, classes); its `spec` is its specification.

    Raises:
        UsageError: an unknown name, key or value (the message suggests the nearest known one), or weights of another network.
        ModelFileError: the weights cannot be read or downloaded.
    """
    for new, old, value in (("num_classes", "classes", num_classes), ("in_chans", "channels", in_chans)):
        if value is not None:
            if old in changes:
                raise UsageError(f"{new} and {old} are the same; give one of them.")
            changes[old] = value
    if headless := changes.get("classes") == 0:
        del changes["classes"]
    if isinstance(weights, Mapping | nn.Module):
        raise UsageError("weights are a published name or a file; net.load_state_dict(…) takes a state_dict.")
    try:
        where = torch.get_default_device() if device is None else torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"device {device!r} cannot be used; there are cpu, cuda, cuda:1, mps and meta.") from error
    source = find_pretrained(name) if pretrained and weights is None else find_weights(name, str(weights or ""))
    if not source:
        with where:
            return _finish(resnet.build(name, init=init, seed=seed, **changes), headless)
    own = {key: value for key, value in changes.items() if key not in ("classes", "channels")}
    get_specification(name, **changes)  # raises for an unknown name, key or value
    start = load_start(source, own)
    for note in choose_specification(source, start.model.spec, name, own):
        warnings.warn(f"{note}.", stacklevel=3)  # the caller of `public`
    net = start.model.resnet
    if (classes := changes.get("classes")) is None and start.model.classes == NO_HEAD and not headless:
        raise UsageError(f"{source} has no head; give num_classes for a new one.")
    wanted = {"classes": classes or net.spec.classes, "channels": changes.get("channels", net.spec.channels)}
    with torch.device("cpu"):
        fresh = resnet.build_from_spec(replace(net.spec, **wanted), init=init, seed=seed)
    state = dict(net.state_dict())
    state["conv1.weight"] = adapt_channels(state["conv1.weight"], wanted["channels"])
    if wanted["classes"] != net.spec.classes or start.model.classes == NO_HEAD:
        state |= {key: value for key, value in fresh.state_dict().items() if key.startswith("fc.")}
    nn.Module.load_state_dict(fresh, state)
    return _finish(fresh.to(where), headless)


def _finish(net: ResNet, headless: bool) -> ResNet:
    """The network, without its fully connected layer if `headless`."""
    if headless:
        net.reset_classifier(0)
    return net


def adapt_channels(kernels: Tensor, channels: int) -> Tensor:
    """The first convolution's kernels (C_out, C_in, k, k) for another number of channels, as timm converts them.

    One channel gets the sum over the old ones; more get them repeated, scaled to keep the sum.
    """
    old = kernels.shape[1]
    if channels == old:
        return kernels
    if channels == 1:
        return kernels.sum(1, keepdim=True)
    repeated = kernels.repeat(1, math.ceil(channels / old), 1, 1)[:, :channels]
    return repeated * (old / channels)


@public
def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """The names of networks that match a pattern, such as "resnet*v1.5"; `pretrained`: with published ImageNet weights."""
    if not isinstance(pattern, str):
        raise UsageError(f"a pattern is a word such as 'resnet*', not {pattern!r}.")
    return [name for name in (PRETRAINED if pretrained else list_network_names()) if fnmatchcase(name, pattern)]
