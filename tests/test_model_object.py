"""The model object in Python: every kind of image, what a prediction is, and the methods that people look for."""

from __future__ import annotations

import array
import io
import json
import pickle
import re
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import resnetlab
from http_server import FileServer
from resnetlab.data import digits
from resnetlab.device import DeviceConfig, select_device
from resnetlab.errors import DataError, ModelFileError, ResNetLabError, UsageError
from resnetlab.inference.predict import Model, Prediction
from resnetlab.training.result import ClassificationResult
from tiny_runs import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("object") / "run"
    resnetlab.train("digits", steps=20, out=out, device="cpu", progress=False, **TINY)  # type: ignore[arg-type]
    return out


@pytest.fixture(scope="module")
def model(run: Path) -> Model:
    loaded = resnetlab.load(run / "model.safetensors", device="cpu")
    assert isinstance(loaded, Model)
    return loaded


PIXELS = digits.load_digits().test.images[0, :, :, 0].numpy().repeat(4, 0).repeat(4, 1)  # uint8 (H, W)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b.png"):
        Image.fromarray(PIXELS).save(place / name)
    return place


FORMS: dict[str, Callable[[Path], Any]] = {
    "path": lambda folder: folder / "a.png",
    "text": lambda folder: str(folder / "a.png"),
    "bytes": lambda folder: (folder / "a.png").read_bytes(),
    "file": lambda folder: io.BytesIO((folder / "a.png").read_bytes()),
    "Pillow": lambda folder: Image.open(folder / "a.png"),
    "array (H, W)": lambda folder: PIXELS,
    "array (H, W, 1)": lambda folder: PIXELS[..., None],
    "array (H, W, 3)": lambda folder: PIXELS[..., None].repeat(3, -1),
    "array (3, H, W)": lambda folder: PIXELS[None].repeat(3, 0),
    "array of floats": lambda folder: PIXELS / np.float32(255),
    "array of int64": lambda folder: PIXELS.astype(np.int64),
    "tensor (1, H, W)": lambda folder: torch.from_numpy(PIXELS)[None],
    "tensor (3, H, W)": lambda folder: torch.from_numpy(PIXELS)[None].expand(3, -1, -1),
    "tensor of floats with gradient": lambda folder: (torch.from_numpy(PIXELS)[None] / 255).requires_grad_(),
    "memoryview": lambda folder: memoryview((folder / "a.png").read_bytes()),
    "bytearray": lambda folder: bytearray((folder / "a.png").read_bytes()),
    "bytes in an array": lambda folder: np.frombuffer((folder / "a.png").read_bytes(), np.uint8),
    "bytes in a tensor": lambda folder: torch.frombuffer(bytearray((folder / "a.png").read_bytes()), dtype=torch.uint8),
    "another buffer": lambda folder: array.array("B", (folder / "a.png").read_bytes()),
    "batch of one": lambda folder: torch.from_numpy(PIXELS)[None, None],
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_may_come_in_any_form(form: str, model: Model, folder: Path) -> None:
    expected = model.predict(folder / "a.png").top
    image = FORMS[form](folder)
    prediction = model(image)
    assert (prediction[0] if form.startswith("batch") else prediction).top == expected


def test_several_images_give_a_list(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = model.predict(folder / "a.png")
    names = [str(folder / name) for name in ("a.png", "b.png")]
    for images in (
        folder,
        str(folder),
        f"{folder}/*.png",
        names,
        map(Path, names),
        (folder / "a.png", str(folder / "b.png")),
    ):
        predictions = model.predict(images)
        assert [p.name for p in predictions] == names and [p.top for p in predictions] == [one.top, one.top]
    assert [p.top for p in model.predict(np.stack([PIXELS[..., None]] * 2))] == [one.top] * 2
    assert [p.name for p in model.predictions(str(folder / "a.png"))] == [names[0]]  # not the characters
    mixed = model.predict([names[0], folder / "none.png", PIXELS])
    assert [p.error is None for p in mixed] == [True, False, True] and mixed[2].name == "image"


def test_a_bad_image_of_many_is_one_row(model: Model, folder: Path) -> None:
    good = (folder / "a.png").read_bytes()
    batch = np.empty(6, object)  # as Ray Data and pandas give columns
    batch[:] = [good, b"no image", None, np.full((5, 7), -1.0), PIXELS, "nothing*.png"]
    predictions = model.predict(batch)
    assert [p.error is None for p in predictions] == [True, False, False, False, True, False]
    assert predictions[0].top == predictions[4].top == model.predict(good).top
    assert "an image is a path" in str(predictions[2].error) and "Normalised images" in str(predictions[3].error)
    assert [p.error is None for p in model.predict(list(batch), protocol="flip")] == [
        True,
        False,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("backend", ["", "torch", "onnxruntime", "openvino"])
def test_it_pickles_with_its_backend(backend: str, run: Path, folder: Path) -> None:
    if backend in ("onnxruntime", "openvino"):
        pytest.importorskip(backend)
    model = resnetlab.load(run, device="cpu")
    assert isinstance(model, Model)
    if backend:
        model.select_backend(backend, "fp32")
    copied = pickle.loads(pickle.dumps(model))
    assert copied.backend_name == model.backend_name == f"{backend or 'torch'} fp32"
    assert copied.predict(folder / "a.png").top == model.predict(folder / "a.png").top


def test_a_tar_of_images_is_read(model: Model, folder: Path, tmp_path: Path) -> None:
    names = [folder / "a.png", folder / "b.png"]
    with tarfile.open(tmp_path / "images-000.tar", "w") as tar:
        for file in names:
            tar.add(file, f"x/{file.name}")
        tar.add(__file__, "x/notes.txt")
    for place in (tmp_path / "images-000.tar", f"{tmp_path}/images-{{000..000}}.tar"):
        predictions = model.predict(place)
        assert [p.name for p in predictions] == [f"{tmp_path}/images-000.tar/x/{file.name}" for file in names]
        assert [p.top for p in predictions] == [model.predict(file).top for file in names]
    whole = (tmp_path / "images-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(b"no tar" + whole[:600])
    assert "cannot be read" in str(model.predict(tmp_path / "cut.tar")[0].error)


def test_an_address_is_read(model: Model, folder: Path) -> None:
    with FileServer({"a.png?signature=secret": (folder / "a.png").read_bytes()}) as server:
        prediction = model.predict(f"{server.url}a.png?signature=secret")
        assert prediction.name == f"{server.url}a.png" and prediction.top == model.predict(folder / "a.png").top
        with pytest.raises(DataError, match=r"no\.png cannot be downloaded") as error:
            model.predict(f"{server.url}no.png?signature=secret")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (3, "an image is a path, an address"),
        (None, "an image is a path, an address"),
        (np.zeros((4, 5, 6, 7, 8), np.uint8), "not of 4x5x6x7x8"),
        (np.zeros((5, 7, 2), np.uint8), "not of 5x7x2"),
        (np.zeros((0, 7), np.uint8), "not of 0x7"),
        (np.full((5, 7), -1.0), "these are float64 from -1 to -1. Normalised images cannot be used"),
        (np.full((5, 7), 300), "these are int64 from 300 to 300"),
        (np.array(["a"]), "not of 1"),
        (np.array([["a"]]), "an array of numbers, not of <U1"),
        (torch.full((3, 4, 4), float("nan")), "these are float32 from nan to nan"),
        (io.StringIO("x"), "must be opened for bytes"),
        ("nothing*.png", "no file matches nothing"),
        ("", "is a folder, not an image|is not there"),
    ],
)
def test_what_is_no_image_is_refused_in_a_sentence(image: Any, sentence: str, model: Model) -> None:
    with pytest.raises(ResNetLabError, match=sentence):
        model.predict(image)


def test_a_prediction_has_labels_and_scores(model: Model, folder: Path) -> None:
    prediction = model.predict(folder / "a.png", top=3)
    assert prediction.label == prediction[0].label == prediction.top[0][0] in model.classes
    assert prediction.score == prediction[0].score and len(prediction) == 3
    assert [each.label for each in prediction] == [name for name, _ in prediction.top]
    assert prediction.to_dict() == prediction.to_json()
    assert repr(prediction).startswith(f"Prediction({folder / 'a.png'}: {prediction.label} ")
    assert prediction._repr_html_().count("<tr>") == 2
    assert len(model.predict(folder / "a.png", top=None)) == 5
    for top in (0, -1, 2.5, "3", True):
        with pytest.raises(UsageError, match="top must be a whole number from 1 up"):
            model.predict(folder / "a.png", top=top)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"none.png is not there"):
        Prediction("none.png", error="none.png is not there.").label  # noqa: B018


def test_predictions_become_a_table(model: Model, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    predictions = model.predict([folder / "a.png", "none.png"], top=2)
    assert [row["image"] for row in predictions.to_dict()] == [str(folder / "a.png"), "none.png"]
    assert predictions._repr_html_().count("<tr>") == 3 and "none.png is not there" in predictions._repr_html_()
    pandas = pytest.importorskip("pandas")
    table = predictions.to_pandas()
    assert isinstance(table, pandas.DataFrame) and list(table["rank"]) == [1, 2, ""]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="to_pandas needs the package pandas"):
        predictions.to_pandas()


def test_it_is_evaluated_in_its_own_precision(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def select(precision: str, device: str) -> DeviceConfig:
        asked.append(precision)
        return select_device("fp32", device)

    monkeypatch.setattr("resnetlab.evaluation.evaluate.select_device", select)
    evaluation = model.evaluate("digits")
    assert evaluation.n == model.evaluate("digits", precision="bf16").n == 360
    assert "<tr><td>n</td><td>360</td></tr>" in evaluation._repr_html_()
    assert asked == [model.device_config.precision, "bf16"] == ["fp32", "bf16"]


def test_the_methods_that_people_look_for(model: Model, run: Path, folder: Path, tmp_path: Path) -> None:
    assert model.device == torch.device("cpu") and model.classes == tuple("0123456789") and model.names[3] == "3"
    assert model.to("cpu") is model and model.to(torch.device("cpu")).eval() is model
    with pytest.raises(UsageError, match="device 'cuda:99' is not available"):
        model.to("cuda:99")
    assert model.explain(folder / "a.png", top=2).top[0] == model.predict(folder / "a.png")[0]
    model.save(str(tmp_path / "copy.safetensors"))
    copy = resnetlab.load(str(tmp_path / "copy.safetensors"), device="cpu")
    assert copy.predict(folder / "a.png").top == model.predict(folder / "a.png").top
    weights = model.export(tmp_path / "weights.pth")
    assert weights == tmp_path / "weights.pth" and weights.is_file()
    with pytest.raises(UsageError, match=r"^to onnx writes fp32 or int8, not bf16"):
        model.export(str(tmp_path / "m.onnx"), precision="bf16")
    with pytest.raises(UsageError, match=r"files that end in '.tflite'; converters .* read ONNX \(to onnx\)\."):
        model.export(tmp_path / "m.tflite")


def test_it_describes_itself_in_a_few_words(model: Model, run: Path) -> None:
    text = repr(model)
    assert text.startswith(
        "Model(network resnet8 (8 layers, basic blocks 1-1-1); classes 10: 0, 1, 2, 3, 4 and 5 more;"
    )
    assert "8x8 pixels, grey" in text and "top-1 error test " in text and len(text) < 250
    assert model._repr_html_().count("<tr>") == 5
    drawn = replace(model, metrics={"held-out": {"top1_error": 0.5}, "held_out": {"top1_error": 0.25}})
    assert "top-1 error test 50.00%, held-out 25.00%" in repr(drawn)  # one of each, as everywhere else
    result = ClassificationResult.from_json(json.loads((run / "result.json").read_text()))
    assert f"<td>top1 error</td><td>{result.top1_error:.4g}</td>" in result._repr_html_()


def test_load_takes_a_run_folder_and_says_what_else_is_meant(run: Path, folder: Path, tmp_path: Path) -> None:
    assert resnetlab.load(str(run), device="cpu").classes == resnetlab.load(run, device="cpu").classes
    (tmp_path / "recipe.toml").touch()
    for path, kind, sentence in (
        (
            "resnet50",
            UsageError,
            r"resnetlab.build\('resnet50'\) makes it.* published weights are torchvision:resnet50",
        ),
        ("preresnet20", UsageError, "is the name of a network, without weights"),
        (folder / "a.png", UsageError, "is an image; the model comes first"),
        (folder, ModelFileError, "is a folder without model.safetensors"),
        (
            tmp_path,
            ModelFileError,
            "has no model yet; wait for its end, or if it was stopped: resnetlab train --resume",
        ),
        (tmp_path / "model.safetensors", ModelFileError, "has no model yet"),
        ("no.safetensors", ModelFileError, "does not exist"),
        (3, UsageError, "a model is a model file, a run folder or a published name, not int"),
    ):
        with pytest.raises(kind, match=sentence):
            resnetlab.load(path)  # type: ignore[arg-type]


WRONG: dict[str, Callable[[Path], Any]] = {
    "images are an array (N, H, W) or (N, H, W, C)": lambda run: resnetlab.train(data=(PIXELS, [1]), progress=False),
    "items of a data set are (image, label), not ndarray": lambda run: resnetlab.train(PIXELS, progress=False),  # type: ignore[arg-type]
    "net is a network's name or a torch.nn.Module, not builtin_function": lambda run: resnetlab.train(net=torch.relu),  # type: ignore[arg-type]
    "steps must be a whole number, not '3'": lambda run: resnetlab.train("digits", steps="3"),  # type: ignore[arg-type]
    "epochs must be a number, not '3'": lambda run: resnetlab.train("digits", epochs="3"),  # type: ignore[arg-type]
    "workers must be 0 or more, not -1": lambda run: resnetlab.train("digits", workers=-1),
    "the classes come from the data": lambda run: resnetlab.train("digits", num_classes=3),
    "device 'gpu' is not available": lambda run: resnetlab.train("digits", device="gpu"),
    "is not a run folder": lambda run: resnetlab.train(resume=run.parent),
    "a network is given by its name": lambda run: resnetlab.build(50),  # type: ignore[arg-type]
    "device 'cuda:99' cannot be used": lambda run: resnetlab.build("resnet20", device="cuda:99"),
    "a pattern is a word": lambda run: resnetlab.list_models(3),  # type: ignore[arg-type]
    "top must be a whole number from 1 up": lambda run: resnetlab.load(run, device="cpu").explain(PIXELS, top=0),  # type: ignore[union-attr]
    "is a folder; name a file": lambda run: resnetlab.load(run, device="cpu").save(run),
}


@pytest.mark.parametrize("sentence", WRONG)
def test_what_people_get_wrong_is_answered_in_a_sentence(sentence: str, run: Path) -> None:
    with pytest.raises(ResNetLabError, match=re.escape(sentence)):
        WRONG[sentence](run)


def test_a_device_of_torch_is_taken(tmp_path: Path) -> None:
    result = resnetlab.train(
        "digits", steps=1, out=tmp_path / "run", progress=False, device=torch.device("cpu"), **TINY
    )  # type: ignore[arg-type]
    assert result.steps == 1
