"""What newcomers met on their first walk through the documentation, and what they are told now."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import images
import resnetlab
from resnetlab.cli.main import app, run_command
from resnetlab.cli.peer_options import understand
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.sources import load_dataset
from resnetlab.errors import DataError, ModelFileError, RunError, UsageError
from resnetlab.evaluation.calibration import describe_few_images
from resnetlab.inference.classes import parse_class_names
from resnetlab.inference.import_model import ImportOptions, import_weights
from resnetlab.inference.start import PRETRAINED
from resnetlab.models.backbone import dilate
from resnetlab.run_folder import RunFolder
from resnetlab.training.recipes import finetune, photos
from resnetlab.training.recorder import Recorder
from resnetlab.training.run_options import RunOptions
from resnetlab.training.tasks.classification import ClassificationTask
from resnetlab.training.train import TASKS, build_task
from runs import error_output
from service import write_annotated_model, write_classifier


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
    error_output(capsys, "train", data, code=1)
    with pytest.raises(DataError, match=r"one class only, .*; a classifier needs two or more"):
        load_dataset(data, Path("data"))
    source = load_dataset(data, Path("data"), ReadOptions(one_class=True))
    assert source.classes == ("alpha",)
    evaluation = resnetlab.evaluate("model.safetensors", data)
    assert 0 < evaluation.n <= 6 and evaluation.scope == "all 6 outputs, of which the data have 1 class"


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
    assert "page: check.html" in error_output(
        capsys, "data", "check", "photos", "--no-timing", "--out", "check.html", code=1
    )
    page = Path("check.html").read_text()
    assert "10 images, 9 can be read; train 8 in 2 classes; test 2 in 2 classes. 2 problems." in page
    assert page.count("data:image/") == page.count(">cannot be read<") == 1 and "broken.jpg" in page
    assert "--out writes a page, .html" in error_output(capsys, "data", "check", "photos", "--out", "check.txt", code=2)


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
        assert sentence in error_output(capsys, *command.split(), code=2)
    assert asked == [(PRETRAINED[start], "")]


@pytest.mark.parametrize(("task", "command"), [("classify", ""), ("detect", "detect "), ("segment", "segment ")])
def test_a_folder_that_holds_a_run_names_the_command_of_its_task(task: str, command: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'task = "{task}"')
    resume = f"resnetlab {command}train --resume {tmp_path}"
    with pytest.raises(RunError, match=f"or continue that run with: {resume}$"):
        RunFolder.create(tmp_path, "photos")
    with pytest.raises(ModelFileError, match=f"if it was stopped: {resume}$"):
        resnetlab.load(tmp_path)
    (tmp_path / "result.json").touch()
    with pytest.raises(RunError, match=f"or train that finished run longer with: {resume} --epochs N$"):
        RunFolder.create(tmp_path, "photos")


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
    assert "give a folder of some: --images FOLDER" in error_output(
        capsys, "export", str(model), "--to", "onnx", code=2
    )


@pytest.mark.parametrize("command", [
    "train photos --data photos", "train --data photos --dataset photos", "detect train photos --data-path photos",
    "embed m photos --data photos", "export m --model m --to onnx", "inspect resnet18 --arch resnet18", "serve m --weights m",
])  # fmt: skip
def test_what_is_given_twice_is_said_to_be(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "; give each once." in error_output(capsys, *command.split(), code=2)


def test_several_models_and_images_are_not_given_twice() -> None:
    assert understand(app, ["evaluate", "a", "--model", "b", "--data", "x"]) == ["evaluate", "b", "a", "--data", "x"]
    assert understand(app, ["predict", "--model", "a", "--source", "b", "c"]) == ["predict", "a", "c", "b"]


@pytest.mark.parametrize(("command", "answer"), [
    ("import w.pth --overwrite", "replaced without asking"), ("export m --to onnx --force", "replaced without asking"),
    ("predict m a.png --exist-ok", "replaced without asking"), ("train photos --overwrite", "a run never overwrites another"),
    ("segment train masks --exist-ok", "a run never overwrites another"),
])  # fmt: skip
def test_overwriting_is_answered_for_runs_and_for_files(
    command: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer in error_output(capsys, *command.split(), code=2)


def test_an_import_replaces_its_target(tmp_path: Path) -> None:
    """As the answer to `--overwrite` says."""
    torch.save(resnetlab.build("resnet8", num_classes=2).state_dict(), tmp_path / "w.pth")
    (tmp_path / "m.safetensors").write_text("of before")
    options = ["--classes", "cat,dog", "--mean", "0.5", "--std", "0.5", "--out"]
    assert run_command(["import", str(tmp_path / "w.pth"), *options, str(tmp_path / "m.safetensors")]) == 0
    assert resnetlab.load(tmp_path / "m.safetensors").classes == ("cat", "dog")


def test_a_size_beside_that_of_the_start_is_a_change_of_the_recipe(tmp_path: Path) -> None:
    """And the start's own size is none, for the line of a run and for its page."""
    write_classifier(tmp_path / "start.safetensors")
    own = resnetlab.load(tmp_path / "start.safetensors").preprocessing.size[0]
    data = images.folder(tmp_path / "photos", {"": 6}, ("a", "b"))
    recipe = replace(finetune(), data=str(data), start_from=str(tmp_path / "start.safetensors"), batch=4, bn_batch=0)
    for values, changed in (({}, False), ({"image_size": str(own)}, False), ({"image_size": "40"}, True)):
        said: list[str] = []
        task = build_task(recipe.with_values(values), RunOptions(device="cpu", report=said.append))
        listed = f"image_size = 40 (not {own})"
        line = next(each for each in said if each.startswith("recipe finetune, with"))
        assert (listed in line) == changed == ("image_size" in line)
        assert isinstance(task, ClassificationTask)
        page = task.describe_run(RunFolder(tmp_path)).differences
        assert any("image_size" in each for each in page) == changed
        task.close()


@pytest.mark.parametrize(("task", "n", "sentence"), [
    ("classify", 1, "1 image could not be read and was left out; {} lists it"),
    ("classify", 2, "2 images could not be read and were left out; {} lists them"),
    ("detect", 1, "1 box or image was invalid and was left out; {} lists it"),
    ("segment", 3, "3 masks or images were invalid and were left out; {} lists them"),
])  # fmt: skip
def test_one_image_that_is_left_out_is_one(task: str, n: int, sentence: str, tmp_path: Path) -> None:
    said: list[str] = []
    context: Any = SimpleNamespace(run=RunFolder(tmp_path), options=RunOptions(report=said.append))
    recorder: Any = SimpleNamespace(_context=context, _task=TASKS[task])
    Recorder.note_skipped(recorder, {f"{i}.jpg": "damaged" for i in range(n)})
    assert said == [sentence.format(tmp_path / "skipped.json")]


def test_counts_of_one_are_singular(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a temperature fitted on 1 image means nothing"):
        describe_few_images(1)
    with pytest.raises(UsageError, match="gives 2 names, but the network has 1 class"):
        parse_class_names(["a", "b"], 1)
    net = resnetlab.build("resnet8", num_classes=1, in_chans=1)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="does not name its 1 class: give"):
        import_weights(tmp_path / "w.pth", ImportOptions(mean=[0.5], std=[0.5]))
    table = tmp_path / "photos.csv"
    table.write_text("path\na.jpg,cat\n")
    with pytest.raises(DataError, match="2 values, but the header has 1 column;"):
        load_dataset(str(table), tmp_path)
