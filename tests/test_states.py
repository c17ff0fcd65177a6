"""Files of weights as programs leave them, and as disks and networks damage them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import residuum
from residuum.errors import ModelFileError
from residuum.models.importers import infer, network
from residuum.models.states import named, read_state

SMALL = {"conv1.weight": torch.zeros(16, 3, 3, 3), "layer1.0.conv1.weight": torch.ones(16, 16, 3, 3)}


def arrays() -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in SMALL.items()}


def saved(path: Path, **values: np.ndarray) -> Path:
    np.savez_compressed(path, **values)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize("kind", ["pth", "legacy.pth", "npz"])
def test_any_damage_is_one_sentence(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"w.{kind}"
    if kind == "npz":
        saved(file, **arrays())
    else:
        torch.save(SMALL, file, _use_new_zipfile_serialization=kind == "pth")
    whole, draw, refused = file.read_bytes(), random.Random(0), 0
    for i in range(400):
        content = bytearray(whole[: draw.randrange(1, len(whole))] if i % 5 == 0 else whole)
        for _ in range(draw.choice((1, 3, 20))):
            content[draw.randrange(min(len(content), 700) if i % 2 else len(content))] = draw.randrange(256)
        file.write_bytes(content)
        try:
            read_state(file)
        except ModelFileError:  # and nothing else
            refused += 1
    assert refused > 50


def test_a_changed_weight_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "w.pth"
    torch.save(SMALL, file)
    content = bytearray(file.read_bytes())
    place = content.rindex(SMALL["layer1.0.conv1.weight"].numpy().tobytes())
    content[place + 2] ^= 1  # the number stays finite, so nothing else would tell
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match="is damaged"):
        read_state(file)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(SMALL, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_state(file).tensors.keys() == SMALL.keys()


def test_what_is_no_file_of_weights_is_not_called_dangerous(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_text("<html>404 Not Found</html>")
    with pytest.raises(ModelFileError, match=r"not a file of weights that can be read .* begins with b'<html>"):
        read_state(tmp_path / "w.pth")


def test_big_endian_arrays_are_read(tmp_path: Path) -> None:
    values = {name: np.arange(value.size, dtype=">f4").reshape(value.shape) for name, value in arrays().items()}
    found = read_state(saved(tmp_path / "w.npz", **values)).tensors
    assert all(np.array_equal(found[name].numpy(), value) for name, value in values.items())


def test_what_an_npz_holds_beside_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="names is an array of <U1, not of numbers that torch knows"):
        read_state(saved(tmp_path / "w.npz", names=np.array(["a", "b"]), **arrays()))
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ModelFileError, match="holds a single array without a name"):
        read_state(tmp_path / "one.npz")


def test_counts_beside_weights_are_passed_over_and_said() -> None:
    state = named({"state_dict": {**SMALL, "epoch": 3, "lr": 0.1, "arch": "resnet"}}, "w.pth")
    assert set(state.tensors) == set(SMALL) and "passed over beside the weights: epoch, lr, arch" in state.notes
    with pytest.raises(ModelFileError, match=r"w.pth: history stands among the weights and is no tensor but a list"):
        named({**SMALL, "history": [1, 2]}, "w.pth")


def test_torchs_own_average_is_read() -> None:
    net: Any = residuum.build("resnet8", classes=3)
    average = torch.optim.swa_utils.AveragedModel(net).state_dict()
    state = named({"model": net.state_dict(), "model_ema": average}, "w.pth", "model_ema")
    spec, _ = infer(state)
    assert torch.equal(network(state, spec).fc.weight, net.fc.weight)
    assert "passed over beside the weights: n_averaged" in state.notes


@pytest.mark.parametrize("order", ["original", "bn-after-add", "relu-before-add", "relu-only-preact", "preact"])
def test_an_order_that_names_do_not_tell_is_said_to_be_assumed(order: str) -> None:
    net: Any = residuum.build("resnet8", classes=3, order=order)
    state = named(net.state_dict(), "w.pth")
    spec, notes = infer(state)
    assumed = [note for note in notes if "ASSUMED order=original" in note]
    assert bool(assumed) is (order != "preact") is (spec.order == "original")
    assert all(order == "original" or order in note for note in assumed)
    given, notes = infer(state, changes={"order": order})
    assert given.order == order and not any("ASSUMED order" in note for note in notes)
    assert not any("ASSUMED order" in note for note in infer(state, "torchvision")[1])  # which is known to be original


def test_what_the_same_tensors_leave_open_is_said() -> None:
    pre = named(residuum.build("preresnet8", classes=3).state_dict(), "w.pth")
    assert any("ASSUMED boundary=shared" in note for note in infer(pre)[1])
    assert not any("boundary" in note for note in infer(pre, changes={"boundary": "raw"})[1])
    wide = named(residuum.build("resnet18", classes=3).state_dict(), "w.pth")
    assert any("ASSUMED maxpool=padded" in note for note in infer(wide)[1])
    assert not any("maxpool=padded, as" in note for note in infer(wide, "torchvision")[1])
