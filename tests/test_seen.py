"""A model is never silently evaluated or calibrated on images that it saw in training, whatever has changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import resnetlab
from images import folder, photo
from resnetlab.cli.main import run_command
from resnetlab.data import fingerprints, sources
from resnetlab.errors import UsageError
from resnetlab.evaluation.calibration import describe_calibration
from resnetlab.evaluation.evaluate import Evaluation
from resnetlab.inference.state_dict_export import write_state_dict
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.preprocessing import Preprocessing
from tiny_runs import TINY_PHOTOS


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ of 30 images, a quarantine list of two, and run/ that held out 6 of the 28 others."""
    root = tmp_path_factory.mktemp("seen")
    folder(root / "photos", {"": 10})
    (root / "bad.txt").write_text("alpha/bild 1.jpg\nalpha/bild 2.jpg\n")
    train(root / "photos", root / "run", quarantine=str(root / "bad.txt"))
    return root


def train(data: Path, out: Path, **values: Any) -> Path:
    return Path(resnetlab.train("photos", data=str(data), out=out, **(TINY_PHOTOS | {"steps": 2} | values)).model)


def evaluated(model: Path, data: Path, **values: Any) -> Evaluation:
    return resnetlab.evaluate(str(model), str(data), device="cpu", precision="fp32", **values)


@pytest.fixture
def photos(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(made / "photos", tmp_path / "photos")
    return tmp_path / "photos"


def held_out(made: Path) -> list[str]:
    return sorted(json.loads((made / "run" / "holdout.json").read_text())["held-out"])


def test_fingerprints_are_sorted_pairs_of_name_and_size() -> None:
    pairs = np.array([[2**32 - 1, 7], [5, 2**32 - 1], [5, 3], [0, 9], [5, 3]], np.uint32)
    merged = fingerprints.record_fingerprints([], [], {"seen": torch.from_numpy(pairs)})["seen"]
    assert merged.dtype == torch.uint32 and merged.tolist() == np.unique(pairs, axis=0).tolist()


@pytest.mark.slow
def test_the_fingerprints_of_20_million_images_are_saved_and_loaded(tmp_path: Path) -> None:
    pairs = torch.from_numpy(np.random.default_rng(0).integers(0, 2**32, (20_000_000, 2), np.uint32))
    shape = Preprocessing(3, (32, 32), 32, torch.zeros(3), torch.ones(3))
    net = resnetlab.build("resnet20", num_classes=2).eval()
    model = TrainedModel(net, ("a", "b"), shape, fingerprints={"seen": pairs})
    model.save(tmp_path / "model.safetensors")
    loaded = load_trained_model(tmp_path / "model.safetensors").fingerprints["seen"]
    assert np.array_equal(loaded.numpy(), pairs.numpy())
    with pytest.warns(UserWarning, match="cannot hold the fingerprints of 20,000,000 images"):
        write_state_dict(model, tmp_path / "weights.safetensors")
    assert len(load_file(tmp_path / "weights.safetensors")) == len(net.state_dict())


def test_the_held_out_images_are_evaluated_with_and_without_the_quarantine(made: Path) -> None:
    model = made / "run" / "model.safetensors"
    bare = evaluated(model, made / "photos")
    assert bare.split == "held-out" and sorted(bare.images.names) == held_out(made) and len(held_out(made)) == 6
    assert any("of its 30 images 22 were seen in training, 6 held out" in note for note in bare.notes)
    assert f"list: the run had --quarantine {made / 'bad.txt'})" in bare.notes[0]
    same = evaluated(model, made / "photos", quarantine=made / "bad.txt")
    assert sorted(same.images.names) == held_out(made) and same.notes == () and same.top1_error == bare.top1_error


@pytest.mark.parametrize("change", ["added", "removed", "resized"])
def test_a_folder_that_has_changed(change: str, made: Path, photos: Path) -> None:
    seen = sorted(set(sources.load_dataset(str(photos), Path()).all_images.names) - set(held_out(made)))[4:7]  # type: ignore[union-attr]
    for i, name in enumerate(seen):
        if change == "added":
            photo(500 + i).save(photos / f"alpha/new {i}.jpg")
        elif change == "removed":
            (photos / name).unlink()
        else:
            photo(600 + i, 20, 20).save(photos / name)
    found = evaluated(made / "run" / "model.safetensors", photos)
    assert sorted(found.images.names) == held_out(made) and len(found.notes) == 1


def test_the_same_images_as_shards_or_below_train(made: Path, tmp_path: Path) -> None:
    model = made / "run" / "model.safetensors"
    assert run_command(["data", "pack", str(made / "photos"), str(tmp_path / "shards")]) == 0
    assert sorted(evaluated(model, tmp_path / "shards").images.names) == held_out(made)
    shutil.copytree(made / "photos", tmp_path / "split" / "train")
    shutil.copytree(made / "photos", tmp_path / "split" / "val")
    with pytest.warns(UserWarning, match="they look like copies"):
        given = train(tmp_path / "split", tmp_path / "given")
    with pytest.raises(UsageError, match=r"every image of .* was seen in training by one of the models"):
        evaluated(given, tmp_path / "split" / "train")


def test_evaluating_training_images_gives_a_warning(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(made / "run" / "model.safetensors"), "--data", str(made / "photos"), "--device", "cpu"]
    assert run_command([*arguments, "--split", "all"]) == 0
    assert "warning: 22 of these 30 images were seen in the training of" in capsys.readouterr().err
    assert "22 of these 30 images" in (made / "run" / "evaluation.html").read_text()
    assert run_command([*arguments, "--quarantine", str(made / "bad.txt"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["n"] == 6 and json.loads(out)["notes"] == [] and "warning" not in err


def test_other_images_of_the_same_names_are_evaluated_with_a_note(made: Path, photos: Path) -> None:
    for i, file in enumerate(sorted(photos.rglob("*.jpg"))):
        photo(1000 + i, 70, 50).save(file)
    found = evaluated(made / "run" / "model.safetensors", photos)
    assert (found.split, found.n) == ("all", 30)
    assert any("22 images have the names of some in the training of" in note for note in found.notes)


def test_an_ensemble_is_evaluated_on_what_no_member_saw(made: Path, photos: Path, tmp_path: Path) -> None:
    photo(700).save(photos / "alpha" / "another.jpg")
    other = train(photos, tmp_path / "other")
    both = [str(made / "run" / "model.safetensors"), str(other)]
    kept = set(held_out(made)) & set(json.loads((tmp_path / "other" / "holdout.json").read_text())["held-out"])
    found = resnetlab.evaluate(both, str(photos), device="cpu", precision="fp32")
    assert set(found.images.names) == kept and kept


def test_images_seen_by_the_starting_model_count_as_seen(made: Path, photos: Path, tmp_path: Path) -> None:
    for name in held_out(made)[:2]:
        (photos / name).unlink()  # two that were seen take their place
    first = made / "run" / "model.safetensors"
    messages: list[str] = []
    values = TINY_PHOTOS | {"data": str(photos), "start_from": str(first), "steps": 2}
    finer = resnetlab.train("finetune", out=tmp_path / "finer", report=messages.append, **(values | {"net": ""}))  # type: ignore[arg-type]
    held = sources.load_dataset(str(photos), Path()).test
    model, source = load_trained_model(first), sources.load_dataset(str(photos), Path())
    before = fingerprints.match_fingerprints(model.fingerprints, model.data["fingerprint"], source, held).seen
    assert 0 < int(before.sum()) < len(held)
    assert any(
        f"{int(before.sum())} of the {len(held)} images to test on were seen" in sentence for sentence in messages
    )
    found = evaluated(Path(finer.model), photos)
    assert found.n == len(held) - int(before.sum())


@pytest.mark.parametrize(("split", "fit_on"), [("train", "10"), ("all", "12"), ("held-out", "train")])
def test_no_temperature_is_fitted_on_what_was_seen(split: str, fit_on: str, made: Path) -> None:
    with pytest.raises(UsageError, match="which the model was trained on"):
        evaluated(made / "run" / "model.safetensors", made / "photos", split=split, fit_on=fit_on)


def test_no_temperature_is_fitted_on_digits_that_were_seen(tmp_path: Path) -> None:
    values: Any = TINY_PHOTOS | {"steps": 2, "image_size": 8, "eval_resize": 8}
    model = resnetlab.train(data="digits", out=tmp_path / "digits", **values).model
    with pytest.raises(UsageError, match="fitted on train, which the model was trained on; set images aside"):
        resnetlab.evaluate(str(model), "digits", split="train", fit_on="300", device="cpu")
    asked: Any = {"split": "test", "device": "cpu", "precision": "fp32"}
    with pytest.raises(UsageError, match=r"did you mean|unknown split to fit"):
        resnetlab.evaluate(str(model), "digits", fit_on="²", **asked)
    kept = resnetlab.evaluate(str(model), "digits", fit_on="100", **asked)
    assert (kept.n, kept.notes) == (260, ())


def test_a_temperature_set_aside_from_train_has_its_caveat() -> None:
    for split, caveat in (("train", True), ("set aside from train", True), ("set aside from test", False)):
        about = {"data": "d", "split": split, "n": 3, "protocol": "1crop"}
        assert ("which the network may have been trained on" in describe_calibration(2.0, about, "1crop")) is caveat
