"""Imports published weights as a model: network, classes and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from resnetlab.data.fingerprints import decode_fingerprints
from resnetlab.device import standard_torch_state
from resnetlab.errors import ModelFileError, UsageError, unknown_name_error
from resnetlab.formatting import find_name_problem, format_count, format_list
from resnetlab.inference.classes import dataset_class_names, parse_class_names
from resnetlab.inference.mean_file import crop_mean, read_mean_file
from resnetlab.models.cost import default_image_size
from resnetlab.models.import_weights import build_from_state, fold_biases, infer_specification
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.spec import Specification
from resnetlab.models.state_dicts import StateDictFile, read_state_dict
from resnetlab.preprocessing import Preprocessing

CHANNEL_ORDERS = ("rgb", "bgr")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES_FORM = (
    "a data set's name (as cifar10), a folder of class folders, a file with one name per line, "
    "or a comma-separated list"
)
# their ResNets take IMAGENET_MEAN and IMAGENET_STD
IMAGENET_SOURCES = ("torchvision", "timm", "mmpretrain", "transformers")


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """What the user specifies about weights; None means the known source's value.

    Attributes:
        source: the publisher, a name of models.import_weights.SOURCES; timm's with the architecture, as "timm:resnet50".
        classes: a data set's name, a folder of class folders, a file with one name per line, a comma-separated list, or a
            sequence of names.
        mean, std: in units of [0, 1], one number per channel, in the order of `channel_order`, or one for all.
        mean_file: a per-pixel mean instead of `mean` (2015 §4.2); see inference.mean_file.
        image_size: side of the input, in pixels.
        eval_resize: shorter side before the centre crop, in pixels.
        interpolation: of the resize.
        channel_order: "rgb" or "bgr", which the weights were trained on.
        changes: values of the specification, as in `--set key=value`.
        key: which of several state dicts in the file.
    """

    source: str | None = None
    classes: str | Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    mean_file: Path | None = None
    image_size: int | None = None
    eval_resize: int | None = None
    interpolation: str | None = None
    channel_order: str = "rgb"
    changes: Mapping[str, str] | None = None
    key: str | None = None

    @property
    def source_name(self) -> str:
        """The source without the architecture."""
        return (self.source or "").split(":")[0]

    @property
    def given_values(self) -> dict[str, Any]:
        """The attributes that are given."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: v for name, (v, default) in values.items() if v is not None and v != {} and v != default}

    def reject(self, keys: Sequence[str], why: str) -> None:
        """Raises UsageError if one of these attributes is given."""
        options = {"changes": "--set"}
        if found := [options.get(key, f"--{key.replace('_', '-')}") for key in keys if key in self.given_values]:
            raise UsageError(f"{why}; leave out {' and '.join(found)}.")

    def merge_over(self, known: ImportOptions) -> ImportOptions:
        """Replaces a publisher's options by those that are given."""
        if self.image_size is not None:
            known = replace(known, eval_resize=None)  # the publisher's is for another size
        changes = {**(known.changes or {}), **(self.changes or {})}
        return replace(known, **self.given_values | {"changes": changes})


@standard_torch_state()
def import_weights(file: Path, given: ImportOptions) -> tuple[TrainedModel, list[str]]:
    """Imports a weight file; returns the model, and notes on what was found, known and assumed.

    Raises:
        ModelFileError: the file cannot be read safely, or its tensors do not fit a residual network.
        UsageError: something that the file does not contain is neither given nor known; the message names the option.
    """
    return import_state_dict(read_state_dict(file, given.key), given, str(file))


def import_state_dict(state: StateDictFile, given: ImportOptions, where: str) -> tuple[TrainedModel, list[str]]:
    """Imports the state dict of a file or published model `where`; the notes are also in the model's metadata."""
    spec, inferred = infer_specification(state, given.source, given.changes)
    state = fold_biases(state, spec)
    notes = [*state.notes, *inferred]
    net = build_from_state(state, spec)
    if given.channel_order not in CHANNEL_ORDERS:
        raise unknown_name_error("channel order", given.channel_order, CHANNEL_ORDERS)
    if given.channel_order == "bgr" and state.layout != "caffe":  # Caffe's layout has been converted already
        net.conv1.weight.data = net.conv1.weight.data.flip(1).contiguous()
        notes.append("inputs changed from BGR to RGB")
    classes = _resolve_classes(state, given, spec, notes)
    preprocessing = _resolve_preprocessing(state, given, spec, notes)
    from resnetlab import __version__

    try:
        fingerprints = decode_fingerprints(state.metadata.get("fingerprints", {}))
    except (TypeError, ValueError) as error:
        raise ModelFileError(
            f"the fingerprints in {where} cannot be read ({error}); export the model again."
        ) from error
    model = TrainedModel(
        net=net,
        classes=classes,
        preprocessing=preprocessing,
        temperature=state.metadata.get("temperature", 1.0),
        recipe={"source": given.source or ("resnetlab export" if state.metadata else "given"), "notes": notes},
        data=state.metadata.get("data", {}),
        versions={"resnetlab": __version__, "torch": torch.__version__},
        calibration=state.metadata.get("calibration", {}),
        thresholds=tuple(state.metadata.get("thresholds", ())),
        fingerprints=fingerprints,
    )
    if problem := model.validate():
        raise ModelFileError(f"{where} does not give a usable model: {problem}; use complete weights.")
    return model, notes


def _resolve_classes(
    state: StateDictFile, given: ImportOptions, spec: Specification, notes: list[str]
) -> tuple[str, ...]:
    if given.classes is not None:
        return parse_class_names(given.classes, spec.classes)
    if state.metadata:
        return tuple(state.metadata["classes"])
    problem = find_name_problem(state.classes)
    if len(state.classes) != spec.classes:
        problem = f"{format_count(len(state.classes), 'name')} for {format_count(spec.classes, 'output')}"
    if state.classes and problem is None:
        notes.append(f"classes named in the file: {format_list(state.classes, 4)}; change them with --classes")
        return state.classes
    if given.source_name in IMAGENET_SOURCES and spec.classes == 1000:
        notes.append(f"ASSUMED from source {given.source_name}: ImageNet's 1,000 classes; change them with --classes")
        return dataset_class_names("imagenet")
    if state.classes:
        raise UsageError(f"the file's names of classes cannot be used ({problem}): give --classes, {CLASSES_FORM}.")
    raise UsageError(
        f"the file does not name its {format_count(spec.classes, 'class')}: give --classes, {CLASSES_FORM}."
    )


def _resolve_preprocessing(
    state: StateDictFile, given: ImportOptions, spec: Specification, notes: list[str]
) -> Preprocessing:
    known: dict[str, Any] = {}
    if state.metadata:
        exported = Preprocessing.from_json(state.metadata["preprocessing"])
        known = {name: getattr(exported, name) for name in ("mean", "std", "size", "resize", "interpolation", "dtype")}
    elif given.source_name in IMAGENET_SOURCES and spec.stem == "imagenet" and spec.channels == 3:
        known = {"mean": torch.tensor(IMAGENET_MEAN), "std": torch.tensor(IMAGENET_STD)}
        if assumed := [
            k for k in ("mean", "std") if getattr(given, k) is None and not (k == "mean" and given.mean_file)
        ]:
            values = " and ".join(f"{key} {','.join(f'{v:g}' for v in known[key].tolist())}" for key in assumed)
            notes.append(
                f"ASSUMED from source {given.source_name}: {values}, though some of its weights use others; "
                f"change them with {' and '.join(f'--{key}' for key in assumed)}"
            )
    if given.mean is not None and given.mean_file is not None:
        raise UsageError("give --mean or --mean-file, not both.")
    if given.mean_file is not None:
        known["mean"], found = read_mean_file(given.mean_file, spec.channels, given.channel_order)
        notes += found
        if given.std is None and given.mean_file.suffix == ".binaryproto" and "std" not in known:
            known["std"] = torch.full((spec.channels,), 1 / 255)
            notes.append("ASSUMED std 1/255: Caffe subtracts the mean from values of 0 to 255; change it with --std")
    if given.mean is not None:
        known["mean"] = _to_channel_tensor("mean", given.mean, spec.channels, given.channel_order)
    if given.std is not None:
        known["std"] = _to_channel_tensor("std", given.std, spec.channels, given.channel_order)
    if missing := [f"--{key}" for key in ("mean", "std") if key not in known]:
        raise UsageError(
            f"the file does not contain its preprocessing: give {' and '.join(missing)}, in units of [0, 1] and one "
            "number per channel, such as --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 (or --source torchvision; or --mean-file)."
        )
    size = known.get("size", (default_image_size(spec),) * 2)
    resize: int | None = known.get("resize")
    if given.image_size is not None:
        size, resize = (given.image_size, given.image_size), None  # the known resize is for another size
    if given.eval_resize is not None:
        resize = given.eval_resize
    if resize is None:
        resize = round(max(size) * 256 / 224) if spec.stem == "imagenet" else max(size)
    if min(size) < 1 or resize < max(size):
        raise UsageError(
            f"--eval-resize {resize} must be at least --image-size {max(size)}, which is cropped from it, and that at least 1."
        )
    if given.mean_file is not None:
        known["mean"] = crop_mean(known["mean"], size, resize)
    interpolation = given.interpolation or known.get("interpolation", "bilinear")
    if not state.metadata and None in (given.image_size, given.eval_resize, given.interpolation):
        notes.append(
            f"ASSUMED images: shorter side {resize}, {interpolation}, centre {size[0]}x{size[1]}; change them with "
            "--image-size, --eval-resize and --interpolation"
        )
    mean, std, dtype = known["mean"], known["std"], known.get("dtype", "")
    preprocessing = Preprocessing(spec.channels, size, resize, mean, std, interpolation, dtype)
    if (given.image_size or given.eval_resize) and (problem := preprocessing.validate()):
        raise UsageError(f"invalid preprocessing: {problem}.")
    return preprocessing


def _to_channel_tensor(key: str, values: Sequence[float], channels: int, order: str) -> torch.Tensor:
    if len(values) not in (1, channels):
        raise UsageError(f"--{key} takes {channels} numbers, one per channel, or one for all, not {len(values)}.")
    if not all(-1000 < v < 1000 for v in values) or (key == "std" and not all(v > 0 for v in values)):
        raise UsageError(f"--{key} takes finite numbers in units of [0, 1]{', above 0' if key == 'std' else ''}.")
    tensor = torch.tensor(list(values) * (channels if len(values) == 1 else 1), dtype=torch.float32)
    return tensor.flip(0) if order == "bgr" else tensor
