"""The pictures that a model file keeps: from the right split, whole, validated, and under the file's digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from residuum.cli.main import run
from residuum.data import digits
from residuum.data.dataset import stratified
from residuum.errors import ModelFileError
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.resnet import build
from residuum.models.samples import MOST_CHECK, MOST_TRAINING, Samples, apart, spread
from residuum.preprocessing import Preprocessing

SHORT = ("--steps", "3", "--net", "resnet8", "--set", "size=8", "--device", "cpu")


def rows(pictures: torch.Tensor) -> set[bytes]:
    return {x.numpy().tobytes() for x in pictures}


def test_training_keeps_held_out_pictures_and_training_pictures(tmp_path: Path) -> None:
    assert run(["train", "digits", *SHORT, "--set", "held_out=200", "--out", str(tmp_path / "run")]) == 0
    samples = load_bundle(tmp_path / "run" / "model.safetensors").samples
    assert samples is not None and len(samples.check) == MOST_CHECK and len(samples.training) == MOST_TRAINING
    train = digits.load().train
    rest, chosen = (train.take(part) for part in stratified(train.labels, 200))
    assert rows(samples.check) <= rows(chosen.images) and rows(samples.training) <= rows(rest.images)
    known = {x.numpy().tobytes(): int(y) for x, y in zip(chosen.images, chosen.labels, strict=True)}
    assert samples.labels.tolist() == [known[x.numpy().tobytes()] for x in samples.check]


def test_where_nothing_is_held_out_both_are_of_the_training_split_and_share_nothing(tmp_path: Path) -> None:
    assert run(["train", "digits", *SHORT, "--set", "held_out=0", "--out", str(tmp_path / "run")]) == 0
    samples = load_bundle(tmp_path / "run" / "model.safetensors").samples
    assert samples is not None and len(samples.check) == len(samples.training) == MOST_CHECK
    assert not rows(samples.check) & rows(samples.training)
    assert rows(samples.check) | rows(samples.training) <= rows(digits.load().train.images)


def bundle(samples: Samples | None) -> Bundle:
    net: Any = build("resnet8", classes=3, channels=1, seed=0)
    prepared = Preprocessing(1, (8, 8), 8, torch.tensor([0.3]), torch.tensor([0.3]))
    return Bundle(net.eval(), ("a", "b", "c"), prepared, samples=samples)


GOOD = Samples(
    torch.arange(128, dtype=torch.uint8).view(2, 8, 8, 1), torch.tensor([0, 2]), torch.zeros(5, 8, 8, 1).byte()
)


def test_they_come_back_and_belong_to_the_digest(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    bundle(GOOD).save(file)
    kept = load_bundle(file).samples
    assert kept is not None and torch.equal(kept.check, GOOD.check) and torch.equal(kept.training, GOOD.training)
    assert kept.labels.tolist() == [0, 2] and "samples.check" in load_file(file)
    content = bytearray(file.read_bytes())
    content[content.index(GOOD.check.numpy().tobytes()) + 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match="do not fit its own digest"):
        load_bundle(file)
    bundle(None).save(file)
    assert load_bundle(file).samples is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"check": GOOD.check.float()}, "samples.check is torch.float32"),
        ({"check": GOOD.check[:, :4]}, r"samples.check is torch.uint8 \(2, 4, 8, 1\)"),
        ({"check": torch.zeros(17, 8, 8, 1).byte(), "labels": torch.zeros(17).long()}, "not at most 16 pictures"),
        ({"training": GOOD.training[0]}, "samples.training is"),
        ({"labels": torch.tensor([0])}, r"samples.labels has shape \(1,\) for 2 pictures"),
        ({"labels": torch.tensor([0, 3])}, "a class outside the 3"),
        ({"labels": torch.tensor([-1, 0])}, "a class outside the 3"),
        ({"check": GOOD.check[:0], "labels": GOOD.labels[:0]}, "for 0 pictures"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    bundle(replace(GOOD, **change)).save(tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=sentence):
        load_bundle(tmp_path / "m.safetensors")


def test_some_alone_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Samples, "tensors", lambda self: {"samples.check": self.check})
    bundle(GOOD).save(tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=r"samples\.labels"):
        load_bundle(tmp_path / "m.safetensors")


def test_positions_are_spread_and_few_where_pictures_are_large() -> None:
    assert spread(3, 16, 64) == [0, 1, 2] and spread(100, 4, 64) == [0, 25, 50, 75]
    assert len(spread(10_000, 64, 224 * 224 * 3)) == 16 and len(spread(5, 64, 10**9)) == 1 and spread(0, 4, 64) == []


def test_pictures_that_are_none_of_the_others() -> None:
    pictures = torch.arange(192, dtype=torch.uint8).view(3, 8, 8, 1)
    assert torch.equal(apart(pictures, pictures[1:2]), pictures[[0, 2]])
    assert apart(pictures, pictures).shape == (0, 8, 8, 1) and len(apart(pictures, pictures[:0])) == 3
