"""The network before training: initialised, or taken from a model file with a head for other classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnetlab.errors import UsageError
from resnetlab.formatting import format_list
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.resnet import ResNet, build_from_spec
from resnetlab.models.spec import Specification, get_specification, list_network_names
from resnetlab.random import seed_for
from resnetlab.training.recipe import Recipe


def build_network(
    recipe: Recipe, start_from: str, channels: int, classes: Sequence[str]
) -> tuple[ResNet, TrainedModel | None, list[str]]:
    """The network, the model that it starts from, and sentences on what was taken from that.

    Args:
        start_from: a model file, or "".

    Raises:
        UsageError: an unknown network or value, or one that differs from the model file's.
        ModelFileError: the model file is missing or damaged.
    """
    start = load_trained_model(Path(start_from)) if start_from else None
    changes = {"channels": channels, "classes": len(classes)} | dict(recipe.specification)
    if start is None:
        if not recipe.net:
            raise UsageError("the recipe has no network of its own; give a model file: --start-from MODEL.")
        spec = get_specification(recipe.net, **changes)
    else:
        spec = replace(start.spec, classes=len(classes))
        _compare_specifications(start_from, start.spec, spec, recipe.net, changes)
    seed = seed_for(recipe.seed, "init")
    net = build_from_spec(spec, init=recipe.init, seed=seed, zero_last_bn=recipe.zero_init_last_bn)
    notes = [] if start is None else [_copy_weights(net, start, classes, start_from)]
    net.recompute = recipe.recompute
    blocks = list(net.blocks())
    for i, (_, block) in enumerate(blocks, 1):
        block.drop_path = recipe.stochastic_depth * i / len(blocks)
    for module in net.modules() if recipe.frozen_bn else ():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return net, start, notes


def _compare_specifications(
    start_from: str, start_spec: Specification, spec: Specification, net: str, changes: Mapping[str, Any]
) -> None:
    """Raises UsageError if the model file holds another network than requested."""
    if changes["channels"] != start_spec.channels:
        raise UsageError(
            f"{start_from} takes images of {start_spec.channels} channels, the data have {changes['channels']}; "
            "start from another model."
        )
    if net and get_specification(net, **changes) != spec:
        raise UsageError(
            f"{start_from} holds {nearest_name(start_spec)[0]}, not the {net} that is asked for; leave out --net "
            "and the values of its specification."
        )


@torch.no_grad()
def _copy_weights(net: ResNet, start: TrainedModel, classes: Sequence[str], place: str) -> str:
    """Copies a model's weights; the head's rows are matched by class names, or stay newly initialised."""
    state = start.net.state_dict()
    same = set(start.classes) == set(classes)
    for key in ("fc.weight", "fc.bias"):
        state[key] = state[key][[start.classes.index(c) for c in classes]] if same else net.state_dict()[key]
    net.load_state_dict(state)
    if same:
        return f"starting from {place}, with its head: it has the same {len(classes)} classes"
    return (
        f"starting from {place} with a new head: it has {len(start.classes)} classes ({format_list(start.classes, 3)}), "
        f"the data {len(classes)} ({format_list(classes, 3)})"
    )


def nearest_name(spec: Specification) -> tuple[str, dict[str, Any]]:
    """The name nearest to a specification, and the changes to it; without channels and classes."""
    own = asdict(spec)
    best: tuple[str, dict[str, Any]] | None = None
    for name in list_network_names():
        named = asdict(get_specification(name))
        changes = {k: v for k, v in own.items() if v != named[k] and k not in ("channels", "classes")}
        if best is None or len(changes) < len(best[1]):
            best = name, changes
    assert best is not None
    return best


def file_digest(file: str) -> str:
    """16 hex digits of a file's contents."""
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
