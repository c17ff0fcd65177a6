"""The network before training: initialised, or taken from a model file with a head for other classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from resnetlab.errors import UsageError
from resnetlab.formatting import format_count, format_list
from resnetlab.inference.build import adapt_channels
from resnetlab.inference.start import NO_HEAD, Start, choose_specification, load_start
from resnetlab.models.backbone import modules_up_to
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.own_network import OWN, Network, adopt_network, class_name
from resnetlab.models.resnet import ResNet, build_from_spec
from resnetlab.models.spec import get_specification, nearest_name
from resnetlab.random import seed_for
from resnetlab.training.recipe import Recipe

# values of networks that are built here by name, each with the one that changes nothing
FOR_NAMED_NETWORKS: dict[str, Any] = {
    "start_from": "",
    "init": "fan_in",
    "zero_init_last_bn": False,
    "stochastic_depth": 0.0,
    "recompute": False,
    "frozen_stages": "",
    "frozen_bn": False,
    "backbone_lr_scale": 1.0,
    "bn_sync": False,
}


def build_network(
    recipe: Recipe, start_from: str, channels: int, classes: Sequence[str], module: nn.Module | None = None
) -> tuple[Network, Start | None, list[str]]:
    """The network, what it starts from, and sentences on what was taken from that.

    Args:
        start_from: a model file, a published name or a weight file, or "".
        module: the network of the user's own that the recipe records.

    Raises:
        UsageError: an unknown network or value, or one that differs from the model file's.
        ModelFileError: the model file is missing or damaged.
    """
    if module is not None or recipe.net.startswith(OWN):
        return _take_own_network(recipe, module, channels, len(classes)), None, []
    start = load_start(start_from, recipe.specification) if start_from else None
    notes = [] if start is None else start.notes
    changes = {"channels": channels, "classes": len(classes)} | dict(recipe.specification)
    if start is None:
        if not recipe.net:
            raise UsageError("the recipe has no network of its own; give a model file: --start-from MODEL.")
        spec = get_specification(recipe.net, **changes)
    else:
        own = start.model.spec
        notes = [*notes, *choose_specification(start_from, own, recipe.net, dict(recipe.specification))]
        if channels != own.channels:
            notes.append(
                f"{start_from} takes images of {format_count(own.channels, 'channel')}, the data have "
                f"{channels}: the kernels of its first "
                "convolution are "
                + ("summed" if channels == 1 else f"repeated in turn, times {own.channels}/{channels}")
            )
        spec = replace(own, classes=len(classes), channels=channels)
    seed = seed_for(recipe.seed, "init")
    net = build_from_spec(spec, init=recipe.init, seed=seed, zero_last_bn=recipe.zero_init_last_bn)
    if start is not None:
        notes = [*notes, _copy_weights(net, start.model, classes, start_from)]
    net.recompute = recipe.recompute
    blocks = list(net.blocks())
    for i, (_, block) in enumerate(blocks, 1):
        block.drop_path = recipe.stochastic_depth * i / len(blocks)
    if recipe.frozen_stages:
        for module in modules_up_to(net, recipe.frozen_stages, "map in frozen_stages"):
            module.requires_grad_(False)  # BN's statistics too (`set_train_mode`)
    for module in net.modules() if recipe.frozen_bn else ():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return net, start, notes


def without_named_network(recipe: Recipe, module: nn.Module) -> Recipe:
    """The recipe for a network of the user's own, without what is for networks that are built by name."""
    changes = nearest_name(module.spec)[1] if isinstance(module, ResNet) else {}
    return replace(recipe, **FOR_NAMED_NETWORKS, specification=changes)


def require_own_network(recipe: Recipe, module: nn.Module | None) -> nn.Module:
    """The network that the user gives; raises UsageError if it is none of the class that the recipe records."""
    given, asked = "" if module is None else class_name(module), recipe.net.removeprefix(OWN)
    if module is None or given != asked:
        raise UsageError(
            f"the network of this recipe, {asked}, was given in Python{f', and {given} is another' if given else ''}; "
            f"give it again: resnetlab.train(…, net={asked}(…))."
        )
    return module


def _take_own_network(recipe: Recipe, module: nn.Module | None, channels: int, classes: int) -> Network:
    """The network that the user gives, for a recipe that records its class.

    Raises UsageError if another or none is given, if it does not take the data's images, or if the recipe has values that are
    for networks built here.
    """
    module, asked = require_own_network(recipe, module), recipe.net.removeprefix(OWN)
    if changes := recipe.differences(without_named_network(recipe, module)):
        raise UsageError(
            f"{changes[0].partition(' (not')[0]} is for networks that are built by name, and {asked} is given as it is; "
            "leave it out."
        )
    if not recipe.image_size:
        raise UsageError(f"{recipe.name} takes the size of a model to start from; give {asked} one: image_size=224.")
    return adopt_network(module, (channels, recipe.image_size, recipe.image_size), classes)


@torch.no_grad()
def _copy_weights(net: ResNet, start: TrainedModel, classes: Sequence[str], place: str) -> str:
    """Copies a model's weights; the head's rows are matched by class names, or stay newly initialised."""
    state = start.net.state_dict()
    state["conv1.weight"] = adapt_channels(state["conv1.weight"], net.spec.channels)
    same = set(start.classes) == set(classes)
    for key in ("fc.weight", "fc.bias"):
        state[key] = state[key][[start.classes.index(c) for c in classes]] if same else net.state_dict()[key]
    nn.Module.load_state_dict(net, state)
    if start.classes == NO_HEAD:
        return (
            f"starting from {place}, which has no head, with a new one of "
            f"{format_count(len(classes), 'class')} ({format_list(classes, 3)})"
        )
    if same:
        return f"starting from {place}, with its head: it has the same {format_count(len(classes), 'class')}"
    return (
        f"starting from {place} with a new head: it has {format_count(len(start.classes), 'class')} "
        f"({format_list(start.classes, 3)}), "
        f"the data {len(classes)} ({format_list(classes, 3)})"
    )
