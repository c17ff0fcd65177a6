"""One way for all tasks: the model file names its task, and predict, evaluate, export and explain find it there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import cells
from resnetlab.cli.main import run_command
from resnetlab.errors import DataError, UsageError
from resnetlab.inference.annotated import Detector, Segmenter
from resnetlab.inference.open_model import open_model
from resnetlab.inference.outputs import Agreement
from resnetlab.inference.parity_check import ParityReport
from resnetlab.inference.predict import Model
from resnetlab.models.annotated_model import AnnotatedModel, load_annotated
from service import write_annotated_model, write_classifier

TASKS = ("detect", "segment")
Run = Any  # runs a command and returns (exit code, standard output, standard error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder, and an untrained model of each task."""
    root = tmp_path_factory.mktemp("tasks")
    cells.make_voc_folder(root / "voc")
    write_classifier(root / "classify.safetensors")
    for task in TASKS:
        file = write_annotated_model(root / f"{task}.safetensors", task)
        model = load_annotated(file, task)
        model.classes = ("round", "square") if task == "detect" else ("background", "round", "square")
        model.save(file)
    return root


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_one(*arguments: object) -> tuple[int, str, str]:
        code = run_command([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run_one


@pytest.mark.parametrize(("task", "kind"), [("classify", Model), ("detect", Detector), ("segment", Segmenter)])
def test_a_model_of_any_task_is_opened(folder: Path, task: str, kind: type) -> None:
    opened = open_model(str(folder / f"{task}.safetensors"), device="cpu")
    assert type(opened) is kind
    if task != "classify":
        with pytest.raises(UsageError, match="runs on torch in fp32 or bf16"):
            open_model(str(folder / f"{task}.safetensors"), precision="int8")


@pytest.mark.parametrize("task", TASKS)
def test_predictions_accept_every_form_of_an_image(folder: Path, task: str) -> None:
    predictor = open_model(str(folder / f"{task}.safetensors"), device="cpu")
    assert isinstance(predictor, Detector | Segmenter)
    file = folder / "voc" / "JPEGImages" / "p7.png"
    inputs = [("a", file), ("b", str(file)), ("c", file.read_bytes()), ("d", Image.open(file)), ("e", DataError("no"))]
    *results, last = [p.to_json() | {"image": ""} for p in predictor.predictions(inputs)]
    assert len(results) == 4 and all(result == results[0] for result in results) and last["error"] == "no"


@pytest.mark.parametrize("task", TASKS)
def test_predict_finds_the_task_in_the_file(folder: Path, task: str, tmp_path: Path, run: Run) -> None:
    arguments = (folder / f"{task}.safetensors", folder / "voc" / "JPEGImages", "--device", "cpu")
    code, printed, _ = run("predict", *arguments)
    assert (code, printed) == run(task, "predict", *arguments)[:2] and code == 0
    predictions = json.loads(printed)["predictions"]
    assert len(predictions) == 9 and {"detect": "boxes", "segment": "classes"}[task] in predictions[0]
    lines = run("predict", *arguments, "--format", "jsonl", "--out", tmp_path)[1].splitlines()
    drawn = [json.loads(line).pop("drawn") for line in lines]
    assert len(set(drawn)) == 9 and all(Path(file).is_file() for file in drawn)
    assert run("predict", *arguments, "--format", "csv")[0] == 2
    code, _, error = run("predict", *arguments, "--top", "3")
    assert code == 2 and f"--top is not an option for a {'detector' if task == 'detect' else 'segmenter'}" in error


@pytest.mark.parametrize("task", TASKS)
def test_evaluate_finds_the_task_in_the_file(folder: Path, task: str, run: Run) -> None:
    if task == "detect":
        pytest.importorskip("faster_coco_eval", reason="the extra 'detect' is not installed")
    arguments = (folder / f"{task}.safetensors", "--data", folder / "voc", "--device", "cpu", "--json")
    code, printed, _ = run("evaluate", *arguments)
    assert (code, printed) == run(task, "evaluate", *arguments)[:2] and code == 0
    assert json.loads(printed)["n"] == 3
    code, _, error = run("evaluate", *arguments, "--protocol", "10crop")
    assert code == 2 and "--protocol is not an option" in error
    code, printed, error = run("evaluate", folder / f"{task}.safetensors", *arguments)
    if task == "detect":
        assert code == 0 and len(json.loads(printed)["models"]) == 2
    else:
        assert code == 2 and "only classifiers and detectors are evaluated together" in error


@pytest.mark.parametrize("task", TASKS)
def test_export_finds_the_task_in_the_file(
    folder: Path, task: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs themselves are compared in the tests of each task."""
    seen: list[tuple[str, Path, Tensor]] = []

    def export(model: AnnotatedModel, out: Path, images: Sequence[Tensor]) -> ParityReport:
        seen.append((model.task, out, torch.stack(list(images))))
        return ParityReport(len(images), Agreement(1.0, 0.0))

    monkeypatch.setattr("resnetlab.inference.annotated_export.export_annotated", export)
    model, images, out = folder / f"{task}.safetensors", folder / "voc" / "JPEGImages", tmp_path / "m.onnx"
    code, printed, _ = run("export", model, "--to", "onnx", "--images", images, "--out", out, "--json")
    assert code == 0 and (code, printed) == run(task, "export", model, images, "--out", out, "--json")[:2]
    assert json.loads(printed)["images"] == 9
    assert [each[:2] for each in seen] == [(task, out)] * 2 and torch.equal(seen[0][2], seen[1][2])
    code, _, error = run("export", model, "--to", "openvino", "--images", images)
    assert code == 2 and "is exported to onnx only, not to openvino" in error


@pytest.mark.parametrize("task", TASKS)
def test_explain_refuses_other_tasks_with_a_sentence(folder: Path, task: str, run: Run) -> None:
    code, _, error = run("explain", folder / f"{task}.safetensors", folder / "voc" / "JPEGImages" / "p7.png")
    assert code == 2 and "cannot be explained; only a classifier's prediction can." in error


def test_a_restricted_command_refuses_models_of_other_tasks(folder: Path, run: Run) -> None:
    image = folder / "voc" / "JPEGImages" / "p7.png"
    for model, noun in (("segment", "a segmenter"), ("classify", "a classifier")):
        code, _, error = run("detect", "predict", folder / f"{model}.safetensors", image)
        assert code == 1 and f"is {noun}, and a detector is needed here" in error
    code, _, error = run("detect", "predict", folder / "missing.safetensors", image)
    assert code == 1 and "missing.safetensors does not exist" in error


@pytest.mark.parametrize("option", [("--scales", "240,300"), ("--refine",)])
def test_a_classifier_refuses_the_options_of_detectors(folder: Path, option: tuple[str, ...], run: Run) -> None:
    image = folder / "voc" / "JPEGImages" / "p7.png"
    code, _, error = run("predict", folder / "classify.safetensors", image, *option)
    assert code == 2 and f"{option[0]} is not an option for a classifier" in error
