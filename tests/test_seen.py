"""A model is never judged, or calibrated, unsaid on pictures that it saw in training, whatever has changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import residuum
from pictures import folder, photo
from residuum.cli.main import run
from residuum.data import marks, sources
from residuum.errors import UsageError
from residuum.evaluation.calibration import provenance
from residuum.evaluation.evaluate import Evaluation
from residuum.models.bundle import load_bundle
from test_folder import TINY


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/ of 30 pictures, a quarantine list of two, and run/ that held out 6 of the 28 others."""
    root = tmp_path_factory.mktemp("seen")
    folder(root / "photos", {"": 10})
    (root / "bad.txt").write_text("alpha/bild 1.jpg\nalpha/bild 2.jpg\n")
    train(root / "photos", root / "run", quarantine=str(root / "bad.txt"))
    return root


def train(data: Path, out: Path, **values: Any) -> Path:
    return Path(residuum.train("photos", data=str(data), out=out, **(TINY | {"steps": 2} | values)).model)


def judged(model: Path, data: Path, **values: Any) -> Evaluation:
    return residuum.evaluate(str(model), str(data), device="cpu", precision="fp32", **values)


@pytest.fixture
def photos(made: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(made / "photos", tmp_path / "photos")
    return tmp_path / "photos"


def held_out(made: Path) -> list[str]:
    return sorted(json.loads((made / "run" / "drawn.json").read_text())["held-out"])


def test_the_held_out_pictures_are_judged_with_and_without_the_quarantine(made: Path) -> None:
    model = made / "run" / "model.safetensors"
    bare = judged(model, made / "photos")
    assert bare.split == "held-out" and sorted(bare.pictures.names) == held_out(made) and len(held_out(made)) == 6
    assert any("of its 30 pictures 22 were seen in training, 6 held out" in note for note in bare.notes)
    same = judged(model, made / "photos", quarantine=made / "bad.txt")
    assert sorted(same.pictures.names) == held_out(made) and same.notes == () and same.top1_error == bare.top1_error


@pytest.mark.parametrize("change", ["added", "removed", "resized"])
def test_a_folder_that_has_changed(change: str, made: Path, photos: Path) -> None:
    seen = sorted(set(sources.load(str(photos), Path()).whole.names) - set(held_out(made)))[4:7]  # type: ignore[union-attr]
    for i, name in enumerate(seen):
        if change == "added":
            photo(500 + i).save(photos / f"alpha/new {i}.jpg")
        elif change == "removed":
            (photos / name).unlink()
        else:
            photo(600 + i, 20, 20).save(photos / name)
    found = judged(made / "run" / "model.safetensors", photos)
    assert sorted(found.pictures.names) == held_out(made) and len(found.notes) == 1


def test_the_same_pictures_as_shards_or_below_train(made: Path, tmp_path: Path) -> None:
    model = made / "run" / "model.safetensors"
    assert run(["data", "pack", str(made / "photos"), str(tmp_path / "shards")]) == 0
    assert sorted(judged(model, tmp_path / "shards").pictures.names) == held_out(made)
    shutil.copytree(made / "photos", tmp_path / "split" / "train")
    shutil.copytree(made / "photos", tmp_path / "split" / "val")
    given = train(tmp_path / "split", tmp_path / "given")
    with pytest.raises(UsageError, match=r"every picture of .* was seen in training by one of the models"):
        judged(given, tmp_path / "split" / "train")


def test_training_pictures_are_said_where_they_are_asked_for(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(made / "run" / "model.safetensors"), "--data", str(made / "photos"), "--device", "cpu"]
    assert run([*arguments, "--split", "all"]) == 0
    assert "warning: 22 of these 30 pictures were seen in the training of" in capsys.readouterr().err
    assert "22 of these 30 pictures" in (made / "run" / "evaluation.html").read_text()
    assert run([*arguments, "--quarantine", str(made / "bad.txt"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["n"] == 6 and json.loads(out)["notes"] == [] and "warning" not in err


def test_other_pictures_of_the_same_names_are_judged_and_told(made: Path, photos: Path) -> None:
    for i, file in enumerate(sorted(photos.rglob("*.jpg"))):
        photo(1000 + i, 70, 50).save(file)
    found = judged(made / "run" / "model.safetensors", photos)
    assert (found.split, found.n) == ("all", 30)
    assert any("22 pictures are called as some in the training of" in note for note in found.notes)


def test_an_ensemble_is_judged_on_what_no_member_saw(made: Path, photos: Path, tmp_path: Path) -> None:
    photo(700).save(photos / "alpha" / "another.jpg")
    other = train(photos, tmp_path / "other")
    both = [str(made / "run" / "model.safetensors"), str(other)]
    kept = set(held_out(made)) & set(json.loads((tmp_path / "other" / "drawn.json").read_text())["held-out"])
    found = residuum.evaluate(both, str(photos), device="cpu", precision="fp32")
    assert set(found.pictures.names) == kept and kept


def test_what_the_model_before_saw_is_known_too(made: Path, photos: Path, tmp_path: Path) -> None:
    for name in held_out(made)[:2]:
        (photos / name).unlink()  # two that were seen take their place
    first = made / "run" / "model.safetensors"
    said: list[str] = []
    values = TINY | {"data": str(photos), "start_from": str(first), "steps": 2}
    finer = residuum.train("finetune", out=tmp_path / "finer", say=said.append, **(values | {"net": ""}))  # type: ignore[arg-type]
    held = sources.load(str(photos), Path()).test
    before = marks.known(load_bundle(first).data, sources.load(str(photos), Path()), held).seen
    assert 0 < int(before.sum()) < len(held)
    assert any(f"{int(before.sum())} of the {len(held)} pictures to test on were seen" in sentence for sentence in said)
    found = judged(Path(finer.model), photos)
    assert found.n == len(held) - int(before.sum())


@pytest.mark.parametrize(("split", "fit_on"), [("train", "10"), ("all", "12"), ("held-out", "train")])
def test_no_temperature_is_fitted_on_what_was_seen(split: str, fit_on: str, made: Path) -> None:
    with pytest.raises(UsageError, match="from which the model learnt"):
        judged(made / "run" / "model.safetensors", made / "photos", split=split, fit_on=fit_on)


def test_no_temperature_is_fitted_on_digits_that_were_seen(tmp_path: Path) -> None:
    values: Any = TINY | {"steps": 2, "size": 8, "resize": 8}
    model = residuum.train(data="digits", out=tmp_path / "digits", **values).model
    with pytest.raises(UsageError, match="fitted on train, from which the model learnt; set pictures aside"):
        residuum.evaluate(str(model), "digits", split="train", fit_on="300", device="cpu")
    asked: Any = {"split": "test", "device": "cpu", "precision": "fp32"}
    with pytest.raises(UsageError, match=r"did you mean|unknown split to fit"):
        residuum.evaluate(str(model), "digits", fit_on="²", **asked)
    kept = residuum.evaluate(str(model), "digits", fit_on="100", **asked)
    assert (kept.n, kept.notes) == (260, ())


def test_a_temperature_set_aside_from_train_has_its_caveat() -> None:
    for split, caveat in (("train", True), ("set aside from train", True), ("set aside from test", False)):
        about = {"data": "d", "split": split, "n": 3, "protocol": "1crop"}
        assert ("from which the network may have learnt" in provenance(2.0, about, "1crop")) is caveat
