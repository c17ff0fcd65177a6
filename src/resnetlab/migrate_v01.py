"""Reads what version 0.1 wrote, when the package was called residuum: its keys and values, under today's names.

Its model files and checkpoints have their JSON under the metadata key "residuum" and a digest of the names and bytes of tensors
only, so changes of the metadata go unnoticed. Fingerprints of images are part of that JSON.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from resnetlab.formatting import parse_json

if TYPE_CHECKING:
    from torch import Tensor

KEY = "residuum"
EXPORT_KEY = "residuum-export"  # beside the tensors of an exported .safetensors file
RUN_FILES = {"environment.json": "environment.json", "drawn.json": "holdout.json"}  # those that changed
_SPECIFICATION = {
    "order": "activation_order",
    "stride_site": "stride_in",
    "zeros": "zero_pad",
    "boundary": "preact_transition",
}
_RECIPE = {
    "size": "image_size",
    "resize": "eval_resize",
    "held_out": "val_images",
    "record_every": "log_every",
    "judge_every": "eval_every",
    "ema": "ema_decay",
    "trunk_lr": "backbone_lr_scale",
}
_CHECKPOINT = {"warm_since": "warmup_end", "drops": "lr_drops", "stale": "bad_evaluations"}
_TENSORS = {
    "samples.check": "reference.check",
    "samples.labels": "reference.labels",
    "samples.training": "reference.training",
}


def read_metadata(text: str, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    """The metadata of a model file or checkpoint, whose tensors it renames; None if they are damaged."""
    import torch

    try:
        values = parse_json(text)
    except ValueError:
        return None
    if not isinstance(values, dict) or values.pop("digest", None) != _compute_digest(tensors):
        return None
    if "identity" in values:
        return _rename(values, _CHECKPOINT) | {"format": 1}
    for name in _TENSORS.keys() & tensors.keys():
        tensors[_TENSORS[name]] = tensors.pop(name)
    values = migrate_metadata(values)
    for key, encoded in values.pop("fingerprints").items():
        try:
            pairs = np.frombuffer(base64.b64decode(encoded), "<u4").reshape(-1, 2).astype(np.uint32)
        except (TypeError, ValueError):
            return None
        tensors[f"fingerprints.{key}"] = torch.from_numpy(pairs)
    return values | {"format": 1}  # whatever it says: its metadata are not protected


def migrate_metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a model file or an exported one, with its fingerprints (base64) as an entry of their own."""
    values = dict(values)
    for key, renamed in (("specification", _SPECIFICATION), ("versions", {KEY: "resnetlab"})):
        if isinstance(values.get(key), Mapping):
            values[key] = _rename(values[key], renamed)
    if isinstance(values.get("recipe"), Mapping):
        values["recipe"] = migrate_recipe(values["recipe"])
    for task in ("detect", "segment"):
        if isinstance(values.get(task), Mapping):
            values["head"] = _rename(values.pop(task), {"size": "image_size"})
    data = values.get("data")
    values["fingerprints"] = {}
    if isinstance(data, Mapping):
        values["data"] = {key: value for key, value in data.items() if key not in ("seen", "kept")}
        values["fingerprints"] = {
            new: data[old] for old, new in (("seen", "seen"), ("kept", "held_out")) if old in data
        }
    return values


def is_recipe(values: Mapping[str, Any]) -> bool:
    """Whether a complete recipe was written by 0.1."""
    return "judge_every" in values


def migrate_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of recipe.toml, or of the recipe in a model file."""
    values = _rename(values, _RECIPE)
    if isinstance(values.get("specification"), Mapping):
        values["specification"] = _rename(values["specification"], _SPECIFICATION)
    return values


def recipe_key(values: Mapping[str, Any]) -> str:
    """The hash of a recipe in the identity of its checkpoints, from the values of recipe.toml as 0.1 wrote them."""
    values = {**values, "on_bad_image": "stop"} if "on_bad_image" in values else values
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def migrate_environment(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of environment.json, where the package has a new name."""
    return _rename(values, {KEY: "resnetlab"})


def _rename(values: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {keys.get(key, key): value for key, value in values.items()}


def _compute_digest(tensors: Mapping[str, Tensor]) -> str:
    import torch

    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
