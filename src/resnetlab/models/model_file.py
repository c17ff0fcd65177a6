"""The model file: weights, with everything that is needed to use them as metadata.

`model.safetensors` holds the `state_dict` under torchvision's names and, under the metadata key "resnetlab", a JSON object:
format, specification, classes, preprocessing, recipe, metrics, temperature, data, versions. A per-pixel mean is the extra
tensor "preprocessing.mean" (h, w, C); a few images are in "samples.check", "samples.labels" and "samples.training"
(models.reference_images). Nothing depends on the clock: the same training writes the same bytes.
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

from resnetlab.errors import ModelFileError
from resnetlab.models.reference_images import ReferenceImages
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import Specification
from resnetlab.preprocessing import Preprocessing
from resnetlab.run_folder import write_atomically

FORMAT_VERSION = 1
MEAN_TENSOR = "preprocessing.mean"


@dataclass(eq=False)
class TrainedModel:
    """A classifier with everything that its model file holds.

    Attributes:
        net: the network, in eval mode.
        classes: names, in the order of the logits.
        preprocessing: how images become the network's input.
        temperature: divides the logits before the softmax; 1 if it was not fitted.
        calibration: the data on which the temperature was fitted: {"data": …, "split": …, "n": …, "protocol": …}, or empty.
        recipe: the values of its training.
        metrics: split -> metrics measured on it, such as {"test": {"top1_error": 0.01, "n": 360}}.
        data: name and fingerprint of the training data.
        versions: of resnetlab and torch at training time.
        reference_images: images to check backends on and to calibrate int8 on; None if it was not trained here.
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
    reference_images: ReferenceImages | None = None

    @property
    def spec(self) -> Specification:
        """The network's specification."""
        return self.net.spec

    def save(self, path: Path) -> None:
        """Writes the model file atomically."""
        metadata = {
            "format": FORMAT_VERSION,
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
            tensors[MEAN_TENSOR] = self.preprocessing.mean
        if self.reference_images is not None:
            tensors |= self.reference_images.to_tensors()
        write_safetensors(path, tensors, metadata)

    def validate(self) -> str | None:
        """Returns what makes the model unusable, or None."""
        names, spec = self.classes, self.spec
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            return "its class names are not different words"
        if len(names) != spec.classes:
            return f"it names {len(names)} classes for {spec.classes} outputs"
        if problem := self.preprocessing.validate():
            return f"its preprocessing cannot be used ({problem})"
        if self.preprocessing.channels != spec.channels:
            return f"it prepares images of {self.preprocessing.channels} channels for a network of {spec.channels}"
        images = self.reference_images
        if images is not None and (problem := images.validate(self.preprocessing, len(names))):
            return f"the images in it cannot be used ({problem})"
        temperature = self.temperature
        if not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
            return f"its temperature is {temperature!r}"
        if bad := [name for name, v in self.net.state_dict().items() if not bool(v.isfinite().all())]:
            return f"some of its weights are not finite, such as {bad[0]}"
        return None


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors atomically, with JSON metadata that includes a digest of the tensors."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    text = json.dumps(dict(metadata) | {"digest": _compute_digest(tensors)}, allow_nan=False)
    write_atomically(path, save_tensors(tensors, metadata={"resnetlab": text}))


def _compute_digest(tensors: Mapping[str, Tensor]) -> str:
    """Hashes the names and bytes of all tensors, to detect corruption."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the JSON metadata that `write_safetensors` wrote.

    Raises ModelFileError if the file is missing, a folder, empty, truncated, damaged or without our metadata.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ModelFileError(f"{path} is not a regular file; give the {what} itself.")
    if path.is_dir():
        inside = path / "model.safetensors"
        hint = f"; did you mean {inside}?" if inside.is_file() else f"; give the {what} itself."
        raise ModelFileError(f"{path} is a folder{hint}")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ModelFileError(f"{path} does not exist; `resnetlab train` writes a {what} into its run folder.") from None
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read ({error.strerror}).") from error
    if not raw:
        raise ModelFileError(f"{path} is empty; copy or train it again.")
    try:
        tensors = load_tensors(raw)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} is not a complete safetensors file ({error}); copy or train it again.") from error
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    text = header.get("__metadata__", {}).get("resnetlab")
    if text is None:
        raise ModelFileError(f"{path} holds tensors but no resnetlab {what}: it was made by other software.")
    try:
        metadata = json.loads(text)
    except ValueError:
        metadata = None
    if not isinstance(metadata, dict) or metadata.pop("digest", None) != _compute_digest(tensors):
        raise ModelFileError(f"{path} is damaged: its contents do not match its digest; copy or train it again.")
    return tensors, metadata


def load_trained_model(path: Path) -> TrainedModel:
    """Reads a model file.

    Raises ModelFileError if it is missing, damaged, foreign, or its tensors do not match its specification.
    """
    tensors, metadata = read_safetensors(path, "model file")
    if "task" in metadata:
        task = metadata["task"]
        raise ModelFileError(f"{path} is not a classifier; use it with: resnetlab {task} predict {path} IMAGE...")
    if (version := metadata.get("format")) != FORMAT_VERSION:
        raise ModelFileError(f"{path} has format {version}, this version reads {FORMAT_VERSION}; update resnetlab.")
    try:
        spec = Specification.from_json(metadata["specification"])
        preprocessing = Preprocessing.from_json(metadata["preprocessing"], tensors.pop(MEAN_TENSOR, None))
        reference_images = ReferenceImages.pop_from(tensors)
        with torch.device("meta"):
            net = ResNet(spec)
        dtypes = {name: tensor.dtype for name, tensor in net.state_dict().items()}
        net.load_state_dict({k: v.to(dtypes.get(k, v.dtype)) for k, v in tensors.items()}, assign=True)
        model = TrainedModel(
            net=net.eval().requires_grad_(True),
            classes=tuple(metadata["classes"]),
            preprocessing=preprocessing,
            temperature=metadata["temperature"],
            recipe=metadata["recipe"],
            metrics=metadata["metrics"],
            data=metadata["data"],
            versions=metadata["versions"],
            calibration=metadata.get("calibration", {}),
            reference_images=reference_images,
        )
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (KeyError, RuntimeError, TypeError) as error:
        raise ModelFileError(f"{path} does not match its own specification: {error}") from error
    if problem := model.validate():
        raise ModelFileError(f"{path} cannot be used: {problem}; train or import it again.")
    return model
