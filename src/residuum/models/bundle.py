"""The model file: weights, and as their metadata everything that is needed to use them.

`model.safetensors` holds the `state_dict` under torchvision's names and, under the metadata key "residuum", a JSON object:
format, specification, classes, preprocessing, recipe, metrics, temperature, data, versions. A per-pixel mean is kept as the
extra tensor "preprocessing.mean" (h, w, C). Nothing in it depends on the clock: the same training gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from residuum.errors import ModelFileError
from residuum.models.resnet import ResNet
from residuum.models.spec import Specification
from residuum.preprocessing import Preprocessing
from residuum.records import write_atomically

FORMAT = 1
MEAN = "preprocessing.mean"


@dataclass(eq=False)
class Bundle:
    """A network with all that belongs to it.

    Attributes:
        net: the network, in eval mode.
        classes: names, in the order of the logits.
        preprocessing: how pictures become its input.
        temperature: logits are divided by it before the softmax; 1 where none was fitted.
        recipe: the values it was trained with.
        metrics: split -> figures measured on it, such as {"test": {"top1_error": 0.01, "n": 360}}.
        data: name and fingerprint of the training data.
        versions: of residuum and torch, when it was made.
    """

    net: ResNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float = 1.0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> Specification:
        """The network's specification."""
        return self.net.spec

    def save(self, path: Path) -> None:
        """Writes the model file, atomically."""
        about = {
            "format": FORMAT,
            "specification": self.spec.to_json(),
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_json(),
            "temperature": self.temperature,
            "recipe": self.recipe,
            "metrics": self.metrics,
            "data": self.data,
            "versions": self.versions,
        }
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.net.state_dict().items()}
        if self.preprocessing.mean.ndim == 3:
            tensors[MEAN] = self.preprocessing.mean.contiguous()
        write_atomically(path, save_tensors(tensors, metadata={"residuum": json.dumps(about)}))


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file of ours and the JSON in its metadata.

    Raises ModelFileError where the file is missing, a folder, empty, cut short, foreign or without our metadata.
    """
    if path.is_dir():
        inside = path / "model.safetensors"
        hint = f"; did you mean {inside}?" if inside.is_file() else f"; give the {what} itself."
        raise ModelFileError(f"{path} is a folder{hint}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{path} is not there; `residuum train` writes a {what} into its run folder.") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}).") from error
    if not raw:
        raise ModelFileError(f"{path} is empty; copy or train it again.")
    try:
        tensors = load_tensors(raw)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} is not a whole safetensors file ({error}); copy or train it again.") from error
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    text = header.get("__metadata__", {}).get("residuum")
    if text is None:
        raise ModelFileError(f"{path} holds tensors but no residuum {what}: it was made by other software.")
    return tensors, json.loads(text)


def load_bundle(path: Path) -> Bundle:
    """Reads a model file.

    Raises ModelFileError where it is missing, damaged, foreign, or its tensors do not fit its own specification.
    """
    tensors, about = read_safetensors(path, "model file")
    if about.get("format") != FORMAT:
        raise ModelFileError(f"{path} has format {about.get('format')}, this version reads {FORMAT}; update residuum.")
    try:
        spec = Specification.from_json(about["specification"])
        preprocessing = Preprocessing.from_json(about["preprocessing"], tensors.pop(MEAN, None))
        with torch.device("meta"):
            net = ResNet(spec)
        net.load_state_dict(tensors, assign=True)
        return Bundle(
            net=net.eval().requires_grad_(True),
            classes=tuple(about["classes"]),
            preprocessing=preprocessing,
            temperature=about["temperature"],
            recipe=about["recipe"],
            metrics=about["metrics"],
            data=about["data"],
            versions=about["versions"],
        )
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (KeyError, RuntimeError, TypeError) as error:
        raise ModelFileError(f"{path} does not fit its own specification: {error}") from error
