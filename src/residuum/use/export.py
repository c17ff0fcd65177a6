"""A model for other programs: its weights under torchvision's names."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from residuum.errors import UsageError, unknown
from residuum.models.bundle import Bundle
from residuum.models.spec import Specification
from residuum.records import write_atomically

TARGETS = ("torchvision",)
SUFFIXES = (".pth", ".safetensors")


def export(bundle: Bundle, target: str, out: Path) -> list[str]:
    """Writes a `state_dict` that torchvision or timm loads strictly; sentences on what they do not know of it.

    What a state dict does not tell (classes, preprocessing, the data that it learnt from, …) stands beside the tensors, in the
    metadata of a .safetensors file or of the state dict itself, where PyTorch passes it over and `residuum import` finds it.

    Raises:
        UsageError: an unknown target or suffix.
        RunError: the file cannot be written.
    """
    if target not in TARGETS:
        raise unknown("target", target, ("onnx", "torch", "openvino", *TARGETS))
    if out.suffix not in SUFFIXES:
        raise UsageError(f"--out {out}: the file ends in {' or '.join(SUFFIXES)}.")
    own = bundle.preprocessing
    about = json.dumps({
        "specification": bundle.spec.to_json(),
        "classes": list(bundle.classes),
        "preprocessing": own.to_json() | {"mean": own.mean.tolist()},
        "temperature": float(bundle.temperature),
        "calibration": dict(bundle.calibration),
        "data": dict(bundle.data),
    })  # fmt: skip
    state: Any = bundle.net.state_dict()
    for key, value in state.items():
        state[key] = value.detach().cpu().contiguous()
    if out.suffix == ".safetensors":
        write_atomically(out, save_safetensors(dict(state), metadata={"format": "pt", "residuum-export": about}))
    else:
        state._metadata["residuum"] = about
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(out, buffer.getvalue())
    return list(differences(bundle.spec))


def differences(spec: Specification) -> list[str]:
    """Why torchvision's and timm's networks, given these weights, would not compute the same."""
    found = []
    if spec.stem != "imagenet":
        found.append("torchvision and timm have no CIFAR nets: the names are theirs, the network is not.")
    if spec.block == "bottleneck" and spec.stride_site == "first":
        found.append(
            "the stride is in the first 1x1; torchvision's and timm's networks load these weights and compute something else."
        )
    if spec.maxpool == "ceil":
        found.append("the max-pool has Caffe's alignment; torchvision's and timm's networks compute something else.")
    if spec.shortcut != "B" or spec.order != "original" or spec.conv1_bias:
        found.append("the network is none of torchvision's or timm's; only a network of the same layers loads it.")
    return found
