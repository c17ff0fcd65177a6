"""The model file: weights, with everything that is needed to use them as metadata.

`model.safetensors` (`tensor_file`) contains the `state_dict` under torchvision's names and, as JSON: specification, classes,
preprocessing, recipe, metrics, temperature, data, versions. Further tensors may be missing: a per-pixel mean is
"preprocessing.mean" (h, w, C), a few images are "reference.check", "reference.labels" and "reference.training"
(models.reference_images), and "fingerprints.seen" and "fingerprints.held_out" identify images of the run (data.fingerprints).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.device import standard_torch_state
from resnetlab.errors import ModelFileError, UsageError, public
from resnetlab.formatting import find_name_problem, format_count, format_list, format_split, html_table, is_number
from resnetlab.models.own_network import OWN, Network, OwnNetwork, load_own_network, own_network_error
from resnetlab.models.reference_images import ReferenceImages
from resnetlab.models.resnet import ResNet
from resnetlab.models.spec import Specification, check_network_size
from resnetlab.preprocessing import Preprocessing
from resnetlab.tensor_file import check_model_name, read_tensor_file, write_tensor_file

MEAN_TENSOR = "preprocessing.mean"
FINGERPRINTS = "fingerprints."  # prefix of tensor names


@dataclass(eq=False, repr=False)
class TrainedModel:
    """A classifier with everything that its model file holds.

    Attributes:
        net: the network, in eval mode; one of the user's own in an OwnNetwork, as `net.module`.
        classes: names, in the order of the logits.
        preprocessing: how images become the network's input.
        temperature: divides the logits before the softmax; 1 if it was not fitted.
        calibration: the data on which the temperature was fitted: {"data": …, "split": …, "n": …, "protocol": …}, or empty.
            With "none_below" and "none_share" predictions say "none of these" below that score.
        recipe: the values of its training.
        metrics: split -> metrics measured on it, such as {"test": {"top1_error": 0.01, "n": 360}}.
        data: name and fingerprint of the training data.
        versions: of resnetlab and torch at training time.
        reference_images: images to check backends on and to calibrate int8 on; None if it was not trained here.
        thresholds: of a model that gives an image several classes, or none: a class is predicted where its score, a sigmoid, is
            this or more; empty for one class per image, by softmax.
        fingerprints: "seen", "held_out" -> fingerprints of these images of the run, uint32 (n, 2); see data.fingerprints.
    """

    net: Network
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float = 1.0
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    reference_images: ReferenceImages | None = None
    fingerprints: Mapping[str, Tensor] = field(default_factory=dict)
    thresholds: tuple[float, ...] = ()

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return bool(self.thresholds)

    def over_threshold(self, scores: Tensor) -> list[str]:
        """The classes of an image whose scores (classes,) are at their thresholds or over them, in the order of `classes`."""
        rows = zip(self.classes, scores.tolist(), self.thresholds, strict=True)
        return [name for name, score, threshold in rows if score >= threshold]

    @property
    def resnet(self) -> ResNet:
        """The network, as one whose layers are known; raises UsageError for one of the user's own."""
        if isinstance(self.net, OwnNetwork):
            raise own_network_error(self.net)
        return self.net

    @property
    def spec(self) -> Specification:
        """The network's specification; raises UsageError for a network of the user's own."""
        return self.resnet.spec

    @property
    def none_below(self) -> float:
        """The score below which a prediction says "none of these"; 0 if it never does."""
        return float(self.calibration.get("none_below", 0))

    def describe(self) -> dict[str, str]:
        """The model in a few words: network, classes, input, and the errors that were measured."""
        spec, (height, width) = self.net.spec, self.preprocessing.size
        measured = {format_split(key).replace("_", "-"): value for key, value in self.metrics.items()}
        errors = [f"{split} {value['top1_error']:.2%}" for split, value in measured.items() if "top1_error" in value]
        kind = "top-1 error"
        if self.multi_label:
            kind = "mean average precision"
            errors = [f"{split} {value['mean_ap']:.3f}" for split, value in measured.items() if "mean_ap" in value]
        colours = "grey" if spec.channels == 1 else "colour"
        return {
            "network": f"{str(self.recipe.get('net', 'residual network')).removeprefix(OWN)} ({spec.summary})",
            "classes": f"{len(self.classes):,}: {format_list(self.classes, 5)}",
            "input": f"{height}x{width} pixels, {self.preprocessing.pixel_format if self.preprocessing.dtype else colours}",
            kind: ", ".join(errors) or "not measured",
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'; '.join(f'{key} {text}' for key, text in self.describe().items())})"

    def _repr_html_(self) -> str:
        return html_table(("", type(self).__name__), self.describe().items())

    @public
    def save(self, path: str | Path) -> None:
        """Writes the model file atomically."""
        path = Path(path)
        check_model_name(path)
        metadata = {
            "task": "classify",
            "specification": self.net.spec.to_json(),
            "classes": list(self.classes),
            "preprocessing": self.preprocessing.to_json(),
            "temperature": self.temperature,
            "recipe": self.recipe,
            "metrics": self.metrics,
            "data": self.data,
            "versions": self.versions,
        } | ({"calibration": self.calibration} if self.calibration else {})
        metadata |= {"thresholds": list(self.thresholds)} if self.thresholds else {}
        tensors = dict(self.net.state_dict())
        if isinstance(self.net, OwnNetwork):  # some of whose tensors may be one
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        if self.preprocessing.mean.ndim == 3:
            tensors[MEAN_TENSOR] = self.preprocessing.mean
        if self.reference_images is not None:
            tensors |= self.reference_images.to_tensors()
        tensors |= {FINGERPRINTS + key: value for key, value in self.fingerprints.items()}
        write_tensor_file(path, tensors, metadata)

    def describe_images(self) -> str:
        """A sentence on the images of the data in the model file."""
        if (images := self.reference_images) is None:
            return "The model file holds no images."
        check, training = format_count(len(images.check), "image"), format_count(len(images.training), "training image")
        return f"The model file holds {check} to check backends on and {training}, as the network gets them."

    def without_images(self) -> TrainedModel:
        """A copy for other people: without images of the data. Their fingerprints, which recognise them, stay."""
        return replace(self, reference_images=None)

    def validate(self) -> str | None:
        """Returns what makes the model unusable, or None."""
        names, spec = self.classes, self.net.spec
        if problem := find_name_problem(names):
            return problem
        if len(names) != spec.classes:
            return f"it names {format_count(len(names), 'class')} for {format_count(spec.classes, 'output')}"
        if problem := self.preprocessing.validate():
            return f"its preprocessing cannot be used ({problem})"
        if self.preprocessing.channels != spec.channels:
            return (
                f"it prepares images of {format_count(self.preprocessing.channels, 'channel')} for a "
                f"network of {spec.channels}"
            )
        images = self.reference_images
        if images is not None and (problem := images.validate(self.preprocessing, len(names))):
            return f"the images in it cannot be used ({problem})"
        if any(v.dtype != torch.uint32 or v.ndim != 2 or v.shape[1] != 2 for v in self.fingerprints.values()):
            return "its fingerprints of images are not pairs of 32-bit numbers"
        about = (self.recipe, self.metrics, self.data, self.versions, self.calibration)
        if not all(isinstance(values, Mapping) for values in about) or not all(
            isinstance(values, Mapping) for values in self.metrics.values()
        ):
            return "its metadata are not tables of values"
        temperature = self.temperature
        if not is_number(temperature) or not 1e-6 <= temperature <= 1e6:
            return f"its temperature is {temperature!r}"
        below = self.calibration.get("none_below", 0)
        if not isinstance(below, int | float) or not 0 <= below <= 1:
            return f"its score for none of the classes is {below!r}"
        thresholds = self.thresholds
        if thresholds and (len(thresholds) != len(names) or not all(is_number(t) and 0 < t < 1 for t in thresholds)):
            return f"its thresholds are not {len(names)} numbers between 0 and 1"
        if bad := [name for name, v in self.net.state_dict().items() if not bool(v.isfinite().all())]:
            return f"some of its weights are not finite, such as {bad[0]}"
        return None


def compute_scores(logits: Tensor, multi_label: bool, dim: int = 1) -> Tensor:
    """Scores of logits over classes in dimension `dim`: softmax, or sigmoid where an image may have several classes."""
    return torch.sigmoid(logits) if multi_label else torch.softmax(logits, dim)


@standard_torch_state()
def load_trained_model(path: Path, net: nn.Module | None = None) -> TrainedModel:
    """Reads a model file; `net` is the user's own network that it holds the weights of.

    Raises ModelFileError if it is missing, damaged, foreign, or its tensors do not match its specification; UsageError for the
    name of a published one.
    """
    if (inside := path / "model.safetensors").is_file():
        path = inside  # of a run folder
    if ":" in str(path).partition("/")[0] and not path.is_absolute() and not path.exists():
        raise UsageError(f"{path} is no file here; a published model is opened by resnetlab.load({str(path)!r}).")
    tensors, metadata = read_tensor_file(path, "model file")
    if (task := metadata.get("task", "classify")) != "classify":
        raise ModelFileError(f"{path} is not a classifier; use it with: resnetlab {task} predict {path} IMAGE...")
    try:
        preprocessing = Preprocessing.from_json(metadata["preprocessing"], tensors.pop(MEAN_TENSOR, None))
        reference_images = ReferenceImages.pop_from(tensors)
        fingerprints = {
            name.removeprefix(FINGERPRINTS): tensors.pop(name)
            for name in list(tensors)
            if name.startswith(FINGERPRINTS)
        }
        model = TrainedModel(
            net=_load_network(metadata["specification"], tensors, net),
            classes=tuple(metadata["classes"]),
            preprocessing=preprocessing,
            temperature=metadata["temperature"],
            recipe=metadata["recipe"],
            metrics=metadata["metrics"],
            data=metadata["data"],
            versions=metadata["versions"],
            calibration=metadata.get("calibration", {}),
            reference_images=reference_images,
            fingerprints=fingerprints,
            thresholds=tuple(metadata.get("thresholds", ())),
        )
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())  # torch lists mismatches on lines of their own
        raise ModelFileError(f"{path} does not match its own specification: {reason}") from error
    if problem := model.validate():
        raise ModelFileError(f"{path} cannot be used: {problem}; train or import it again.")
    return model


def _load_network(specification: Mapping[str, Any], tensors: Mapping[str, Tensor], own: nn.Module | None) -> Network:
    if "own_class" in specification:
        return load_own_network(own, specification, tensors).eval()
    spec = Specification.from_json(specification)
    if own is not None:
        raise ModelFileError(f"it holds one of ResNetLab's networks ({spec.summary}); load it without net")
    check_network_size(spec, tensors)
    with torch.device("meta"):
        net = ResNet(spec)
    dtypes = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    nn.Module.load_state_dict(net, {k: v.to(dtypes.get(k, v.dtype)) for k, v in tensors.items()}, assign=True)
    return net.eval().requires_grad_(True)
