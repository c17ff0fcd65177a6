"""The reference images of a model file: their split, validation and digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from resnetlab.cli.main import run_command
from resnetlab.data import digits
from resnetlab.data.dataset import split_stratified
from resnetlab.errors import ModelFileError
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.reference_images import MAX_CHECK, MAX_TRAINING, ReferenceImages, exclude_images, spread_positions
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing

SHORT = ("--steps", "3", "--net", "resnet8", "--set", "image_size=8", "--device", "cpu")


def to_bytes(images: torch.Tensor) -> set[bytes]:
    return {x.numpy().tobytes() for x in images}


def test_training_stores_held_out_and_training_images(tmp_path: Path) -> None:
    assert run_command(["train", "digits", *SHORT, "--set", "val_images=200", "--out", str(tmp_path / "run")]) == 0
    samples = load_trained_model(tmp_path / "run" / "model.safetensors").reference_images
    assert samples is not None and len(samples.check) == MAX_CHECK and len(samples.training) == MAX_TRAINING
    train = digits.load_digits().train
    rest, chosen = (train.subset(part) for part in split_stratified(train.labels, 200))
    assert to_bytes(samples.check) <= to_bytes(chosen.images) and to_bytes(samples.training) <= to_bytes(rest.images)
    known = {x.numpy().tobytes(): int(y) for x, y in zip(chosen.images, chosen.labels, strict=True)}
    assert samples.labels.tolist() == [known[x.numpy().tobytes()] for x in samples.check]


def test_without_held_out_images_both_are_disjoint_parts_of_the_training_split(tmp_path: Path) -> None:
    assert run_command(["train", "digits", *SHORT, "--set", "val_images=0", "--out", str(tmp_path / "run")]) == 0
    samples = load_trained_model(tmp_path / "run" / "model.safetensors").reference_images
    assert samples is not None and len(samples.check) == len(samples.training) == MAX_CHECK
    assert not to_bytes(samples.check) & to_bytes(samples.training)
    assert to_bytes(samples.check) | to_bytes(samples.training) <= to_bytes(digits.load_digits().train.images)


def make_model(samples: ReferenceImages | None) -> TrainedModel:
    net: Any = build("resnet8", classes=3, channels=1, seed=0)
    prepared = Preprocessing(1, (8, 8), 8, torch.tensor([0.3]), torch.tensor([0.3]))
    return TrainedModel(net.eval(), ("a", "b", "c"), prepared, reference_images=samples)


GOOD = ReferenceImages(
    torch.arange(128, dtype=torch.uint8).view(2, 8, 8, 1), torch.tensor([0, 2]), torch.zeros(5, 8, 8, 1).byte()
)


def test_the_digest_covers_them(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    make_model(GOOD).save(file)
    kept = load_trained_model(file).reference_images
    assert kept is not None and torch.equal(kept.check, GOOD.check) and torch.equal(kept.training, GOOD.training)
    assert kept.labels.tolist() == [0, 2] and "reference.check" in load_file(file)
    content = bytearray(file.read_bytes())
    content[content.index(GOOD.check.numpy().tobytes()) + 7] ^= 1
    file.write_bytes(content)
    with pytest.raises(ModelFileError, match="do not match its digest"):
        load_trained_model(file)
    make_model(None).save(file)
    assert load_trained_model(file).reference_images is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"check": GOOD.check.float()}, "reference.check is torch.float32"),
        ({"check": GOOD.check[:, :4]}, r"reference.check is torch.uint8 \(2, 4, 8, 1\)"),
        ({"check": torch.zeros(17, 8, 8, 1).byte(), "labels": torch.zeros(17).long()}, "not at most 16 images"),
        ({"training": GOOD.training[0]}, "reference.training is"),
        ({"labels": torch.tensor([0])}, r"reference.labels has shape \(1,\) for 2 images"),
        ({"labels": torch.tensor([0, 3])}, "a class outside the 3"),
        ({"labels": torch.tensor([-1, 0])}, "a class outside the 3"),
        ({"check": GOOD.check[:0], "labels": GOOD.labels[:0]}, "for 0 images"),
    ],
)
def test_invalid_images_are_rejected(change: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    make_model(replace(GOOD, **change)).save(tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=sentence):
        load_trained_model(tmp_path / "m.safetensors")


def test_missing_tensors_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ReferenceImages, "to_tensors", lambda self: {"reference.check": self.check})
    make_model(GOOD).save(tmp_path / "m.safetensors")
    with pytest.raises(ModelFileError, match=r"reference\.labels"):
        load_trained_model(tmp_path / "m.safetensors")


def test_positions_are_evenly_spread_and_few_for_large_images() -> None:
    assert spread_positions(3, 16, 64) == [0, 1, 2] and spread_positions(100, 4, 64) == [0, 25, 50, 75]
    assert (
        len(spread_positions(10_000, 64, 224 * 224 * 3)) == 16
        and len(spread_positions(5, 64, 10**9)) == 1
        and spread_positions(0, 4, 64) == []
    )


def test_excluding_images() -> None:
    images = torch.arange(192, dtype=torch.uint8).view(3, 8, 8, 1)
    assert torch.equal(exclude_images(images, images[1:2]), images[[0, 2]])
    assert exclude_images(images, images).shape == (0, 8, 8, 1) and len(exclude_images(images, images[:0])) == 3
