"""Attacks on the digest of model files: no changed bit is read, wherever it is, and no file passes for an older one."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import resnetlab
from resnetlab import migrate_v01
from resnetlab.errors import ModelFileError, ResNetLabError
from resnetlab.inference.hub import make_model_card
from resnetlab.inference.import_model import ImportOptions, import_weights
from resnetlab.models.annotated_model import load_annotated
from resnetlab.models.model_file import load_trained_model
from resnetlab.run_folder import RunFolder, read_metrics
from resnetlab.tensor_file import read_tensor_file, write_tensor_file
from service import write_annotated_model, write_classifier

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2, 3]), "c": torch.tensor(1.5)}
METADATA = {"classes": ["größe", "b"], "preprocessing": {"mean": [0.5], "std": [0.25]}, "temperature": 1.25}


def make_file(path: Path) -> bytes:
    write_tensor_file(path, TENSORS, METADATA)
    return path.read_bytes()


def is_refused(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        read_tensor_file(path, "model file")
    except ModelFileError:
        return True
    return False


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    content = make_file(path)
    for i in range(len(content)):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[i] ^= 1 << bit
            assert is_refused(path, bytes(flipped)), f"bit {bit} of byte {i}: {content[max(0, i - 20) : i + 20]!r}"


def test_flipped_bits_of_a_model_file_are_noticed_in_every_region(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "m.safetensors")
    content, draw = path.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    bounds = [0, 8, header, header + 4000, len(content) - 4, len(content)]
    for low, high in pairwise(bounds):
        for _ in range(30):
            flipped = bytearray(content)
            flipped[draw.randrange(low, high)] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(ModelFileError):
                load_trained_model(path)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], Any]) -> None:
    """Changes tensors and metadata with the library, so that the file is valid but for its digest."""
    content = path.read_bytes()
    entries = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = load_file(path)
    change(tensors, entries)
    save_file(tensors, path, entries)


def change_text(old: str, new: str) -> Callable[[dict[str, torch.Tensor], dict[str, str]], Any]:
    def change(tensors: dict[str, torch.Tensor], entries: dict[str, str]) -> None:
        assert old in entries["resnetlab"]
        entries["resnetlab"] = entries["resnetlab"].replace(old, new)

    return change


ATTACKS: dict[str, Callable[[dict[str, torch.Tensor], dict[str, str]], Any]] = {
    "a class": change_text('"b"', '"c"'),
    "the mean": change_text('"mean": [0.5]', '"mean": [0.4]'),
    "the temperature": change_text("1.25", "1.5"),
    "spaces only": change_text(", ", ",  "),
    "the format": change_text('"format": 2', '"format": 1'),
    "a later format": change_text('"format": 2', '"format": 3'),
    "no digest": lambda tensors, entries: entries.pop("digest"),
    "another key": lambda tensors, entries: entries.update(other=entries.pop("resnetlab")),
    "two names": lambda tensors, entries: tensors.update(a=tensors["c"], c=tensors["a"]),
    "one name": lambda tensors, entries: tensors.update(d=tensors.pop("c")),
    "a type": lambda tensors, entries: tensors.update(b=tensors["b"].view(torch.float64)),
    "a shape": lambda tensors, entries: tensors.update(a=tensors["a"].view(3, 2)),
    "one more": lambda tensors, entries: tensors.update(d=torch.zeros(1)),
    "one less": lambda tensors, entries: tensors.pop("b"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_changed_file_is_refused(attack: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    make_file(path)
    rewrite(path, lambda tensors, entries: None)
    with warnings.catch_warnings(action="error"):  # none that says that an older file is not protected
        read_tensor_file(path, "model file")
        rewrite(path, ATTACKS[attack])
        with pytest.raises(ModelFileError):
            read_tensor_file(path, "model file")


def test_a_file_cannot_lose_its_protection_by_its_number_alone(tmp_path: Path) -> None:
    """Version 0.1's files have another key in the metadata; today's key with its number is refused."""
    path = tmp_path / "m.safetensors"
    make_file(path)
    rewrite(path, change_text('"format": 2', '"format": 1'))
    with pytest.raises(ModelFileError, match="has format 1"):
        read_tensor_file(path, "model file")


def test_what_an_older_file_would_hold_is_not_read_beside_todays(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    make_file(path)
    old = {"classes": ["x", "y"], "digest": migrate_v01._compute_digest(TENSORS)}
    rewrite(path, lambda tensors, entries: entries.update({migrate_v01.KEY: json.dumps(old)}))
    with warnings.catch_warnings(action="error"):
        assert read_tensor_file(path, "model file")[1]["classes"] == METADATA["classes"]
    for number in ({}, {"format": 1}, {"format": 2}):  # no number makes an unprotected file a protected one
        text = json.dumps(old | number)
        rewrite(path, lambda tensors, entries, text=text: (entries.clear(), entries.update({migrate_v01.KEY: text})))  # type: ignore[misc]
        with pytest.warns(UserWarning, match="was written by version 0.1"):
            assert read_tensor_file(path, "model file")[1]["classes"] == old["classes"]


def test_tensors_of_another_shape_are_one_sentence(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "m.safetensors")
    tensors, metadata = read_tensor_file(path, "model file")
    write_tensor_file(path, tensors | {"bn1.weight": torch.ones(1), "bn1.bias": torch.ones(1)}, metadata)
    with pytest.raises(ModelFileError, match="does not match its own specification") as error:
        load_trained_model(path)
    assert "\n" not in str(error.value)


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value in a model file's metadata."""

    def change(metadata: dict[str, Any]) -> None:
        for key in path[:-1]:
            metadata = metadata[key]
        metadata[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put("classes", value=[["0"], "b", "c", "d", "e", "f"]), r"\['0'\] is no class name"),
        (put("classes", value=["\ud800", "b", "c", "d", "e", "f"]), "cannot be encoded as UTF-8"),
        (put("temperature", value=1e-320), "its temperature is 1e-320"),
        (put("temperature", value=True), "its temperature is True"),
        (put("preprocessing", "std", value=[1e-320, 0.25, 0.25]), "the preprocessing in the model file cannot be used"),
        (put("recipe", value=[]), "not tables of values"),
        (put("metrics", value={"test": 3}), "not tables of values"),
    ],
)
def test_metadata_of_other_kinds_are_refused(
    change: Callable[[dict[str, Any]], None], reason: str, tmp_path: Path
) -> None:
    path = write_classifier(tmp_path / "m.safetensors")
    tensors, metadata = read_tensor_file(path, "model file")
    change(metadata)
    write_tensor_file(path, tensors, {key: value for key, value in metadata.items() if key != "format"})
    with pytest.raises(ModelFileError, match=reason):
        load_trained_model(path)


def test_class_names_of_a_detector_are_different_words(tmp_path: Path) -> None:
    path = write_annotated_model(tmp_path / "m.safetensors", "detect")
    tensors, metadata = read_tensor_file(path, "model file")
    for classes, reason in ((["a", "a"], "two classes are called a"), (["a", "\ud800"], "cannot be encoded as UTF-8")):
        changed = {key: value for key, value in metadata.items() if key != "format"} | {"classes": classes}
        write_tensor_file(path, tensors, changed)
        with pytest.raises(ModelFileError, match=reason):
            load_annotated(path, "detect")


def test_metadata_of_other_kinds_make_a_card(tmp_path: Path) -> None:
    path = write_classifier(tmp_path / "m.safetensors")
    tensors, metadata = read_tensor_file(path, "model file")
    metadata |= {"metrics": {"test": {"n": "many", "top1_error": []}, "held-out": {"n": 4, "top1_error": 0.25}}}
    metadata |= {
        "recipe": {"net": ["a"], "lr": {}},
        "data": {"name": 3},
        "versions": {"torch": []},
        "calibration": {"n": {}},
    }
    write_tensor_file(path, tensors, {key: value for key, value in metadata.items() if key != "format"})
    card = make_model_card(load_trained_model(path), "me/x")
    assert "| test | 4 | 25.00 % |" in card and "many" not in card.partition("## Training")[0]


def test_weights_that_contain_themselves_are_refused(tmp_path: Path) -> None:
    weights: dict[str, Any] = {"conv1.weight": torch.zeros(4, 3, 3, 3)}
    weights["state_dict"] = weights
    torch.save(weights, tmp_path / "own.pth")
    with pytest.raises(ResNetLabError):
        import_weights(tmp_path / "own.pth", ImportOptions(classes="a,b"))


def test_lines_of_metrics_that_are_no_figures_are_left_out(tmp_path: Path) -> None:
    good = {"kind": "held_out", "step": 3, "top1_error": 0.5}
    bad = [
        '{"kind": "held_out", "step": "3"}',
        '{"kind": "held_out", "step": true}',
        "[" * 50_000,
        "3",
        '{"kind": "train", "step": 1}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join([json.dumps(good), *bad]))
    assert read_metrics(RunFolder(tmp_path)) == [good]


@pytest.mark.parametrize("task", ["classify", "detect"])
@pytest.mark.parametrize("key", ["depths", "widths", "channels"])
def test_a_network_far_larger_than_its_file_is_not_built(task: str, key: str, tmp_path: Path) -> None:
    """9,000 blocks of nothing took 50 s, and widths took all memory."""
    file = tmp_path / "m.safetensors"
    write_classifier(file) if task == "classify" else write_annotated_model(file, task)
    tensors, metadata = read_tensor_file(file, "model file")
    spec = metadata["specification"]
    large = {"depths": [3000] * len(spec["depths"]), "widths": [3000] * len(spec["depths"]), "channels": 10**7}
    metadata = {name: value for name, value in metadata.items() if name != "format"}
    write_tensor_file(file, dict(tensors), metadata | {"specification": spec | {key: large[key]}})
    with pytest.raises(ModelFileError, match="of a network far larger than its tensors"):
        resnetlab.load(file, device="cpu")
