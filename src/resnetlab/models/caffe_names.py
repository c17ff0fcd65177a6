"""Converts the Caffe layer names of the released ImageNet models (KaimingHe/deep-residual-networks) to torchvision's.

    conv1, bn_conv1, scale_conv1                         conv1, bn1
    res2a_branch1, bn2a_branch1, scale2a_branch1         layer1.0.downsample.0, .1
    res2a_branch2a … 2c, bn2a_branch2a, scale2a_…        layer1.0.conv1 … conv3, bn1 … bn3
    res3b1 … res3b7 (in the 101- and 152-layer nets)     layer2.1 … layer2.7
    fc1000                                               fc

A blob is named by its layer, then "/", "." or "_", then a number or a word: weights and bias; BN's mean, variance and an
optional factor that divides both; scale's gamma and beta.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import ascii_lowercase

from torch import Tensor

from resnetlab.errors import ModelFileError

_BLOB = re.compile(
    r"(?P<layer>.+?)[/._](?P<blob>\d|weights?|bias(?:es)?|mean|var(?:iance)?|(?:scale_)?factor|scale|offset|gamma|beta)(?::0)?"
)
_WEIGHT, _BIAS = ("0", "weight", "weights", "scale", "gamma"), ("1", "bias", "biases", "offset", "beta")
_UNIT_LAYER = re.compile(r"(?P<stage>\d)(?P<unit>[a-z]\d*)_branch(?P<branch>1|2[a-z])")


def convert_caffe_names(arrays: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Converts arrays named by Caffe's layers and blobs to a state dict; conv1's input channels change from BGR to RGB.

    Raises ModelFileError for a name that is not a layer of these networks.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in arrays.items():
        if not (match := _BLOB.fullmatch(name)):
            raise ModelFileError(
                f"{where}: {name} is not a layer and blob of the released Caffe nets, such as res2a_branch2a/0."
            )
        layers.setdefault(match["layer"], {})[match["blob"]] = value.float() if not value.is_floating_point() else value
    units = _find_units(layers, where)
    state: dict[str, Tensor] = {}
    for layer, blobs in layers.items():
        kind, target = _translate_layer(layer, units, where)
        state |= {f"{target}.{key}": value for key, value in _translate_blobs(kind, blobs, f"{where}: {layer}").items()}
    if "conv1.weight" in state:
        state["conv1.weight"] = state["conv1.weight"].flip(1)  # Caffe's images are BGR
    return state


def _find_units(layers: Mapping[str, object], where: str) -> dict[str, list[str]]:
    """Units of each stage in order: a, b, c, …, or a, b1, b2, …, b22. Raises ModelFileError if one is missing."""
    found: dict[str, set[str]] = {}
    for layer in layers:
        if match := _UNIT_LAYER.search(layer):
            found.setdefault(match["stage"], set()).add(match["unit"])
    for stage, units in found.items():
        numbered = any(len(unit) > 1 for unit in units)
        expected = ["a", *(f"b{i}" for i in range(1, len(units)))] if numbered else ascii_lowercase[: len(units)]
        if missing := [unit for unit in expected if unit not in units]:
            raise ModelFileError(
                f"{where}: unit res{stage}{missing[0]} is missing, there are only "
                f"{', '.join(f'res{stage}{unit}' for unit in sorted(units, key=_unit_position))}; give the whole network."
            )
    return {stage: sorted(units, key=_unit_position) for stage, units in found.items()}


def _unit_position(unit: str) -> tuple[str, int]:
    """Sort key for a unit within its stage: a, b, c; a, b1, b2, …, b10."""
    return unit[0], int(unit[1:] or 0)


def _translate_layer(layer: str, units: Mapping[str, list[str]], where: str) -> tuple[str, str]:
    """Maps a Caffe layer to its kind ("conv", "bn", "scale" or "fc") and torchvision's name."""
    if layer == "conv1":
        return "conv", "conv1"
    if layer in ("bn_conv1", "scale_conv1"):
        return layer.split("_")[0], "bn1"
    if layer.startswith("fc"):
        return "fc", "fc"
    kind = next((kind for kind in ("res", "bn", "scale") if layer.startswith(kind)), None)
    match = _UNIT_LAYER.fullmatch(layer.removeprefix(kind)) if kind else None
    if kind is None or match is None:
        raise ModelFileError(f"{where}: {layer} is not a layer of the released Caffe nets, such as res2a_branch2a.")
    unit = f"layer{int(match['stage']) - 1}.{units[match['stage']].index(match['unit'])}"
    if match["branch"] == "1":
        return ("conv", f"{unit}.downsample.0") if kind == "res" else (kind, f"{unit}.downsample.1")
    number = ord(match["branch"][1]) - ord("a") + 1
    return ("conv", f"{unit}.conv{number}") if kind == "res" else (kind, f"{unit}.bn{number}")


def _translate_blobs(kind: str, blobs: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """Renames a layer's blobs to PyTorch's parameter and buffer names."""

    def find_blob(*names: str) -> Tensor | None:
        return next((blobs[name] for name in names if name in blobs), None)

    if kind == "bn":
        mean, variance = find_blob("0", "mean"), find_blob("1", "var", "variance")
        factor = find_blob("2", "factor", "scale_factor")
        if mean is None or variance is None:
            raise ModelFileError(f"{layer} has no mean and variance; give all blobs of the layer.")
        divisor = 1.0 if factor is None or not float(factor.reshape(-1)[0]) else float(factor.reshape(-1)[0])
        entries: dict[str, Tensor | None] = {"running_mean": mean / divisor, "running_var": variance / divisor}
        entries |= {"weight": find_blob("scale", "gamma"), "bias": find_blob("offset", "beta")}
    else:
        entries = {"weight": find_blob(*_WEIGHT), "bias": find_blob(*_BIAS)}
    vectors = kind in ("bn", "scale")
    return {
        key: value.reshape(-1) if vectors or key == "bias" else value
        for key, value in entries.items()
        if value is not None
    }
