"""How a network is made ready to learn: initialised, or taken from a model file with a head for other classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from residuum.errors import UsageError
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.resnet import ResNet, assemble
from residuum.models.spec import Specification, known_names, specification
from residuum.runtime import seed_for


@dataclass(frozen=True, kw_only=True)
class Network:
    """What becomes the network of a task.

    Attributes:
        name: of models.spec; "" for whatever the model file holds.
        changes: to the specification that the name stands for.
        init, zero_last_bn: see models.resnet.initialise.
        stochastic_depth: share of pictures for which the last block's F is left out while training, less before it, linearly.
        recompute: keep few maps while training.
        start_from: a model file, or "".
        frozen_bn: BN stays as it is, weights and statistics.
        seed: of the first weights.
    """

    name: str
    changes: Mapping[str, Any]
    init: str = "fan_in"
    zero_last_bn: bool = False
    stochastic_depth: float = 0.0
    recompute: bool = False
    start_from: str = ""
    frozen_bn: bool = False
    seed: int = 0

    def build(self, channels: int, classes: Sequence[str]) -> tuple[ResNet, Bundle | None, list[str]]:
        """The network, the model that it started from, and sentences on what was taken from that.

        Raises:
            UsageError: an unknown network or value, or one that is not the model file's.
            ModelFileError: the model file is missing or damaged.
        """
        start = load_bundle(Path(self.start_from)) if self.start_from else None
        changes = {"channels": channels, "classes": len(classes)} | dict(self.changes)
        if start is None:
            if not self.name:
                raise UsageError("which network is it to start from? Give a model file: --start-from MODEL.")
            spec = specification(self.name, **changes)
        else:
            spec = replace(start.spec, classes=len(classes))
            self._compare(start.spec, spec, changes)
        net = assemble(spec, init=self.init, seed=seed_for(self.seed, "init"), zero_last_bn=self.zero_last_bn)
        said = [] if start is None else [_take_over(net, start, classes, self.start_from)]
        net.recompute = self.recompute
        blocks = list(net.blocks())
        for i, (_, block) in enumerate(blocks, 1):
            block.drop = self.stochastic_depth * i / len(blocks)
        for module in net.modules() if self.frozen_bn else ():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        return net, start, said

    def _compare(self, theirs: Specification, spec: Specification, changes: Mapping[str, Any]) -> None:
        """Raises UsageError where the model file holds another network than is asked for."""
        if changes["channels"] != theirs.channels:
            raise UsageError(
                f"{self.start_from} takes pictures of {theirs.channels} channels, the data have {changes['channels']}; "
                "start from another model."
            )
        if self.name and specification(self.name, **changes) != spec:
            raise UsageError(
                f"{self.start_from} holds {described(theirs)[0]}, not the {self.name} that is asked for; leave out --net "
                "and the values of its specification."
            )


@torch.no_grad()
def _take_over(net: ResNet, start: Bundle, classes: Sequence[str], place: str) -> str:
    """Copies a model's weights; the head's rows are matched by the names of the classes, or left new."""
    state = start.net.state_dict()
    same = set(start.classes) == set(classes)
    for key in ("fc.weight", "fc.bias"):
        state[key] = state[key][[start.classes.index(c) for c in classes]] if same else net.state_dict()[key]
    net.load_state_dict(state)
    if same:
        return f"starting from {place}, head and all: it knows the same {len(classes)} classes"
    return (
        f"starting from {place} with a new head: it knows {len(start.classes)} classes ({_some(start.classes)}), "
        f"the data {len(classes)} ({_some(classes)})"
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def described(spec: Specification) -> tuple[str, dict[str, Any]]:
    """The name that comes nearest to a specification, and what it changes; channels and classes left out."""
    own = asdict(spec)
    best: tuple[str, dict[str, Any]] | None = None
    for name in known_names():
        named = asdict(specification(name))
        changes = {k: v for k, v in own.items() if v != named[k] and k not in ("channels", "classes")}
        if best is None or len(changes) < len(best[1]):
            best = name, changes
    assert best is not None
    return best


def digest(file: str) -> str:
    """16 hex digits of a file's contents."""
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
