"""What newcomers met on their first walk through the documentation, and what they are told now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import images
import resnetlab
from resnetlab.cli.main import run_command
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.sources import load_dataset
from resnetlab.errors import DataError, ModelFileError, RunError, UsageError
from resnetlab.inference.start import PRETRAINED
from resnetlab.models.backbone import dilate
from resnetlab.run_folder import RunFolder
from resnetlab.training.recipes import photos
from service import write_annotated_model, write_classifier


def told(capsys: pytest.CaptureFixture[str], *command: str, code: int = 0) -> str:
    """Standard error of a command."""
    capsys.readouterr()
    assert run_command(list(command)) == code
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def one_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of one of the classes of a model beside them."""
    folder = tmp_path_factory.mktemp("one-class")
    write_classifier(folder / "model.safetensors")
    name = resnetlab.load(folder / "model.safetensors").classes[0]
    images.folder(folder / "photos", {"": 6}, (name,))
    (folder / "photos.csv").write_text(
        "path,label\n" + "".join(f"{file},{name}\n" for file in (folder / "photos").rglob("*.jpg"))
    )
    shutil.make_archive(str(folder / "packed"), "zip", folder / "photos")
    return folder


@pytest.mark.parametrize("data", ["photos", "photos.csv", "packed.zip", "shards"])
def test_data_of_one_class_are_evaluated_and_not_trained_on(
    data: str, one_class: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(one_class)
    if data == "shards" and not Path("shards").exists():
        assert run_command(["data", "pack", "photos", "shards"]) == 0
    told(capsys, "train", data, code=1)
    with pytest.raises(DataError, match=r"one class only, .*; a classifier needs two or more"):
        load_dataset(data, Path("data"))
    source = load_dataset(data, Path("data"), ReadOptions(one_class=True))
    assert source.classes == ("alpha",)
    evaluation = resnetlab.evaluate("model.safetensors", data)
    assert 0 < evaluation.n <= 6 and evaluation.scope == "all 6 outputs, of which the data have 1 classes"


def test_a_check_of_one_class_reads_its_images_and_says_so(one_class: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["data", "check", str(one_class / "photos"), "--no-timing", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["readable"] == 6
    assert [p["detail"][:24] for p in found["problems"] if p["kind"] == "layout"] == ["there is one class only,"]


def test_a_page_shows_what_a_check_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = images.folder(Path("photos"), {"": 4}, ("daisy", "tulip"))
    shutil.copy(data / "daisy" / "bild 0.jpg", data / "tulip" / "again.jpg")
    (data / "daisy" / "broken.jpg").write_bytes(b"no image")
    assert "page: check.html" in told(capsys, "data", "check", "photos", "--no-timing", "--out", "check.html", code=1)
    page = Path("check.html").read_text()
    assert "10 images, 9 can be read; train 8 in 2 classes; test 2 in 2 classes. 2 problems." in page
    assert page.count("data:image/") == page.count(">cannot be read<") == 1 and "broken.jpg" in page
    assert "--out writes a page, .html" in told(capsys, "data", "check", "photos", "--out", "check.txt", code=2)


@pytest.mark.parametrize("word", ["val_split", "validation_split", "val_images", "val_size"])
def test_a_share_of_held_out_images_is_answered_with_the_key(word: str) -> None:
    with pytest.raises(
        UsageError, match=rf"^{word} is how many .*; its key is val_images: --set val_images=500, or .*=-1 for a"
    ):
        photos().with_values({word: "0.1"})


def test_a_key_with_an_answer_is_not_taken_for_another_one() -> None:
    with pytest.raises(UsageError, match=r"^unknown key 'val'; put the images into DATA/val"):
        photos().with_values({"val": "0.1"})


@pytest.mark.parametrize(
    ("command", "start"),
    [
        ("train photos --pretrained", "resnet18"),
        ("train photos --pretrained --recipe finetune", "resnet18"),
        ("train photos --pretrained --recipe paper-imagenet", "resnet50"),
        ("detect train photos --pretrained", "resnet18"),
        ("detect train photos --pretrained --recipe paper-boxes", "resnet101"),
        ("segment train photos --pretrained", "resnet18"),
        ("python", "resnet18"),
    ],
)
def test_pretrained_without_a_network_takes_the_recipes_and_says_so(
    command: str, start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def begin(recipe: Any, *_: object) -> Any:
        asked.append((recipe.start_from, recipe.net))
        raise UsageError("no network here")

    monkeypatch.chdir(images.folder(tmp_path / "photos", {"": 2}).parent)
    monkeypatch.setattr("resnetlab.training.python_api.start_run", begin)
    monkeypatch.setattr("resnetlab.training.train.start_run", begin)
    sentence = f"retrained takes {PRETRAINED[start]}, of the recipe's network; "
    if command == "python":
        said: list[str] = []
        with pytest.raises(UsageError, match="no network here"):
            resnetlab.train("photos", pretrained=True, report=said.append)
        assert any(sentence in each for each in said)
    else:
        assert sentence in told(capsys, *command.split(), code=2)
    assert asked == [(PRETRAINED[start], "")]


@pytest.mark.parametrize(("task", "command"), [("classify", ""), ("detect", "detect "), ("segment", "segment ")])
def test_a_folder_that_holds_a_run_names_the_command_of_its_task(task: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'task = "{task}"')
    resume = f"resnetlab {command}train --resume {tmp_path}"
    with pytest.raises(RunError, match=f"or continue that run with: {resume}$"):
        RunFolder.create(tmp_path, "photos")
    with pytest.raises(ModelFileError, match=f"go on with: {resume}$"):
        resnetlab.load(tmp_path)


def test_a_folder_that_holds_no_run_is_not_offered_as_one(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(RunError, match=r"is not empty; choose another --out\.$"):
        RunFolder.create(tmp_path, "photos")


@pytest.mark.parametrize(("dilated", "left"), [(None, "2x3"), (16, "4x6")])
def test_the_warning_of_small_images_knows_dilated_networks(dilated: int | None, left: str) -> None:
    net = resnetlab.build("resnet18").eval()
    if dilated:
        dilate(net, dilated)
    with pytest.warns(UserWarning, match=f"leaves them {left} at the end"):
        assert net.features(torch.zeros(1, 3, 64, 90))["C5"].shape[2:] == tuple(map(int, left.split("x")))


def test_an_export_of_a_segmenter_names_the_option_for_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_annotated_model(tmp_path / "masks.safetensors", "segment")
    assert "give a folder of some: --images FOLDER" in told(capsys, "export", str(model), "--to", "onnx", code=2)
