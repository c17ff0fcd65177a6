"""Damaged model files are refused; files with other metadata under a right digest, also those of version 0.1, are refused or
give finite scores.
"""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from harness import damage, run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from resnetlab import migrate_v01
from resnetlab.errors import ModelFileError, ResNetLabError
from resnetlab.inference.hub import make_model_card
from resnetlab.inference.predict import load
from resnetlab.models.model_file import load_trained_model
from resnetlab.tensor_file import read_tensor_file, write_tensor_file
from service import write_classifier

OLD = Path(__file__).resolve().parents[1] / "data" / "v0.1" / "photos.safetensors"
FOLDER = Path(tempfile.mkdtemp(prefix="resnetlab-robustness-"))
MODEL = write_classifier(FOLDER / "model.safetensors")
CONTENT = MODEL.read_bytes()
TENSORS, METADATA = read_tensor_file(MODEL, "model file")
OLD_TENSORS = load_file(OLD)
with safe_open(OLD, framework="pt") as opened:
    OLD_TEXT: str = opened.metadata()[migrate_v01.KEY]
VALUES: list[Any] = [None, True, 0, -1, 1e-40, 1e300, 10**30, "", "x", [], {}, [[]], {"a": 1}, "\ud800"]


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def attack(draw: random.Random) -> str | None:
    file = FOLDER / "attacked.safetensors"
    if draw.random() < 0.5:
        file.write_bytes(content := damage(CONTENT, draw))
        try:
            load_trained_model(file)
        except ModelFileError:
            return None
        return None if content == CONTENT else "a changed file was read"
    old = draw.random() < 0.4  # as version 0.1 would have written it
    metadata = json.loads(OLD_TEXT if old else json.dumps(METADATA))
    tensors = dict(OLD_TENSORS if old else TENSORS)
    metadata = {key: value for key, value in metadata.items() if key not in ("format", "digest")}
    for _ in range(draw.randint(1, 2)):
        container, key = draw.choice(places(metadata))
        container[key] = draw.choice(VALUES)
    if draw.random() < 0.3:
        name = draw.choice(sorted(tensors))
        tensors[name] = draw.choice(
            [tensors[name].double(), tensors[name].reshape(-1)[:1], torch.zeros(2), tensors[name] * 1e30]
        )
    if old:
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        text = json.dumps(metadata | {"format": 1, "digest": migrate_v01._compute_digest(tensors)})
        save_file(tensors, file, {migrate_v01.KEY: text})
    else:
        write_tensor_file(file, tensors, metadata)
    try:
        with warnings.catch_warnings(action="ignore"):
            model = load(file, device="cpu")
            make_model_card(model, "a/b")
            top = model.predict(Image.new("RGB", (40, 30))).top
    except ResNetLabError as error:
        return f"not a sentence: {error}" if "\n" in str(error) else None
    return None if all(0 <= score <= 1 for _, score in top) else f"scores {top}"


if __name__ == "__main__":
    run("damaged model files", attack, 1000)
