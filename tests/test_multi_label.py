"""Several classes per image, or none: reading, loss, figures, thresholds, and a run from training to serving."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import resnetlab
from resnetlab.cli.main import run_command
from resnetlab.data import sources
from resnetlab.data.dataset import Dataset, hold_out
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.objects import dataset_from_object
from resnetlab.errors import DataError, ModelFileError, UsageError
from resnetlab.evaluation.multi_label import MultiLabelMetrics, average_precision, fit_thresholds
from resnetlab.models.model_file import load_trained_model
from resnetlab.run_folder import RunFolder, read_metrics
from resnetlab.training import recipes
from resnetlab.training.recorder import RunStopped
from resnetlab.training.report import RunDescription, render_progress
from resnetlab.training.result import MultiLabelResult
from resnetlab.training.tasks.multi_label import multi_label_loss
from runs import assert_same
from tiny_runs import TINY_PHOTOS

CLASSES = ("blue", "green", "red")  # an image's classes are the colours that it has
SETTING: dict[str, Any] = TINY_PHOTOS | {"batch": 16, "val_images": 24, "workers": 0, "threads": 1}


def picture(seed: int) -> tuple[Image.Image, list[str]]:
    """A dark noisy image with bright halves in the colours of its classes."""
    draw = np.random.default_rng(seed)
    has = draw.random(3) < 0.5
    pixels = draw.integers(0, 60, (20, 20, 3))
    pixels += 150 * has
    names = [name for i, name in enumerate(("red", "green", "blue")) if has[i]]
    return Image.fromarray(pixels.astype(np.uint8)), names


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 images, labels.csv with a list, and columns.csv with 0 and 1."""
    root = tmp_path_factory.mktemp("colours")
    with open(root / "labels.csv", "w") as lists, open(root / "columns.csv", "w") as columns:
        lists.write("path,labels,split\n")
        columns.write("path,red,green,blue,split,place\n")
        for i in range(120):
            image, names = picture(i)
            image.save(root / f"{i}.png")
            split = "val" if i % 4 == 3 else "train"
            lists.write(f"{i}.png,{'; '.join(names)},{split}\n")
            values = ",".join(str(int(name in names)) for name in ("red", "green", "blue"))
            columns.write(f"{i}.png,{values},{split},place {i % 7}\n")
    return root


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> MultiLabelResult:
    out = tmp_path_factory.mktemp("runs") / "run"
    values = SETTING | {"steps": 40, "eval_every": 20, "keep": "best"}
    result = resnetlab.train("photos", data=str(root / "labels.csv"), out=out, progress=False, **values)
    assert isinstance(result, MultiLabelResult)
    return result


def load(data: object) -> Dataset:
    return sources.load_dataset(str(data), Path("data"), ReadOptions(multi_label=True))


def classes_of(data: Dataset) -> dict[str, list[str]]:
    """name -> classes, of every image."""
    assert data.label_sets is not None
    sets = [[data.classes[i] for i in row.nonzero().flatten().tolist()] for row in data.label_sets]
    return {n: sets[i] for s in data.splits.values() for n, i in zip(s.names, s.labels.tolist(), strict=True)}


def test_lists_and_columns_are_the_same_data(root: Path, tmp_path: Path) -> None:
    lists, columns = load(root / "labels.csv"), load(root / "columns.csv")
    expected = {f"{i}.png": sorted(picture(i)[1]) for i in range(120)}
    assert lists.classes == columns.classes == CLASSES and [] in expected.values()
    assert classes_of(lists) == classes_of(columns) == expected
    assert lists.fingerprint == columns.fingerprint and set(columns.train.columns) == {"split", "place"}
    named = load(f"{root / 'columns.csv'}:labels=red+blue")
    assert named.classes == ("blue", "red") and classes_of(named)["0.png"] == [
        c for c in expected["0.png"] if c != "green"
    ]
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = list(csv.DictReader((root / "labels.csv").read_text().splitlines()))
    table = {"path": [str(root / r["path"]) for r in rows], "tags": [r["labels"].split("; ") for r in rows]}
    parquet.write_table(pyarrow.table(table | {"split": [r["split"] for r in rows]}), tmp_path / "l.parquet")
    assert load(tmp_path / "l.parquet").fingerprint == lists.fingerprint


def test_python_objects_of_several_classes() -> None:
    y = np.array([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]] * 5)
    x = np.zeros((20, 8, 8, 3), np.uint8)
    data = dataset_from_object((x, y))
    assert data.label_sets is not None and data.classes == ("0", "1", "2")
    everything = data.all_images
    assert everything is not None and torch.equal(data.label_sets[everything.labels], torch.tensor(y).float())
    names = dataset_from_object((x, [["cat", "dog"], [], ["bird"], ["dog"]] * 5))
    assert names.classes == ("bird", "cat", "dog")
    items = [(Image.new("RGB", (8, 8)), torch.tensor(row)) for row in y]
    assert torch.equal(dataset_from_object({"train": items}).label_sets, data.label_sets)  # type: ignore[arg-type]
    assert dataset_from_object((x, np.arange(20) % 2)).label_sets is None
    for wrong in (y * 2, y.astype(float) / 3, [["a"], "b"] * 10):
        with pytest.raises(DataError, match=r"an array \(images, classes\) of 0 and 1|a list for every image"):
            dataset_from_object((x, wrong))


def test_labels_of_one_class_each_are_warned_of(tmp_path: Path) -> None:
    one_hot = np.eye(3, dtype=int)[np.arange(30) % 3]
    data = (np.zeros((30, 8, 8, 3), np.uint8), one_hot)
    values: dict[str, Any] = {"net": "resnet8", "steps": 1, "batch": 6, "device": "cpu", "progress": False}
    with pytest.warns(UserWarning, match=r"every image has exactly one of the classes.* y.argmax\(1\)"):
        resnetlab.train(data, out=tmp_path / "run", **values)


def test_what_a_table_of_several_classes_must_not_have(root: Path, tmp_path: Path) -> None:
    text = (root / "columns.csv").read_text().replace("train,place 0", "train,place 0", 1)
    lines = text.splitlines()
    lines[3] = lines[3].replace("2.png,", "2.png,-1", 1).replace("-10,", "-1,").replace("-11,", "-1,")
    (tmp_path / "bad.csv").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"bad\.csv, row 3: column red has '-1', while it has 0 or 1 elsewhere"):
        load(tmp_path / "bad.csv")
    (tmp_path / "one.csv").write_text("path,label\na.png,cat;dog\nb.png,bird\n")
    with (
        pytest.warns(UserWarning, match=r"each of which is one class here; .*one\.csv:labels=label"),
        pytest.raises(DataError),
    ):
        load(tmp_path / "one.csv")
    with pytest.raises(UsageError, match="gives several classes per image, which this does not take"):
        sources.load_dataset(str(root / "labels.csv"), Path("data"))
    for values in ({"class_weights": "balanced"}, {"sampling": "balanced"}, {"none_share": 0.05}, {"fold": "1/3"}):
        with pytest.raises(UsageError, match="is for data with one class per image"):
            resnetlab.train(
                "photos", data=str(root / "labels.csv"), out=tmp_path / "x", progress=False, **SETTING | values
            )
    assert not (tmp_path / "x").exists()


def test_data_check_takes_several_classes(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts are of images with each class; copies with other classes are a conflict, a class without an image a problem."""
    smaller = dataclasses.replace(recipes.photos(), image_size=32, batch=8, bn_batch=0)  # its speed is measured
    monkeypatch.setattr(recipes, "photos", lambda: smaller)
    command = ["data", "check", "--workers", "0", "--json"]
    page = tmp_path / "check.html"
    assert run_command([*command, str(root / "labels.csv"), "--out", str(page)]) in (0, 1)
    assert "can be read; train 90 in 3 classes; val 30 in 3 classes" in page.read_text()
    document = json.loads(capsys.readouterr().out)
    assert document["readable"] == 120 and document["loading"]["images_per_second"] > 0
    with open(root / "columns.csv") as file:
        rows = list(csv.DictReader(file))
    for split in ("train", "val"):
        of_split = [row for row in rows if row["split"] == split]
        assert document["classes"][split] == {name: sum(int(row[name]) for row in of_split) for name in CLASSES}
    lists = tmp_path / "lists.csv"
    names = [root / "1.png", root / "1.png", root / "2.png", root / "2.png", root / "9.png"]
    for i, (name, classes) in enumerate(zip(names, ("red", "red;blue", "blue", "blue", ""), strict=True)):
        (tmp_path / f"{i}.png").write_bytes(b"no image" if i == 4 else name.read_bytes())
        with open(lists, "a") as file:
            file.write(("" if i else "path,labels,split\n") + f"{i}.png,{classes},train\n")
    (tmp_path / "5.png").write_bytes((root / "5.png").read_bytes())
    with open(lists, "a") as file:
        file.write("5.png,green,val\n")
    assert run_command([*command, "--no-timing", str(lists), "--quarantine", str(tmp_path / "q.txt")]) == 1
    problems = {(p["kind"], Path(p["file"]).name): p["detail"] for p in json.loads(capsys.readouterr().out)["problems"]}
    assert set(problems) == {
        ("layout", "lists.csv"),
        ("unreadable", "4.png"),
        ("conflict", "0.png"),
        ("duplicate", "3.png"),
    }
    assert problems["layout", "lists.csv"].startswith("no image to train on has the class green;")
    assert problems["conflict", "0.png"].endswith("which is of class blue;red, not red")
    assert [line for line in (tmp_path / "q.txt").read_text().splitlines() if line[0] != "#"] == [
        "4.png",
        "3.png",
        "1.png",
        "0.png",
    ]


def test_rare_label_sets_are_held_out_at_random() -> None:
    """Where every image has a set of its own, those held out must not be those that come first by name."""
    y = ((np.arange(64)[:, None] >> np.arange(6)) & 1).astype(int)
    data = dataset_from_object(
        {
            "train": (np.zeros((64, 8, 8, 3), np.uint8), y),
            "val": (np.zeros((6, 8, 8, 3), np.uint8), np.eye(6, dtype=int)),
        }
    )
    _, chosen = hold_out(data.train, 16)
    assert len(chosen) == 16 and data.label_sets is not None
    share = data.label_sets[data.train.labels[chosen]].mean(0)
    assert float(share.min()) > 0.1 and float(share.max()) < 0.9


def test_loss_and_figures_by_hand() -> None:
    torch.manual_seed(1)
    logits, sets = torch.randn(4, 3), torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 0]])
    labels = torch.tensor([0, 1, 2, 0])
    truth = sets[labels]
    loss, error = multi_label_loss(logits, labels, sets, 0.0)
    p = torch.sigmoid(logits)
    assert float(loss) == pytest.approx(float(-(truth * p.log() + (1 - truth) * (1 - p).log()).mean()), rel=1e-5)
    assert float(error) == float(((p > 0.5) != (truth > 0.5)).float().mean())
    mixed = torch.tensor([[0.25, 0.0, 0.75]] * 4)
    soft = torch.tensor([[0.25, 0.75, 0.25]] * 4)
    smoothed = F.binary_cross_entropy_with_logits(logits, soft * 0.9 + 0.05)
    assert torch.allclose(multi_label_loss(logits, mixed, sets, 0.1)[0], smoothed)
    scores = torch.tensor([[0.9, 0.2], [0.8, 0.3], [0.7, 0.4], [0.1, 0.4]])
    truth = torch.tensor([[1, 0], [0, 0], [1, 1], [0, 0]]).bool()
    metrics = MultiLabelMetrics(("a", "b"), scores, truth, (0.5, 0.4))
    assert metrics.average_precisions == [pytest.approx(5 / 6), 0.5] and metrics.mean_ap == pytest.approx(2 / 3)
    assert [c.f1 for c in metrics.per_class] == [pytest.approx(0.8), pytest.approx(2 / 3)]
    assert (metrics.label_error, metrics.set_error, metrics.micro_f1) == (0.25, 0.5, 0.75)
    assert average_precision(scores[:, 0], torch.zeros(4).bool()) is None
    assert fit_thresholds(scores, truth) == (pytest.approx(0.4), pytest.approx(0.35))


def test_average_precision_and_thresholds_agree_with_others() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    torch.manual_seed(2)
    scores, truth = (torch.rand(200, 5) * 39).round() / 40 + 1 / 80, torch.rand(200, 5) < 0.3  # with ties
    metrics = MultiLabelMetrics(tuple("abcde"), scores, truth, (0.5,) * 5)
    expected = sklearn.average_precision_score(truth.numpy(), scores.numpy(), average=None)
    assert metrics.average_precisions == pytest.approx(expected.tolist())
    f1 = sklearn.f1_score(truth.numpy(), scores.numpy() >= 0.5, average=None)
    assert [c.f1 for c in metrics.per_class] == pytest.approx(f1.tolist())
    best = MultiLabelMetrics(tuple("abcde"), scores, truth, fit_thresholds(scores, truth)).per_class
    for i in range(5):
        tried = [
            MultiLabelMetrics(("a",), scores[:, i : i + 1], truth[:, i : i + 1], (t / 80,)).macro("f1")
            for t in range(1, 80)
        ]
        assert best[i].f1 == pytest.approx(max(tried))


def test_a_run_learns_and_its_file_keeps_thresholds(root: Path, trained: MultiLabelResult, tmp_path: Path) -> None:
    assert trained.mean_ap > 0.95 and trained.f1 > 0.85 and trained.split == "val" and trained.n == 30
    model = load_trained_model(Path(trained.model))
    assert model.multi_label and len(model.thresholds) == 3 and model.classes == CLASSES
    assert model.calibration["n"] == 24 and model.metrics["val"]["mean_ap"] == trained.mean_ap
    assert f"val {trained.mean_ap:.3f}" in model.describe()["mean average precision"]
    model.save(tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == Path(trained.model).read_bytes()
    for data in ("labels.csv", "columns.csv"):
        evaluation = resnetlab.evaluate(trained.model, str(root / data), device="cpu")
        figures = evaluation.to_dict()
        assert figures == evaluation.to_json()
        assert figures["per_class"] == model.metrics["val"]["per_class"] and figures["notes"] == []
    held_out = [line for line in read_metrics(RunFolder(Path(trained.run))) if line["kind"] == "held_out"]
    assert len(held_out) == 2 and held_out[-1]["map_error"] < 0.2
    page = Path(trained.report).read_text()
    assert (
        f"mAP {trained.mean_ap:.3f}" in page and "the highest F1 of each class on 24 images" in page and "<svg" in page
    )
    about = RunDescription(
        title="a run",
        recipe={"steps": 40},
        differences={},
        budget=None,
        metrics=read_metrics(RunFolder(Path(trained.run))),
        environment={},
    )
    unfinished = render_progress(about, trained.run)
    assert "Label error by step" in unfinished and "Top-1" not in unfinished
    model.thresholds = (0.5, 2.0, 0.5)
    model.save(tmp_path / "bad.safetensors")
    with pytest.raises(ModelFileError, match="its thresholds are not 3 numbers between 0 and 1"):
        load_trained_model(tmp_path / "bad.safetensors")


def test_thresholds_are_the_best_on_the_held_out_images_alone(root: Path, trained: MultiLabelResult) -> None:
    names = json.loads((Path(trained.run) / "holdout.json").read_text())["evaluated while training"]
    assert len(names) == 24 and not {int(Path(name).stem) % 4 for name in names} & {
        3
    }  # the test images are every fourth
    model = resnetlab.load(trained.model, device="cpu")
    found = [{each.label: each.score for each in p.top} for p in model.predict([root / name for name in names])]
    scores = {name: [one[name] for one in found] for name in CLASSES}
    for name, threshold in zip(CLASSES, model.thresholds, strict=True):
        truth = [name in picture(int(Path(file).stem))[1] for file in names]

        def f1(over: float, truth: list[bool] = truth, name: str = name) -> float:
            said = [score >= over for score in scores[name]]
            right = sum(a and b for a, b in zip(said, truth, strict=True))
            return 2 * right / (sum(said) + sum(truth))

        assert f1(threshold) == max(f1(over) for over in scores[name])


def test_predictions_name_the_classes_over_their_thresholds(
    root: Path, trained: MultiLabelResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = resnetlab.load(trained.model, device="cpu")
    found = model.predict([root / f"{i}.png" for i in range(40)])
    with torch.inference_mode():
        pixels = torch.stack([model.preprocessing(Image.open(root / f"{i}.png")) for i in range(40)])
        expected = torch.sigmoid(model.net(model.preprocessing.normalise(pixels)))
    for prediction, row in zip(found, expected, strict=True):
        assert {each.label: pytest.approx(each.score, abs=1e-4) for each in prediction.top} == dict(
            zip(CLASSES, row.tolist(), strict=True)
        )
        over = [c for c, s, t in zip(CLASSES, row.tolist(), model.thresholds, strict=True) if s >= t]
        assert list(prediction.labels) == over == prediction.to_json()["labels"]
    right = [sorted(p.labels) == sorted(picture(i)[1]) for i, p in enumerate(found)]
    assert sum(right) > 30
    none = next(p for p in found if not p.labels)
    assert none.label == "none of these" and none.to_rows()[0][1:3] == (0, "none of these")
    flipped = model.predict(root / "0.png", protocol="flip")
    assert all(abs(a.score - b.score) < 0.3 for a, b in zip(sorted(flipped.top), sorted(found[0].top), strict=True))
    run_command(["predict", trained.model, str(root / "0.png"), "--device", "cpu", "--format", "csv"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 5 and rows[1].split(",")[1:3] == ["0", ";".join(found[0].labels)]
    model.keep_classes(["red", "blue"])
    assert model.thresholds == tuple(load_trained_model(Path(trained.model)).thresholds[i] for i in (2, 0))


def test_a_resumed_run_is_bit_identical(root: Path, trained: MultiLabelResult, tmp_path: Path) -> None:
    values = SETTING | {"steps": 40, "eval_every": 20, "keep": "best"}
    data = str(root / "labels.csv")
    with pytest.raises(RunStopped):
        resnetlab.train(
            "photos", data=data, out=tmp_path / "run", progress=False, on_evaluate=lambda f: f["step"] == 20, **values
        )
    result = resnetlab.train(resume=tmp_path / "run", progress=False)
    assert result.steps == 40
    assert_same(Path(trained.run), tmp_path / "run")
    again = resnetlab.train(resume=tmp_path / "run", progress=False)
    assert isinstance(again, MultiLabelResult) and again == result


def test_commands_of_several_classes(
    root: Path, trained: MultiLabelResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(root / "labels.csv"), tmp_path / "page"
    files = ["--out", str(out), "--predictions", str(tmp_path / "p.csv")]
    run_command(["evaluate", trained.model, "--data", data, "--device", "cpu", *files])
    text = capsys.readouterr().out
    assert f"mAP {trained.mean_ap:.3f}" in text and "the highest F1 of each class on 24 images" in text
    assert f"mAP {trained.mean_ap:.3f}" in (out / "evaluation.html").read_text()
    assert json.loads((out / "evaluation.json").read_text())["mean_ap"] == trained.mean_ap
    assert run_command(["runs", "compare", trained.run, trained.run, "--out", str(tmp_path / "runs.html")]) == 0
    assert "Held-out 1 - mAP by step." in (tmp_path / "runs.html").read_text()
    capsys.readouterr()
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert len(rows) == 30 and set(rows[0]) == {
        "image",
        "true",
        "predicted",
        "right",
        *(f"score: {c}" for c in CLASSES),
    }
    for options, words in {
        ("--fit-temperature", "train"): "it has no temperature to fit",
        ("--corruptions", "fog", "--severities", "1"): "corruptions are evaluated for models of one class per image",
    }.items():
        assert run_command(["evaluate", trained.model, "--data", data, "--device", "cpu", *options]) == 2
        assert words in capsys.readouterr().err
    with pytest.raises(UsageError, match="gives an image several classes, and is evaluated alone"):
        resnetlab.evaluate([trained.model, trained.model], data)
    sort = ["--sort-into", str(tmp_path / "s"), "--device", "cpu"]
    assert run_command(["predict", trained.model, str(root / "0.png"), *sort]) == 2
    assert "--sort-into puts an image into one folder" in capsys.readouterr().err
    views = resnetlab.evaluate(trained.model, data, protocol="10crop+logits", device="cpu").to_json()
    assert views["mean_ap"] > 0.8 and views["protocol"] == "10crop+logits"
    single = root.parent / "single.csv"
    single.write_text("path,label\n" + "".join(f"{root / f'{i}.png'},{('red', 'blue')[i % 2]}\n" for i in range(12)))
    one = resnetlab.evaluate(trained.model, str(single), split="all", device="cpu").to_json()
    assert [row["n"] for row in one["per_class"]] == [6, 0, 6] and one["per_class"][1]["ap"] is None


def test_what_others_make_of_the_model_carries_sigmoids(root: Path, trained: MultiLabelResult, tmp_path: Path) -> None:
    from resnetlab.inference.export_graphs import export_metadata
    from resnetlab.inference.inference_module import InferenceModule, compute_reference
    from resnetlab.serve.models import ServedClassifier

    model = resnetlab.load(trained.model, device="cpu")
    pixels = torch.stack([model.preprocessing(Image.open(root / f"{i}.png")) for i in range(4)])
    expected = compute_reference(model, pixels)
    assert not torch.allclose(expected.sum(1), torch.ones(4), atol=0.05)
    assert torch.allclose(InferenceModule(model)(pixels), expected, atol=1e-4)
    assert json.loads(export_metadata(model)["thresholds"]) == list(model.thresholds)
    served = ServedClassifier(model)
    answer = served.format(pixels[0], served.predict(list(pixels[:1]))[0], None, None)
    assert answer["labels"] == model.over_threshold(expected[0]) and len(answer["top"]) == 3
    assert served.format(pixels[0], torch.zeros(3), None, None)["none_of_these"] is True
    assert model.calibration and not served.describe()["calibrated"]  # thresholds are what was fitted
