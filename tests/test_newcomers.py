"""What newcomers type first, and what they are told."""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
import tomllib
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import resnetlab
from images import folder
from resnetlab.cli import console
from resnetlab.cli.main import run_command
from resnetlab.cli.runs import print_runs
from resnetlab.data.sources import load_dataset
from resnetlab.device import count_cores
from resnetlab.errors import DataError, ModelFileError, RunError, UsageError, name_arguments
from resnetlab.evaluation.evaluate import Evaluation
from resnetlab.evaluation.protocols import parse_protocol
from resnetlab.formatting import format_count, format_figure, format_split
from resnetlab.inference import build
from resnetlab.inference.annotated import AnnotatedPrediction, Detector, Segmenter
from resnetlab.inference.explain import Explanation
from resnetlab.inference.predict import Model
from resnetlab.inference.start import load_start
from resnetlab.training import python_api
from resnetlab.training import train as training
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import fit_small_images, photos, read_recipe_file
from resnetlab.training.result import ClassificationResult, DetectionResult
from resnetlab.training.tasks.classification_data import describe_view
from runs import error_output
from tiny_runs import TINY

SHORT = TINY | {"steps": 2, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on the digits."""
    out = tmp_path_factory.mktemp("newcomers") / "run"
    resnetlab.train("quick", out=out, keep_images=2, **SHORT)  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    loaded = resnetlab.load(run, device="cpu")
    assert isinstance(loaded, Model)
    return loaded


def test_training_starts_from_a_run_folder(run: Path, tmp_path: Path) -> None:
    start = load_start(str(run))
    assert start.digest == load_start(str(run / "model.safetensors")).digest and start.model.spec.depths == (1, 1, 1)
    assert resnetlab.build("resnet8", weights=run, num_classes=10, in_chans=1).spec == start.model.spec
    with pytest.raises(ModelFileError, match="is a folder without model"):
        load_start(str(tmp_path))


def test_a_network_is_no_start(capsys: pytest.CaptureFixture[str]) -> None:
    error = error_output(capsys, "train", "digits", "--start-from", "resnet18")
    assert "resnet18 is the name of a network, without weights" in error and "torchvision:resnet18" in error


def test_python_is_told_of_arguments_and_the_command_line_of_options(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="that is asked for; leave out net and the values of its") as error:
        resnetlab.build("resnet20", weights=run)
    assert "--" not in str(error.value)
    with pytest.raises(
        UsageError, match=r"^pretrained takes .* named by net; .* Other weights: start_from=NAME or FILE"
    ):
        resnetlab.build("resnet20", pretrained=True)
    with pytest.raises(UsageError, match="start_from=MODEL"):
        resnetlab.train("finetune", data="digits", progress=False)
    assert "--start-from MODEL" in error_output(capsys, "train", "digits", "--recipe", "finetune")
    kept = "resume with: resnetlab train --resume runs/a"
    assert name_arguments(f"shorten it with --set steps=3; {kept}") == f"shorten it with steps=3; {kept}"


def test_misspelt_arguments_of_train_are_answered() -> None:
    for word, ours in {
        "epoch": "epochs",
        "max_epochs": "epochs",
        "stpes": "steps",
        "output_dir": "out",
        "lrr": "lr",
    }.items():
        with pytest.raises(UsageError, match=f"unknown key '{word}'; did you mean '{ours}'"):
            resnetlab.train("digits", progress=False, **{word: 1})


def test_other_programs_words_of_train_are_its_arguments(tmp_path: Path) -> None:
    """Steps by whatever word rescale the schedule; a value is given once."""
    values = {k: v for k, v in TINY.items() if k != "net"} | {"device": "cpu", "progress": False}
    result = resnetlab.train("digits", model="resnet8", max_steps=2, random_state=3, out=tmp_path / "a", **values)  # type: ignore[arg-type]
    recipe = tomllib.loads((tmp_path / "a" / "recipe.toml").read_text())
    assert (result.steps, recipe["net"], recipe["seed"], max(recipe["milestones"])) == (2, "resnet8", 3, 2)
    with pytest.raises(UsageError, match="max_steps and steps are the same value; give it once"):
        resnetlab.train("digits", steps=1, max_steps=2)


@pytest.mark.parametrize(
    ("word", "ours"),
    [("tencrop", "10crop"), ("ten-crop", "10crop"), ("center_crop", "1crop"), ("multi-scale", "multiscale")],
)
def test_other_names_of_protocols(word: str, ours: str) -> None:
    with pytest.raises(UsageError, match=f"did you mean '{ours}"):
        parse_protocol(word)


def test_small_arrays_are_trained_on_at_their_size(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 12, 10, 3), dtype=np.uint8)
    labels = np.arange(40) % 2
    result = resnetlab.train(
        data=(pixels, labels), steps=1, out=tmp_path / "run", device="cpu", progress=False, batch=8
    )
    recipe = read_recipe_file(tmp_path / "run" / "recipe.toml", "classify")
    assert isinstance(recipe, Recipe) and recipe.net == "resnet20" and result.steps == 1
    assert (recipe.image_size, recipe.crop, recipe.pad) == (10, "centre", 1)
    assert fit_small_images(photos(), 65) == photos()
    assert "is for images of about 32 pixels" in describe_view(photos().with_values({"net": "resnet20"}))[0]


def test_required_options_are_named_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert "data audit needs --model; for example: resnetlab data audit photos --model" in error_output(
        capsys, "data", "audit", "x"
    )
    assert "evaluate needs --data; for example: " in error_output(capsys, "evaluate", "m.safetensors")
    assert "--steps needs a value; for example: " in error_output(capsys, "train", "--steps")
    assert "predict needs MODEL; for example: " in error_output(capsys, "predict")


def test_a_table_without_rows_is_said_to_be_one(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "photos.csv"
    table.write_text("path,label\n")
    embed = ("embed", str(run), str(table), "--out", str(tmp_path / "f.npz"))
    for line in (("data", "audit", str(table), "--model", str(run)), embed):
        assert "photos.csv has no rows below its header" in error_output(capsys, *line, code=1)


def test_a_place_to_write_is_checked_before_the_work(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for work in (
        *("training.train.build_task", "studies.study.run_studies", "cli.data._load_source", "inference.predict.load"),
        *("inference.audit.audit_labels", "evaluation.evaluate.evaluate", "inference.open_model.open_model"),
    ):
        name = f"resnetlab.{work}"
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    file = tmp_path / "file"
    file.write_text("mine")
    model = str(run / "model.safetensors")
    assert "is not empty; choose another --out" in error_output(
        capsys, "train", "digits", "--out", str(tmp_path), code=1
    )
    assert "file is a file" in error_output(capsys, "train", "digits", "--out", str(file), code=1)
    assert "file is a file" in error_output(capsys, "train", "digits", "--out", str(file / "below"), code=1)
    assert "file is a file" in error_output(capsys, "study", "degradation", "--out", str(file), code=1)
    assert "file is a file" in error_output(capsys, "evaluate", model, "--data", "digits", "--out", str(file), code=1)
    assert "file is a file" in error_output(capsys, "explain", model, "x.png", "--out", str(file), code=1)
    assert "file is a file" in error_output(capsys, "predict", model, "x.png", "--sort-into", str(file), code=1)
    assert "is not empty" in error_output(capsys, "data", "pack", "photos", str(tmp_path), code=1)
    assert "file is a file" in error_output(capsys, "embed", model, "digits", "--out", str(file / "f.npz"), code=1)
    listed = ("data", "audit", "digits", "--model", model, "--quarantine", str(tmp_path / "no" / "q.txt"))
    assert "there is no folder" in error_output(capsys, *listed)
    assert "is a folder" in error_output(
        capsys, "data", "audit", "digits", "--model", model, "--quarantine", str(tmp_path)
    )
    assert file.read_text() == "mine"
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(
        RunError, match="is not empty; choose another out, or continue that run with: resnetlab train --resume"
    ):
        resnetlab.train("digits", out=tmp_path, progress=False)
    assert training.build_task.__name__ == "<lambda>"


def test_the_format_of_an_export_is_that_of_the_ending(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["export", str(run), "--out", str(tmp_path / "weights.pth")]) == 0
    assert (tmp_path / "weights.pth").is_file() and capsys.readouterr().out.strip().endswith("weights.pth")
    assert "export needs --to" in error_output(capsys, "export", str(run))
    assert "no format has files that end in '.exe'" in error_output(
        capsys, "export", str(run), "--out", str(tmp_path / "m.exe")
    )


def test_figures_are_shown_as_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    base = {"net": "resnet18", "data": "boxes", "step": 3, "steps": 3, "seconds": 1.0, "finished": True}
    detector = base | {
        "run": "a",
        "split": "held-out",
        "held_out": {"map_50": 0.25},
        "result": {"map": 0.5, "map_50": 0.75},
    }
    classifier = base | {"run": "b", "split": "val", "held_out": {"top1_error": 0.25}, "result": {"top1_error": 0.5}}
    print_runs([detector, classifier])
    text = capsys.readouterr().out
    assert "mAP@.5 0.250" in text and "test mAP@[.5:.95] 0.500, test mAP@.5 0.750" in text
    assert "error 25.00 %" in text and "val error 50.00 %" in text
    assert format_figure("mean_iou", 0.5) == "mean IoU 0.500"


def test_held_out_is_said_of_images_that_are_evaluated_while_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = folder(tmp_path / "photos", {"": 6}, ("a", "b"))
    line = ["train", str(data), "--out", str(tmp_path / "run"), "--steps", "1", "--device", "cpu", "--net", "resnet8"]
    values = ("image_size=16", "batch=4", "precision=fp32", "val_images=2", "threads=1")
    assert run_command([*line, *(word for value in values for word in ("--set", value))]) == 0
    shown = capsys.readouterr()
    assert (
        "2 held out to watch the error of, 2 to test on (drawn by name)" in shown.err
        and "1 step of 4 images is" in shown.err
    )
    assert "1 thread" in shown.err and "1 threads" not in shown.err
    assert "test error, top-1" in shown.out and "1 step in" in shown.out and "held-out error" not in shown.out
    page = (tmp_path / "run" / "report.html").read_text()
    assert "held-out split" not in page and "drawn by name from all" in page and "Accuracy" in page
    assert json.loads((tmp_path / "run" / "result.json").read_text())["split"] == "held-out"  # in files, as it was
    assert format_split("held-out") == "test" and format_split("val") == "val"


def test_few_images_are_told_of_weights_to_begin_with(tmp_path: Path) -> None:
    data = folder(tmp_path / "photos", {"": 6}, ("a", "b"))
    for values, told_of in (({}, True), ({"net": "resnet20"}, False)):
        said: list[str] = []
        recipe = photos().with_values({"image_size": "72", "batch": "4", **values})
        training.build_task(replace(recipe, data=str(data)), training.RunOptions(device="cpu", report=said.append))
        assert any("begin with: --net resnet18 --pretrained" in sentence for sentence in said) == told_of


def test_one_is_singular() -> None:
    assert (
        format_count(1, "class") == "1 class"
        and format_count(0, "box") == "0 boxes"
        and format_count(2, "shard") == "2 shards"
    )


def test_one_shard_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = folder(tmp_path / "photos", {"": 5}, ("a", "b"))
    assert run_command(["data", "pack", str(data), str(tmp_path / "shards")]) == 0
    assert capsys.readouterr().out == f"1 shard in {tmp_path / 'shards'}\n"


def test_the_contracts_snippet_runs(run: Path, tmp_path: Path) -> None:
    """The lines of the design's §1 that no other test has; weights of torchvision are in test_citizen and test_importing."""
    assert {"resnet20", "resnet50v1.5"} <= set(resnetlab.list_models("resnet*"))
    with torch.device("meta"):
        net = resnetlab.build("resnet34", shortcut="C", activation_order="preact")
    assert net.spec.shortcut == "C" and net.conv1.weight.is_meta
    model = resnetlab.load(run, device="cpu")
    image = np.zeros((8, 8), np.uint8)
    assert len(model.predict(image, top=3).top) == 3 and model.predict([image, image])[1].label in model.classes
    assert model.embed([image, image]).shape == (2, 64)
    assert model.evaluate("digits").n == 360
    assert len(model.explain(image).blocks) == 3
    assert model.export(tmp_path / "m.pth") == tmp_path / "m.pth"
    assert len(repr(model)) < 300 and model.predict(image).to_dict()["top"]


def test_what_is_no_model_is_answered() -> None:
    with pytest.raises(UsageError, match=r"resnet50 is the name of a network, without weights.*torchvision:resnet50"):
        resnetlab.load("resnet50")
    with pytest.raises(ModelFileError, match="runs/nowhere"):
        resnetlab.load("runs/nowhere")


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("train digits --set epochs=3", "the length in epochs is --epochs 10"),
        ("train digits --set epoch=3", "the length in epochs is --epochs 10"),
        ("evaluate m.safetensors --data digits --protocol tencrop", "10crop"),
        ("train digits --epoch 1 --steps 1", "--steps and --epochs are both the length"),
    ],
)
def test_command_lines_that_people_type_first(
    line: str, answer: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert answer in error_output(capsys, *line.replace("m.safetensors", str(run / "model.safetensors")).split())


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from resnetlab.cli.main import app, run_command\n"
        "for line in ([], ['train'], ['predict'], ['evaluate'], ['study'], ['detect', 'train'], ['doctor']):\n"
        "    assert run_command([*line, '--help']) == 0\n"
        "assert run_command(['trian']) == 2 and run_command(['evaluate', 'x']) == 2\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


WRONG: dict[str, Callable[[Model], Any]] = {
    "the model comes first, then the data: evaluate(model, data)": lambda model: resnetlab.evaluate("photos", model),  # type: ignore[arg-type]
    "call it x.safetensors; for other programs there is": lambda model: model.save("x.pt"),
    "the file's ending decides the format; known: .pt2, .onnx, .xml": lambda model: model.export("onnx"),
    "the opset of exported ONNX files is fixed": lambda model: model.export("m.onnx", opset=17),  # type: ignore[call-arg]
    "is given by its argument's name: train(data, net=module)": lambda model: resnetlab.train(model.net, "digits"),
    "is preprocessing.normalise(preprocessing(image)[None])": lambda model: model.transform,  # type: ignore[attr-defined]
    "use classes, in the order of the outputs": lambda model: model.class_to_idx,  # type: ignore[attr-defined]
    "unknown argument of predict 'topk'; did you mean 'top'?": lambda model: model.predict("a.png", topk=2),  # type: ignore[call-arg]
    "predict: missing a required argument: 'image'": lambda model: model.predict(),  # type: ignore[call-arg]
    "unknown argument of build 'model'; did you mean 'name'?": lambda _: resnetlab.build(model="resnet18"),  # type: ignore[call-arg]
    "unknown argument of list_models 'filter'; did you mean 'pattern'?": lambda _: resnetlab.list_models(filter="*"),  # type: ignore[call-arg]
    "a path, an address, the bytes of a file, an open file, a Pillow image": lambda model: model({"image": "a.png"}),
    "Model has no attribute 'cuda'; use to(\"cuda\").": lambda model: model.cuda(),  # type: ignore[attr-defined]
    "Model has no attribute 'image_size'; use preprocessing.image_size.": lambda model: model.image_size,  # type: ignore[attr-defined]
    "Prediction has no attribute 'confidence'; use score.": lambda model: model(ZEROS).confidence,
    "give the network, 'resnet18', and 'timm:resnet18.a1_in1k' as its weights": lambda _: resnetlab.build(
        "resnet18.a1_in1k"
    ),
    "give the network, 'resnet20', and 'cifar10:resnet20' as its weights": lambda _: resnetlab.build(
        "cifar10:resnet20"
    ),
    "'resnetlab' has no attribute 'ResNet'; use build(name).": lambda _: resnetlab.ResNet,
    "'resnetlab.models' has no attribute 'list_models'; use resnetlab.list_models().": lambda _: (
        resnetlab.models.list_models
    ),
    "'resnetlab.models' has no attribute 'resnet50'; use resnetlab.build(name).": lambda _: resnetlab.models.resnet50,
    "module 'resnetlab' has no attribute 'resnet50'; use build('resnet50').": lambda _: resnetlab.resnet50,
    "ResNet has no attribute 'feature_info'; use resnetlab.models.backbone.Features(net).feature_info.": lambda model: (
        model.net.feature_info
    ),
    "ResNet has no attribute 'layer9'; use layer1 to layer": lambda model: model.net.layer9,
    "ResNet has no attribute 'nonsense'.": lambda model: model.net.nonsense,
    "Explanation has no attribute 'save'; use overlay.save(file).": lambda _: object.__new__(Explanation).save,  # type: ignore[attr-defined]
    "Detector has no attribute 'state_dict'; use model.net,": lambda _: object.__new__(Detector).state_dict,  # type: ignore[attr-defined]
    "Segmenter has no attribute 'num_classes'; use len(model.classes).": lambda _: (
        object.__new__(Segmenter).num_classes  # type: ignore[attr-defined]
    ),
    "AnnotatedPrediction has no attribute 'boxes'; use result['boxes'].": lambda _: (
        object.__new__(AnnotatedPrediction).boxes  # type: ignore[attr-defined]
    ),
    "net.load_state_dict(…) takes a state_dict": lambda model: resnetlab.build(
        "resnet8", weights=model.net.state_dict()
    ),  # type: ignore[arg-type]
    "the networks have average pooling, not 'max'": lambda model: copy.copy(model.net).reset_classifier(3, "max"),
    "SimpleNamespace: its attribute model is one": lambda _: resnetlab.load(SimpleNamespace(model="")),  # type: ignore[arg-type]
    "Images and labels are one pair: (X, y).": lambda model: model.evaluate(ZEROS, [1]),  # type: ignore[call-arg]
    "images and labels are one pair, the data": lambda _: resnetlab.train(X=ZEROS, y=[1]),
    "Evaluation has no attribute 'accuracy'; use 1 - result.top1_error.": lambda _: object.__new__(Evaluation).accuracy,  # type: ignore[attr-defined]
    "use resnetlab.load(result.model).evaluate(data).metrics.confusion.": lambda _: (
        object.__new__(ClassificationResult).confusion_matrix  # type: ignore[attr-defined]
    ),
    "DetectionResult has no attribute 'accuracy'.": lambda _: object.__new__(DetectionResult).accuracy,  # type: ignore[attr-defined]
    "use pandas.read_json(result.run + '/metrics.jsonl'": lambda _: object.__new__(ClassificationResult).history,  # type: ignore[attr-defined]
    "backbone.Features(net) gives the maps as a list": lambda _: resnetlab.build("resnet18", features_only=True),
    "there are none of resnet20": lambda _: resnetlab.build("resnet20", weights="DEFAULT"),
    "a trained one is cifar10:resnet20": lambda _: resnetlab.load("resnet20"),
    "a model trained on it is cifar10:resnet20": lambda _: resnetlab.load("cifar10"),
    "a model is a model file, a run folder or what load returned, not ResNet.": lambda model: resnetlab.evaluate(
        model.net, "digits"
    ),  # type: ignore[arg-type]
    "resnet18 is a network, not data": lambda _: resnetlab.train("resnet18"),
    "unknown argument of predict 'save'; known: image, top, protocol.": lambda model: model.predict("a.png", save=True),  # type: ignore[call-arg]
    "unknown argument of predict 'imgsz'; known": lambda model: model.predict("a.png", imgsz=64),  # type: ignore[call-arg]
    "Prediction has no attribute 'argmax'; use label.": lambda model: model(ZEROS).argmax(),
    "Model has no attribute 'accuracy'; use metrics,": lambda model: model.accuracy,  # type: ignore[attr-defined]
    "there are none of resnet8.": lambda _: resnetlab.train("digits", net="resnet8", weights="imagenet"),
    "train: out must be a path, not 3.": lambda _: resnetlab.train("digits", out=3),  # type: ignore[arg-type]
    "save: path must be a path, not 3.": lambda model: model.save(3),  # type: ignore[arg-type]
    "no file here; a published model is opened by resnetlab.load('cifar10:resnet20').": lambda _: resnetlab.evaluate(
        "cifar10:resnet20", "digits"
    ),
    "no file here; a published model is opened by resnetlab.load('hf:a/b').": lambda _: resnetlab.evaluate(
        "hf:a/b", "digits"
    ),
    "or what load returned, not Linear.": lambda _: resnetlab.evaluate([nn.Linear(1, 1)], "digits"),  # type: ignore[list-item]
    "build(…).to(memory_format=torch.channels_last) converts it": lambda _: resnetlab.build(
        "resnet8", channels_last=True
    ),
    "'./resnet9'; did you mean": lambda _: resnetlab.build("./resnet9"),
    "on_evaluate is a function, not 3": lambda _: resnetlab.train("digits", on_evaluate=3),  # type: ignore[arg-type]
    "not DataLoader; give its dataset": lambda _: resnetlab.train(DataLoader([0])),  # type: ignore[arg-type]
}
ZEROS = np.zeros((8, 8), np.uint8)


def test_models_are_files_in_any_iterable_and_folder() -> None:
    for path in ("first.safetensors", "runs/12:30"):
        with pytest.raises(ModelFileError, match=f"^{path} does not exist"):
            resnetlab.evaluate(iter([path]), "digits")  # type: ignore[arg-type]


@pytest.mark.parametrize("sentence", WRONG)
def test_errors_in_python_end_in_a_sentence_after_few_frames(sentence: str, model: Model) -> None:
    with pytest.raises(UsageError, match=re.escape(sentence)) as error:
        WRONG[sentence](model)
    shown = traceback.extract_tb(error.value.__traceback__)
    assert len(shown) <= 4 and error.value.__cause__ is None  # this test, its function, and one of ours


@pytest.mark.parametrize("word", ["start_from", "weights"])
def test_a_start_is_fine_tuned_in_python_as_on_the_command_line(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Recipe] = []
    monkeypatch.setattr(python_api, "start_run", lambda recipe, *_: runs.append(recipe))
    for chosen in (None, "quick"):
        resnetlab.train("digits", recipe=chosen, progress=False, **{word: "cifar10:resnet20"})  # type: ignore[arg-type]
    assert [(run.name, run.start_from, run.net) for run in runs] == [
        (name, "cifar10:resnet20", "") for name in ("finetune", "quick")
    ]
    monkeypatch.chdir(tmp_path)
    for folder_there in (False, True):  # a folder of a recipe's name
        if folder_there:
            (tmp_path / "photos").mkdir()
        resnetlab.train("photos", progress=False, **{word: "cifar10:resnet20"})  # type: ignore[arg-type]
    assert [(run.name, run.data) for run in runs[2:]] == [("photos", "photos"), ("finetune", "photos")]
    with pytest.raises(UsageError, match="weights and start_from are the same value; give it once"):
        resnetlab.train("digits", start_from="a", weights="b")


def test_the_names_of_published_weights_are_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(name: str, _: object) -> None:
        asked.append(name)
        raise UsageError("noted")

    monkeypatch.setattr(build, "load_start", note)
    for weights in ("DEFAULT", "IMAGENET1K_V1", torchvision.models.ResNet50_Weights.IMAGENET1K_V2):
        with pytest.raises(UsageError, match="noted"):
            resnetlab.build("resnet50", weights=weights)  # type: ignore[arg-type]
    assert asked == [f"torchvision:resnet50.IMAGENET1K_{version}" for version in ("V2", "V1", "V2")]
    assert resnetlab.list_models("*50*", pretrained=True) == ["resnet50"]


def test_bfloat16_is_taken(model: Model, tmp_path: Path) -> None:
    assert model(torch.from_numpy(ZEROS).bfloat16()).label == model(ZEROS).label
    images = torch.rand(20, 8, 8).bfloat16()
    result = resnetlab.train((images, [0, 1] * 10), out=tmp_path / "run", **SHORT)  # type: ignore[arg-type]
    assert result.n == 4


def test_figures_have_a_short_form(model: Model) -> None:
    assert repr(model.explain(ZEROS)).endswith("overlay, 3 blocks)")
    shown = repr(model.evaluate("digits"))
    assert shown.startswith("Evaluation(digits, test split, 360 images, 1crop: top-1 error ") and len(shown) < 100


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("train flowrs", "there is no data set and no folder 'flowrs' here; did you mean 'flowers'?"),
        ("classify train data=flowrs", "did you mean 'flowers'?"),
        ("train ./x/flowrs", "x/flowrs is not there; give a folder of class folders"),
        ("detect train flowrs", "flowrs is not there; did you mean 'flowers'?"),
        ("detect train flowers/data.yaml", "data.yaml is a file; give the folder that holds images and annotations"),
        ("predict mdl.safetensors a.png", "mdl.safetensors does not exist; did you mean 'model.safetensors'?"),
        ("predict model.safetensors b.png c.png", "b.png is not there"),
        ("explain model.safetensors b.png", "b.png is not there"),
        ("embed model.safetensors flowrs", "did you mean 'flowers'?"),
        ("neighbours model.safetensors flowrs labels.csv", "did you mean 'flowers'?"),
        ("neighbours model.safetensors flowers b.png", "b.png is not there"),
        ("data audit flowrs --model model.safetensors", "did you mean 'flowers'?"),
        ("predict model=m.safetensors source=a.png imgsz=64", "there is no option imgsz: a model has its image size"),
        ("export m.safetensors onnx", "export does not take 'onnx'; for example: resnetlab export"),
        ("report runs/a", "it is `resnetlab runs compare RUN RUN` here"),
        ("-V", "there is no option '-V'; it is `resnetlab --version` here"),
        ("--verbose train", "--verbose is no option of `resnetlab` itself; a command comes first"),
        ("study degradation --set shortcut=C", "a study sets its own): resnetlab train DATA --set key=value"),
        ("train labels.csv", "name the one of the label, for example labels.csv:label=Species"),
        ("train labels.csv:label=spec", "for example labels.csv:label=Species"),
        ("train labels.csv:label=species", "labels.csv, row 1: "),
    ],
)
def test_misspelt_names_are_answered(
    line: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "flowers").mkdir()
    (tmp_path / "flowers" / "data.yaml").write_text("names: [a]\n")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    (tmp_path / "labels.csv").write_text("Filename,Species\na.jpg,\n")
    assert run_command(line.split()) in (1, 2)
    assert sentence in capsys.readouterr().err


def test_classes_inside_other_folders_are_warned_of(tmp_path: Path) -> None:
    for site in ("siteA", "siteB"):
        for species in ("oak", "beech"):
            for i in range(3):
                place = tmp_path / "field" / site / species
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(ZEROS).save(place / f"{i}.png")
    with pytest.warns(
        UserWarning, match="are its folders siteA, siteB, and each of them holds beech, oak; if those are"
    ):
        load_dataset(str(tmp_path / "field"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Image.fromarray(ZEROS).save(tmp_path / "field" / "siteA" / "x.png")  # not all are inside
        load_dataset(str(tmp_path / "field"), tmp_path)


def test_splits_inside_classes_are_warned_of_and_those_of_masks_are_not(tmp_path: Path) -> None:
    for classes in (("oak", "beech"), ("images", "masks")):
        for place in (tmp_path / classes[0] / name / split for name in classes for split in ("train", "val")):
            place.mkdir(parents=True)
            for i in range(3):
                Image.fromarray(ZEROS).save(place / f"{i}.png")
    with pytest.warns(
        UserWarning, match="each of them holds train, val; those are taken together; to use them as splits"
    ):
        load_dataset(str(tmp_path / "oak"), tmp_path)
    with warnings.catch_warnings(action="error"), pytest.raises(DataError, match=r"segment train .*images"):
        load_dataset(str(tmp_path / "images"), tmp_path)


def test_times_that_others_spoil_are_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    for load, sentence in ((count_cores() + 2.0, "other programs use the processor"), (0.5, "")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, load, load), raising=False)
        assert console.describe_busy() == sentence
