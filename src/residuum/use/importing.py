"""From weights published elsewhere to a model: network, classes and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from residuum.errors import ModelFileError, UsageError, unknown
from residuum.models.accounting import natural_size
from residuum.models.bundle import Bundle
from residuum.models.importers import infer, network
from residuum.models.spec import Specification
from residuum.models.states import State, read_state
from residuum.preprocessing import Preprocessing
from residuum.use.classes import class_names, of_data_set

ORDERS = ("rgb", "bgr")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of torchvision's and timm's ResNets


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a person says about weights, where the file does not; None leaves it to the known source.

    Attributes:
        source: who published them, a name of models.importers.SOURCES; timm's with the architecture, as "timm:resnet50".
        classes: a data set's name, a file with one name a line, names with commas between, or a list of names.
        mean, std: in units of [0, 1], one number a channel, in the order of `input`, or one for all.
        size, resize: side of the input, and the shorter side before the centre is cut, in pixels.
        interpolation: of the resize.
        input: "rgb" or "bgr": the order of the channels that the weights were trained on.
        changes: values of the specification, as `--set key=value` has them.
        key: which set of weights in the file.
    """

    source: str | None = None
    classes: str | Sequence[str] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int | None = None
    resize: int | None = None
    interpolation: str | None = None
    input: str = "rgb"
    changes: Mapping[str, str] | None = None
    key: str | None = None

    @property
    def publisher(self) -> str:
        """The source without the name of an architecture."""
        return (self.source or "").split(":")[0]

    @property
    def values(self) -> dict[str, Any]:
        """What is given, by attribute."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: v for name, (v, default) in values.items() if v is not None and v != {} and v != default}

    def refuse(self, keys: Sequence[str], why: str) -> None:
        """Raises UsageError where one of these is given."""
        options = {"changes": "--set"}
        if found := [options.get(key, f"--{key}") for key in keys if key in self.values]:
            raise UsageError(f"{why}; leave out {' and '.join(found)}.")

    def over(self, known: Given) -> Given:
        """What a publisher says, with what a person gives in its place."""
        if self.size is not None:
            known = replace(known, resize=None)  # the publisher's belongs to another size
        return replace(known, **self.values)


def import_weights(file: Path, given: Given) -> tuple[Bundle, list[str]]:
    """The model in a file of weights, and sentences on what was found, known and assumed.

    Raises:
        ModelFileError: the file cannot be read safely, or its tensors do not fit a residual network.
        UsageError: something that the file does not tell is neither given nor known; the message says which option gives it.
    """
    return assembled(read_state(file, given.key), given, str(file))


def assembled(state: State, given: Given, where: str) -> tuple[Bundle, list[str]]:
    """The model of a state that came from `where`, and the sentences, which stand in its metadata too."""
    spec, inferred = infer(state, given.source, given.changes)
    notes = [*state.notes, *inferred]
    net = network(state, spec)
    if given.input not in ORDERS:
        raise unknown("order of channels", given.input, ORDERS)
    if given.input == "bgr" and not state.caffe:  # Caffe's own layout is turned when it is read
        net.conv1.weight.data = net.conv1.weight.data.flip(1).contiguous()
        notes.append("inputs turned from BGR to RGB")
    classes = _classes(state, given, spec, notes)
    preprocessing = _preprocessing(state, given, spec, notes)
    from residuum import __version__

    bundle = Bundle(
        net=net,
        classes=classes,
        preprocessing=preprocessing,
        temperature=state.about.get("temperature", 1.0),
        recipe={"source": given.source or ("residuum export" if state.about else "given"), "notes": notes},
        data=state.about.get("data", {}),
        versions={"residuum": __version__, "torch": torch.__version__},
        calibration=state.about.get("calibration", {}),
    )
    if fault := bundle.fault():
        raise ModelFileError(f"{where} makes no model that could be used: {fault}; take weights that are whole.")
    return bundle, notes


def _classes(state: State, given: Given, spec: Specification, notes: list[str]) -> tuple[str, ...]:
    if given.classes is not None:
        return class_names(given.classes, spec.classes)
    if state.about:
        return tuple(state.about["classes"])
    if given.publisher in ("torchvision", "timm") and spec.classes == 1000:
        notes.append(f"ASSUMED from source {given.publisher}: ImageNet's 1,000 classes; --classes says otherwise")
        return of_data_set("imagenet")
    raise UsageError(
        f"the file does not name its {spec.classes:,} classes: give --classes, a data set's name (as cifar10), a file with "
        "one name a line, or names with commas between."
    )


def _preprocessing(state: State, given: Given, spec: Specification, notes: list[str]) -> Preprocessing:
    known: dict[str, Any] = {}
    if state.about:
        own = Preprocessing.from_json(state.about["preprocessing"])
        known = {
            "mean": own.mean,
            "std": own.std,
            "size": own.size,
            "resize": own.resize,
            "interpolation": own.interpolation,
        }
    elif given.publisher in ("torchvision", "timm") and spec.stem == "imagenet" and spec.channels == 3:
        known = {"mean": torch.tensor(IMAGENET_MEAN), "std": torch.tensor(IMAGENET_STD)}
        if assumed := [key for key in ("mean", "std") if getattr(given, key) is None]:
            values = " and ".join(f"{key} {','.join(f'{v:g}' for v in known[key].tolist())}" for key in assumed)
            notes.append(
                f"ASSUMED from source {given.publisher}: {values}, which some of its weights depart from; "
                f"{' and '.join(f'--{key}' for key in assumed)} say otherwise"
            )
    if given.mean is not None:
        known["mean"] = _per_channel("mean", given.mean, spec.channels, given.input)
    if given.std is not None:
        known["std"] = _per_channel("std", given.std, spec.channels, given.input)
    if missing := [f"--{key}" for key in ("mean", "std") if key not in known]:
        raise UsageError(
            f"the file does not say how its pictures were prepared: give {' and '.join(missing)}, in units of [0, 1] and one "
            "number a channel, such as --mean 0.49,0.48,0.45 --std 0.25,0.24,0.26 (or --source torchvision)."
        )
    size = (given.size, given.size) if given.size is not None else known.get("size", (natural_size(spec),) * 2)
    usual = round(max(size) * 256 / 224) if spec.stem == "imagenet" else max(size)
    resize = given.resize if given.resize is not None else known.get("resize", usual) if given.size is None else usual
    if min(size) < 1 or resize < max(size):
        raise UsageError(
            f"--resize {resize} must be at least --size {max(size)}, which is cut from it, and that at least 1."
        )
    interpolation = given.interpolation or known.get("interpolation", "bilinear")
    if not state.about and None in (given.size, given.resize, given.interpolation):
        notes.append(
            f"ASSUMED pictures: shorter side {resize}, {interpolation}, centre {size[0]}x{size[1]}; --size, --resize and "
            "--interpolation say otherwise"
        )
    made = Preprocessing(spec.channels, size, resize, known["mean"], known["std"], interpolation)
    if (given.size or given.resize) and (fault := made.fault()):
        raise UsageError(f"pictures cannot be prepared so: {fault}.")
    return made


def _per_channel(key: str, values: Sequence[float], channels: int, order: str) -> torch.Tensor:
    if len(values) not in (1, channels):
        raise UsageError(f"--{key} takes {channels} numbers, one a channel, or one for all, not {len(values)}.")
    if not all(-1000 < v < 1000 for v in values) or (key == "std" and not all(v > 0 for v in values)):
        raise UsageError(f"--{key} takes finite numbers in units of [0, 1]{', above 0' if key == 'std' else ''}.")
    whole = torch.tensor(list(values) * (channels if len(values) == 1 else 1), dtype=torch.float32)
    return whole.flip(0) if order == "bgr" else whole
