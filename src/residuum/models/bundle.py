"""The model file: weights, and as their metadata everything that is needed to use them.

`model.safetensors` holds the `state_dict` under torchvision's names and, under the metadata key "residuum", a JSON object:
format, specification, classes, preprocessing, recipe, metrics, temperature, data, versions. A per-pixel mean is kept as the
extra tensor "preprocessing.mean" (h, w, C), and a few pictures as "samples.check", "samples.labels" and "samples.training"
(models.samples). Nothing in it depends on the clock: the same training gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
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
from residuum.models.samples import Samples
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
        calibration: on what the temperature was fitted: {"data": …, "split": …, "n": …, "protocol": …}; empty where none was.
        recipe: the values it was trained with.
        metrics: split -> figures measured on it, such as {"test": {"top1_error": 0.01, "n": 360}}.
        data: name and fingerprint of the training data.
        versions: of residuum and torch, when it was made.
        samples: a few pictures that engines are held to and int8 is calibrated on; None where it was not trained here.
    """

    net: ResNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float = 1.0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    samples: Samples | None = None

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
        } | ({"calibration": self.calibration} if self.calibration else {})
        tensors = dict(self.net.state_dict())
        if self.preprocessing.mean.ndim == 3:
            tensors[MEAN] = self.preprocessing.mean
        if self.samples is not None:
            tensors |= self.samples.tensors()
        write_safetensors(path, tensors, about)

    def fault(self) -> str | None:
        """What makes it useless though it could be made; None where nothing does."""
        names, spec = self.classes, self.spec
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            return "its class names are not different words"
        if len(names) != spec.classes:
            return f"it names {len(names)} classes for {spec.classes} outputs"
        if fault := self.preprocessing.fault():
            return f"its preprocessing cannot be used ({fault})"
        if self.preprocessing.channels != spec.channels:
            return f"it prepares pictures of {self.preprocessing.channels} channels for a network of {spec.channels}"
        if self.samples is not None and (fault := self.samples.fault(self.preprocessing, len(names))):
            return f"the pictures in it cannot be used ({fault})"
        temperature = self.temperature
        if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            return f"its temperature is {temperature!r}"
        if strange := [name for name, v in self.net.state_dict().items() if not bool(v.isfinite().all())]:
            return f"some of its weights are not finite, such as {strange[0]}"
        return None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Writes tensors with JSON and a digest of themselves as their metadata, atomically."""
    whole = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps(dict(about) | {"digest": _digest(whole)}, allow_nan=False)
    write_atomically(path, save_tensors(whole, metadata={"residuum": text}))


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash over names and bytes of all tensors, so that a flipped bit does not go unnoticed."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file of ours and the JSON in its metadata.

    Raises ModelFileError where the file is missing, a folder, empty, cut short, foreign or without our metadata.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ModelFileError(f"{path} is no regular file; give the {what} itself.")
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
    try:
        about = json.loads(text)
    except ValueError:
        about = None
    if not isinstance(about, dict) or about.pop("digest", None) != _digest(tensors):
        raise ModelFileError(f"{path} is damaged: its contents do not fit its own digest; copy or train it again.")
    return tensors, about


def load_bundle(path: Path) -> Bundle:
    """Reads a model file.

    Raises ModelFileError where it is missing, damaged, foreign, or its tensors do not fit its own specification.
    """
    tensors, about = read_safetensors(path, "model file")
    if "task" in about:
        raise ModelFileError(
            f"{path} is no classifier; use it with: residuum {about['task']} predict {path} PICTURE..."
        )
    if about.get("format") != FORMAT:
        raise ModelFileError(f"{path} has format {about.get('format')}, this version reads {FORMAT}; update residuum.")
    try:
        spec = Specification.from_json(about["specification"])
        preprocessing = Preprocessing.from_json(about["preprocessing"], tensors.pop(MEAN, None))
        samples = Samples.taken_from(tensors)
        with torch.device("meta"):
            net = ResNet(spec)
        wanted = {name: tensor.dtype for name, tensor in net.state_dict().items()}
        net.load_state_dict({k: v.to(wanted.get(k, v.dtype)) for k, v in tensors.items()}, assign=True)
        bundle = Bundle(
            net=net.eval().requires_grad_(True),
            classes=tuple(about["classes"]),
            preprocessing=preprocessing,
            temperature=about["temperature"],
            recipe=about["recipe"],
            metrics=about["metrics"],
            data=about["data"],
            versions=about["versions"],
            calibration=about.get("calibration", {}),
            samples=samples,
        )
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (KeyError, RuntimeError, TypeError) as error:
        raise ModelFileError(f"{path} does not fit its own specification: {error}") from error
    if fault := bundle.fault():
        raise ModelFileError(f"{path} cannot be used: {fault}; train or import it again.")
    return bundle
