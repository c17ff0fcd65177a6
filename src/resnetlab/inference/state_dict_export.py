"""Exports a model's state dict with torchvision's names."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from resnetlab.data.fingerprints import encode_fingerprints
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.spec import Specification
from resnetlab.run_folder import write_atomically

MAX_FINGERPRINTS = 64 * 2**20  # characters, for six million images: readers refuse a safetensors header above 100 MB


def write_state_dict(model: TrainedModel, out: Path) -> None:
    """Writes a `state_dict`, .safetensors or else .pth, that torchvision and timm load strictly.

    Classes, preprocessing, training data and so on are in the metadata of the .safetensors file, or of the state dict itself,
    where PyTorch ignores it and `resnetlab import` reads it. Raises RunError if the file cannot be written.
    """
    preprocessing, fingerprints = model.preprocessing, encode_fingerprints(model.fingerprints)
    if sum(map(len, fingerprints.values())) > MAX_FINGERPRINTS:
        images = sum(map(len, model.fingerprints.values()))
        warnings.warn(
            f"{out} cannot hold the fingerprints of {images:,} images: after `resnetlab import` the model does not know which "
            "images it was trained on; keep the model file.",
            stacklevel=2,
        )
        fingerprints = {}
    about = {
        "specification": model.spec.to_json(),
        "classes": list(model.classes),
        "preprocessing": preprocessing.to_json() | {"mean": preprocessing.mean.tolist()},
        "temperature": float(model.temperature),
        "calibration": dict(model.calibration),
        "data": dict(model.data),
        "fingerprints": fingerprints,
    }
    metadata = json.dumps(about | ({"thresholds": list(model.thresholds)} if model.multi_label else {}))
    state: Any = model.net.state_dict()
    for key, value in state.items():
        state[key] = value.detach().cpu().contiguous()
    if out.suffix == ".safetensors":
        write_atomically(out, save_safetensors(dict(state), metadata={"format": "pt", "resnetlab-export": metadata}))
    else:
        state._metadata["resnetlab"] = metadata
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(out, buffer.getvalue())


def list_differences(spec: Specification) -> list[str]:
    """Lists why torchvision's and timm's networks would compute something else with these weights."""
    notes = []
    if spec.stem != "imagenet":
        notes.append("torchvision and timm have no CIFAR nets: the names are theirs, the network is not.")
    if spec.block == "bottleneck" and spec.stride_in == "first":
        notes.append(
            "the stride is in the first 1x1; torchvision's and timm's networks load these weights and compute something else."
        )
    if spec.maxpool == "ceil":
        notes.append("the max-pool has Caffe's alignment; torchvision's and timm's networks compute something else.")
    if spec.shortcut != "B" or spec.activation_order != "original" or spec.conv1_bias:
        notes.append("torchvision and timm have no such network; only a network with the same layers loads it.")
    return notes
