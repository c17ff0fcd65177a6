"""From weights published elsewhere to a model: network, classes and preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from residuum.errors import UsageError, unknown
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
        source: who published them, a name of models.importers.SOURCES.
        classes: a data set's name, a file with one name a line, or names with commas between.
        mean, std: in units of [0, 1], one number a channel or one for all.
        size, resize: side of the input, and the shorter side before the centre is cut, in pixels.
        interpolation: of the resize.
        input: "rgb" or "bgr": the order of the channels that the weights were trained on.
        changes: values of the specification, as `--set key=value` has them.
        key: which set of weights in the file.
    """

    source: str | None = None
    classes: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: int | None = None
    resize: int | None = None
    interpolation: str | None = None
    input: str = "rgb"
    changes: Mapping[str, str] | None = None
    key: str | None = None


def import_weights(file: Path, given: Given) -> tuple[Bundle, list[str]]:
    """The model in a file of weights, and sentences on what was found, known and assumed.

    Raises:
        ModelFileError: the file cannot be read safely, or its tensors do not fit a residual network.
        UsageError: something that the file does not tell is neither given nor known; the message says which option gives it.
    """
    state = read_state(file, given.key)
    bundle, notes = assembled(state, given)
    return bundle, [*state.notes, *notes]


def assembled(state: State, given: Given) -> tuple[Bundle, list[str]]:
    """The model of a state."""
    spec, notes = infer(state, given.source, given.changes)
    net = network(state, spec)
    if given.input not in ORDERS:
        raise unknown("order of channels", given.input, ORDERS)
    if given.input == "bgr" and not state.caffe:  # Caffe's own layout is turned when it is read
        net.conv1.weight.data = net.conv1.weight.data.flip(1).contiguous()
        notes.append("inputs turned from BGR to RGB")
    classes = _classes(state, given, spec)
    preprocessing = _preprocessing(state, given, spec, notes)
    from residuum import __version__

    recipe = {"source": given.source or ("residuum export" if state.about else "given")}
    return Bundle(
        net=net,
        classes=classes,
        preprocessing=preprocessing,
        temperature=float(state.about.get("temperature", 1.0)),
        recipe=recipe,
        versions={"residuum": __version__, "torch": torch.__version__},
    ), notes


def _classes(state: State, given: Given, spec: Specification) -> tuple[str, ...]:
    if given.classes is not None:
        return class_names(given.classes, spec.classes)
    if state.about:
        return tuple(state.about["classes"])
    if given.source in ("torchvision", "timm") and spec.classes == 1000:
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
    elif given.source in ("torchvision", "timm") and spec.stem == "imagenet" and spec.channels == 3:
        known = {"mean": torch.tensor(IMAGENET_MEAN), "std": torch.tensor(IMAGENET_STD)}
    if given.mean is not None:
        known["mean"] = _per_channel("mean", given.mean, spec.channels)
    if given.std is not None:
        known["std"] = _per_channel("std", given.std, spec.channels)
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
    if not state.about and (given.size is None or given.resize is None):
        notes.append(
            f"ASSUMED pictures: shorter side {resize}, centre {size[0]}x{size[1]}; --size and --resize say otherwise"
        )
    interpolation = given.interpolation or known.get("interpolation", "bilinear")
    return Preprocessing(spec.channels, size, resize, known["mean"], known["std"], interpolation)


def _per_channel(key: str, values: Sequence[float], channels: int) -> torch.Tensor:
    if len(values) not in (1, channels):
        raise UsageError(f"--{key} takes {channels} numbers, one a channel, or one for all, not {len(values)}.")
    if not all(-1000 < v < 1000 for v in values) or (key == "std" and not all(v > 0 for v in values)):
        raise UsageError(f"--{key} takes finite numbers in units of [0, 1]{', above 0' if key == 'std' else ''}.")
    return torch.tensor(list(values) * (channels if len(values) == 1 else 1), dtype=torch.float32)
