"""A detector's or segmenter's model file: a classifier's (`models.model_file`) with the head's values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnetlab.device import standard_torch_state
from resnetlab.errors import ModelFileError, ResNetLabError
from resnetlab.formatting import find_name_problem
from resnetlab.models.head_spec import DetectorSpec, HeadSpec, SegmenterSpec
from resnetlab.models.resnet import ResNet, allocate
from resnetlab.models.spec import Specification, check_network_size
from resnetlab.tensor_file import check_model_name, read_metadata, read_tensor_file, write_tensor_file

TASK_NOUNS = {"classify": "a classifier", "detect": "a detector", "segment": "a segmenter"}
HEAD_SPECS: dict[str, type[HeadSpec]] = {"detect": DetectorSpec, "segment": SegmenterSpec}


@dataclass(eq=False)
class AnnotatedModel:
    """A detector or segmenter with all that belongs to it (the content of its model file).

    Attributes:
        task: "detect" or "segment".
        net: of `models.detection` or `models.segmentation`.
        spec: of the backbone.
        head_spec: the specification of the head.
        classes: names; a segmenter's begin with the background, a detector's exclude it.
        recipe, metrics, data, versions: as in `models.model_file`.
    """

    task: str
    net: nn.Module
    spec: Specification
    head_spec: HeadSpec
    classes: tuple[str, ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Writes the model file, atomically."""
        check_model_name(Path(path))
        about = {"task": self.task, "specification": self.spec.to_json(), "head": self.head_spec.to_json()}
        about |= {key: getattr(self, key) for key in ("classes", "recipe", "metrics", "data", "versions")}
        write_tensor_file(Path(path), self.net.state_dict(), about)


def build_annotated_net(net: ResNet, head_spec: HeadSpec, classes: int, *, seed: int = 0, **training: Any) -> nn.Module:
    """Builds a detector or segmenter on a classifier's network, which becomes part of it.

    Args:
        training: values that only training uses; see `detection.build_detector`.
    """
    if isinstance(head_spec, DetectorSpec):
        from resnetlab.models.detection import build_detector

        detector: nn.Module = build_detector(net, head_spec, classes, seed=seed, **training)
        return detector
    assert isinstance(head_spec, SegmenterSpec)
    from resnetlab.models.segmentation import SegmentationNet

    return SegmentationNet(net, head_spec, classes, seed=seed)


def read_task(path: Path) -> str:
    """The task of a model file, read from its header alone; "classify" if it has no other, or cannot be read."""
    task = str(read_metadata(path).get("task"))
    return task if task in HEAD_SPECS else "classify"


def check_task(path: Path, task: str) -> None:
    """Raises ModelFileError unless the model file is of this task."""
    if read_task(path) != task:
        load_annotated(path, task)


@standard_torch_state()
def load_annotated(path: Path, task: str) -> AnnotatedModel:
    """Reads a model file of a task.

    Raises ModelFileError if it is missing, damaged, foreign, of another task, or its tensors do not fit its own values.
    """
    tensors, about = read_tensor_file(path, "model file")
    actual = str(about.get("task", "classify"))
    if actual != task:
        raise ModelFileError(
            f"{path} is {TASK_NOUNS.get(actual, 'something else')}, and {TASK_NOUNS[task]} is needed here."
        )
    try:
        spec = Specification.from_json(about["specification"])
        head_spec = HEAD_SPECS[task].from_json(about["head"])
        classes = tuple(about["classes"])
        if problem := find_name_problem(classes):
            raise ModelFileError(f"{problem}; train it again")
        check_network_size(spec, tensors)
        with torch.device("meta"):
            body = ResNet(replace(spec, classes=1))  # without its own head
        net = build_annotated_net(allocate(body), head_spec, len(classes))
        net.load_state_dict(tensors)
        if not all(bool(v.isfinite().all()) for v in tensors.values()):
            raise ModelFileError("some of its weights are not finite; train it again")
    except ResNetLabError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ModelFileError(f"{path} does not fit its own values: {' '.join(str(error).split())}") from error
    rest = {key: about.get(key, {}) for key in ("recipe", "metrics", "data", "versions")}
    return AnnotatedModel(task=task, net=net.eval(), spec=spec, head_spec=head_spec, classes=classes, **rest)
