"""Weight files of other programs, and damaged ones."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import resnetlab
from resnetlab.errors import ModelFileError
from resnetlab.models.import_weights import build_from_state, infer_specification
from resnetlab.models.state_dicts import parse_state_dict, read_state_dict

SMALL = {"conv1.weight": torch.zeros(16, 3, 3, 3), "layer1.0.conv1.weight": torch.ones(16, 16, 3, 3)}


def make_arrays() -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in SMALL.items()}


def save_npz(path: Path, **values: np.ndarray) -> Path:
    np.savez_compressed(path, **values)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("kind", ["pth", "legacy.pth", "npz"])
def test_any_damage_raises_model_file_error(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"w.{kind}"
    if kind == "npz":
        save_npz(file, **make_arrays())
    else:
        torch.save(SMALL, file, _use_new_zipfile_serialization=kind == "pth")
    original, draw, rejected = file.read_bytes(), random.Random(0), 0
    for i in range(400):
        content = bytearray(original[: draw.randrange(1, len(original))] if i % 5 == 0 else original)
        for _ in range(draw.choice((1, 3, 20))):
            content[draw.randrange(min(len(content), 700) if i % 2 else len(content))] = draw.randrange(256)
        file.write_bytes(content)
        try:
            read_state_dict(file)
        except ModelFileError:  # and no other error
            rejected += 1
    assert rejected > 50


def test_a_changed_weight_is_detected(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(SMALL, file)
    content = bytearray(file.read_bytes())
    place = content.rindex(SMALL["layer1.0.conv1.weight"].numpy().tobytes())
    content[place + 2] ^= 1  # the number stays finite, so only the checksum reveals it
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match="is damaged"):
        read_state_dict(file)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(SMALL, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state_dict(file).tensors.keys() == SMALL.keys()


def test_other_files_are_not_called_dangerous(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("<html>404 Not Found</html>")
    with pytest.raises(ModelFileError, match=r"not a supported weight file .* begins with b'<html>"):
        read_state_dict(tmp_path / "w.pth")


def test_big_endian_arrays_are_read(tmp_path: Path) -> None:
    values = {name: np.arange(value.size, dtype=">f4").reshape(value.shape) for name, value in make_arrays().items()}
    found = read_state_dict(save_npz(tmp_path / "w.npz", **values)).tensors
    assert all(np.array_equal(found[name].numpy(), value) for name, value in values.items())


def test_unsupported_arrays_of_an_npz(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="words is an array of <U1, which torch does not support"):
        read_state_dict(save_npz(tmp_path / "w.npz", words=np.array(["a", "b"]), **make_arrays()))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ModelFileError, match="holds a single unnamed array"):
        read_state_dict(tmp_path / "one.npz")
    (tmp_path / "text.npz").write_bytes(b"abc")
    with pytest.raises(ModelFileError, match=r"text.npz is no .npz file; it begins with b'abc'"):
        read_state_dict(tmp_path / "text.npz")


def test_counters_are_ignored_with_a_note() -> None:
    state = parse_state_dict({"state_dict": {**SMALL, "epoch": 3, "lr": 0.1, "arch": "resnet"}}, "w.pth")
    assert set(state.tensors) == set(SMALL) and "ignored, not weights: epoch, lr, arch" in state.notes
    with pytest.raises(ModelFileError, match=r"w.pth: history among the weights is not a tensor but a list"):
        parse_state_dict({**SMALL, "history": [1, 2]}, "w.pth")


def test_torchs_averaged_model_is_read() -> None:
    net: Any = resnetlab.build("resnet8", classes=3)
    average = torch.optim.swa_utils.AveragedModel(net).state_dict()
    state = parse_state_dict({"model": net.state_dict(), "model_ema": average}, "w.pth", "model_ema")
    spec, _ = infer_specification(state)
    assert torch.equal(build_from_state(state, spec).fc.weight, net.fc.weight)
    assert "ignored, not weights: n_averaged" in state.notes


@pytest.mark.parametrize("order", ["original", "bn-after-add", "relu-before-add", "relu-only-preact", "preact"])
def test_an_ambiguous_activation_order_is_reported_as_assumed(order: str) -> None:
    net: Any = resnetlab.build("resnet8", classes=3, activation_order=order)
    state = parse_state_dict(dict(net.state_dict()), "w.pth")  # without the mark of ours
    spec, notes = infer_specification(state)
    assumed = [note for note in notes if "ASSUMED activation_order=original" in note]
    assert bool(assumed) is (order != "preact") is (spec.activation_order == "original")
    assert all(order == "original" or order in note for note in assumed)
    given, notes = infer_specification(state, changes={"activation_order": order})
    assert given.activation_order == order and not any("ASSUMED activation_order" in note for note in notes)
    assert not any(
        "ASSUMED activation_order" in note for note in infer_specification(state, "torchvision")[1]
    )  # known to be original


def test_ambiguous_values_are_reported_as_assumed() -> None:
    pre = parse_state_dict(dict(resnetlab.build("preresnet8", classes=3).state_dict()), "w.pth")
    assert any("ASSUMED preact_transition=shared" in note for note in infer_specification(pre)[1])
    assert not any(
        "preact_transition" in note for note in infer_specification(pre, changes={"preact_transition": "raw"})[1]
    )
    wide = parse_state_dict(dict(resnetlab.build("resnet18", classes=3).state_dict()), "w.pth")
    assert any("ASSUMED maxpool=padded" in note for note in infer_specification(wide)[1])
    assert not any("maxpool=padded, as" in note for note in infer_specification(wide, "torchvision")[1])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("resnet8", {"activation_order": "relu-before-add", "zero_pad": "centre"}),
        ("plain8", {}),
        ("preresnet8", {"preact_transition": "raw"}),
        ("resnet50", {"depths": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "stride_in": "first", "maxpool": "ceil"}),
    ],
)
def test_nothing_is_assumed_of_a_state_dict_of_ours(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """It is marked with its specification, also inside another mapping and below a wrapper's prefix."""
    net = resnetlab.build(name, classes=3, **changes)
    net.fc = torch.nn.Linear(net.fc.in_features, 4)  # a head of one's own
    for number, content in enumerate(
        (net.state_dict(), {"model": torch.nn.DataParallel(net).state_dict(), "epoch": 3})
    ):
        torch.save(content, tmp_path / f"{number}.pth")
        state = read_state_dict(tmp_path / f"{number}.pth")
        spec, notes = infer_specification(state)
        assert spec == replace(net.spec, classes=4) and not any("ASSUMED" in note for note in notes)
        assert torch.equal(build_from_state(state, spec).fc.weight, net.fc.weight)
    both = {**net.state_dict(prefix="a."), **net.state_dict(prefix="b.")}
    assert not parse_state_dict({"model": both}, "w.pth", "a").specification
