"""A detector's or segmenter's model file: as a classifier's (`models.bundle`), and with it what the head is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from residuum.errors import ModelFileError, ResiduumError
from residuum.models.bundle import read_safetensors, write_safetensors
from residuum.models.resnet import ResNet
from residuum.models.spec import Specification
from residuum.models.values import Dense, Detector, Segmenter

FORMAT = 1
VALUES: dict[str, type[Dense]] = {"detect": Detector, "segment": Segmenter}


@dataclass(eq=False)
class DenseBundle:
    """A detector or segmenter with all that belongs to it.

    Attributes:
        task: "detect" or "segment".
        net: of `models.dense`.
        spec: of the backbone.
        values: what stands on the backbone.
        classes: names; a detector's without the background, a segmenter's with it, first.
        recipe, metrics, data, versions: as in `models.bundle`.
    """

    task: str
    net: nn.Module
    spec: Specification
    values: Dense
    classes: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Writes the model file, atomically."""
        about = {
            "format": FORMAT,
            "task": self.task,
            "specification": self.spec.to_json(),
            self.task: self.values.to_json(),
            "classes": list(self.classes),
            "recipe": self.recipe,
            "metrics": self.metrics,
            "data": self.data,
            "versions": self.versions,
        }
        write_safetensors(path, self.net.state_dict(), about)


def build(net: ResNet, values: Dense, classes: int, *, seed: int = 0, **training: Any) -> nn.Module:
    """The network of values on a classifier's network, which it takes over.

    Args:
        training: what only training looks at; see `dense.detector`.
    """
    from residuum.models import dense

    if isinstance(values, Detector):
        made: nn.Module = dense.detector(net, values, classes, seed=seed, **training)
        return made
    assert isinstance(values, Segmenter)
    return dense.Segments(net, values, classes, seed=seed)


def task_of(path: Path) -> str:
    """The task of a model file, by its header alone; "classify" where it tells of no other, or cannot be read so."""
    try:
        with safe_open(path, framework="pt") as file:
            task = json.loads((file.metadata() or {}).get("residuum", "{}")).get("task")
    except (OSError, SafetensorError, ValueError, AttributeError):
        return "classify"  # who reads all of it says what is wrong
    return str(task) if task in VALUES else "classify"


def load_dense(path: Path, task: str) -> DenseBundle:
    """Reads a model file of a task.

    Raises ModelFileError where it is missing, damaged, foreign, of another task, or its tensors do not fit its own values.
    """
    tensors, about = read_safetensors(path, "model file")
    given = about.get("task", "classify")
    if given != task:
        kinds = {"classify": "a classifier", "detect": "a detector", "segment": "a segmenter"}
        raise ModelFileError(f"{path} is {kinds.get(given, 'something else')}, and {kinds[task]} is needed here.")
    if about.get("format") != FORMAT:
        raise ModelFileError(f"{path} has format {about.get('format')}, this version reads {FORMAT}; update residuum.")
    try:
        spec = Specification.from_json(about["specification"])
        values = VALUES[task].from_json(about[task])
        classes = tuple(map(str, about["classes"]))
        with torch.device("meta"):
            body = ResNet(spec)
        net = build(body.to_empty(device="cpu"), values, len(classes))
        net.load_state_dict(tensors)
        if not all(bool(v.isfinite().all()) for v in tensors.values()):
            raise ModelFileError("some of its weights are not finite; train it again")
    except ResiduumError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (KeyError, RuntimeError, TypeError) as error:
        raise ModelFileError(f"{path} does not fit its own values: {error}") from error
    rest = {key: about.get(key, {}) for key in ("recipe", "metrics", "data", "versions")}
    return DenseBundle(task=task, net=net.eval(), spec=spec, values=values, classes=classes, **rest)
