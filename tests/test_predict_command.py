"""`predict`: where predictions go, which images it takes, and what is asked of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import resnetlab
from http_server import FileServer
from resnetlab.cli.main import run_command
from resnetlab.data import digits
from resnetlab.errors import ModelFileError
from resnetlab.inference.predict import Model
from resnetlab.serve.models import ServedClassifier
from tiny_runs import TINY


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predict") / "run"
    resnetlab.train("digits", steps=60, out=out, device="cpu", progress=False, **TINY)  # type: ignore[arg-type]
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i, pixels in enumerate(digits.load_digits().test.images[:6, :, :, 0].numpy()):
        Image.fromarray(pixels).resize((20, 16)).save(tmp_path / "in" / f"{i}.png")
    return tmp_path / "in"


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run_command(["predict", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_out_writes_a_file_in_the_format_of_its_ending(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, printed, _ = predict(capsys, run, folder, "--json", "--top", 2)
    for name in ("p.json", "p.csv", "p.jsonl", "p.txt", "p.parquet"):
        code, out, err = predict(capsys, run, folder, "--out", tmp_path / name, "--top", 2)
        assert (code, out) == (0, "") and f"predictions: {tmp_path / name}" in err
    expected = json.loads(printed)["predictions"]
    assert json.loads((tmp_path / "p.json").read_text())["predictions"] == expected
    assert [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()] == expected
    rows = list(csv.DictReader((tmp_path / "p.csv").read_text().splitlines()))
    assert [row["class"] for row in rows[::2]] == [p["top"][0]["class"] for p in expected] and len(rows) == 12
    assert "classes and scores" in (tmp_path / "p.txt").read_text()
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(tmp_path / "p.parquet").to_pylist()
    assert [(row["image"], row["rank"], row["class"]) for row in table] == [
        (row["image"], int(row["rank"]), row["class"]) for row in rows
    ]
    for arguments, sentence in (
        (("--out", tmp_path / "p.xml"), "--out takes a file that ends in .csv, .json, .jsonl, .parquet, .txt"),
        (("--out", tmp_path / "p.csv", "--json"), "contradict each other"),
        (("--min-score", 2), "--min-score must be from 0 to 1"),
        (("--protocol", "flip", "--backend", "onnxruntime"), "--protocol is computed by torch in fp32"),
        (("--protocol", "flip", "--precision", "int8"), "leave out --backend, --precision and --calibrate"),
        (("--protocol", "5crop"), "unknown protocol '5crop'"),
        (("--sort-into", folder / "sorted"), "whose images are predicted; name a folder that is not"),
    ):
        code, _, err = predict(capsys, run, folder, *arguments)
        assert code == 2 and sentence in err, err


def test_min_score_and_sort_into(run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = resnetlab.load(run, device="cpu")
    assert isinstance(model, Model)
    best = {Path(p.name).name: p for p in model.predict(folder)}
    limit = sorted(p.score for p in best.values())[2]
    for _ in range(2):  # again changes nothing
        code, out, err = predict(
            capsys, run, folder, "--min-score", limit, "--sort-into", tmp_path / "sorted", "--json"
        )
        assert f"sorted into: {tmp_path / 'sorted'}" in err
        assert code == 0
    shown = {Path(p["image"]).name: p["top"] for p in json.loads(out)["predictions"]}
    assert all(entry["score"] >= limit for top in shown.values() for entry in top)
    assert sum(not top for top in shown.values()) == 2
    code, out, _ = predict(capsys, run, folder, "--min-score", limit, "--format", "csv", "--top", 1)
    rows = {Path(row["image"]).name: row["class"] for row in csv.DictReader(out.splitlines())}
    assert rows == {name: p.label if p.score >= limit else "unsure" for name, p in best.items()}  # none is left out
    found = {file.name: file.parent.name for file in (tmp_path / "sorted").rglob("*.png")}
    assert found == {name: p.label if p.score >= limit else "unsure" for name, p in best.items()}


def test_a_protocol_averages_views(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = resnetlab.load(run, device="cpu")
    assert isinstance(model, Model)
    one = model.predict(folder / "0.png", top=10)
    code, out, _ = predict(
        capsys, run, folder / "0.png", folder / "no.png", "--protocol", "flip", "--json", "--top", 10
    )
    missing = json.loads(out)["predictions"][1]
    flipped = {entry["class"]: entry["score"] for entry in json.loads(out)["predictions"][0]["top"]}
    assert code == 1 and "is not there" in missing["error"]
    mirrored = dict(model.predict(Image.open(folder / "0.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT), top=10).top)
    assert flipped != dict(one.top)
    if model.preprocessing.mean.ndim == 1:
        for name, score in one.top:
            assert flipped[name] == pytest.approx((score + mirrored[name]) / 2, abs=1e-4)
    assert dict(model.predict(folder / "0.png", top=10, protocol="1crop").top) == pytest.approx(dict(one.top), abs=1e-4)


def test_addresses_patterns_and_names_with_a_dash(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (folder / "0.png").rename(tmp_path / "-top.png")
    code, out, _ = predict(capsys, run, "--json", "--", "-top.png")
    assert code == 0 and json.loads(out)["predictions"][0]["image"] == "-top.png"
    code, out, _ = predict(capsys, run, f"{folder}/[12].png", "--json")
    assert [Path(p["image"]).name for p in json.loads(out)["predictions"]] == ["1.png", "2.png"]
    with FileServer({"1.png": (folder / "1.png").read_bytes()}) as server:
        code, out, _ = predict(capsys, run, f"{server.url}1.png", "--json")
        first = json.loads(out)["predictions"][0]
        assert code == 0 and first["image"] == f"{server.url}1.png" and first["top"]
        code, _, err = predict(capsys, run, f"{server.url}2.png")
        assert code == 1 and "2.png cannot be downloaded (HTTP Error 404" in err


def test_swapped_arguments_are_recognised(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, image = run / "model.safetensors", folder / "1.png"
    code, _, err = predict(capsys, image, model)
    assert code == 2 and err == f"resnetlab: the model comes first: resnetlab predict {model} {image}\n"
    assert run_command(["explain", str(image), str(model)]) == 2
    assert f"the model comes first: resnetlab explain {model} {image}" in capsys.readouterr().err
    for first in (image, folder):
        code, _, err = predict(capsys, first, run)
        assert code == 2 and err == f"resnetlab: the model comes first: resnetlab predict {run} {first}\n"
    for name, sentence in (("a.pth", "make a model file of it first: resnetlab import"), ("a.onnx", "is an export")):
        (other := tmp_path / name).write_bytes(b"PK")
        code, _, err = predict(capsys, other, image)
        assert code == 2 and f"{other} is a" in err and sentence in err
    assert run_command(["embed", str(folder), str(model)]) == 2
    assert f"the model comes first: resnetlab embed {model} {folder}" in capsys.readouterr().err
    assert run_command(["evaluate", str(folder), "--data", str(model)]) == 2
    assert f"give the model first: resnetlab evaluate {model} --data {folder}" in capsys.readouterr().err


def test_evaluate_keeps_the_page_of_other_data_and_protocols(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = run / "evaluation.html"
    command = ["evaluate", str(run), "--data", "digits", "--device", "cpu"]
    for split in ("test", "train"):
        assert run_command([*command, "--split", split]) == 0
        captured = capsys.readouterr()
        assert f"page: {page}" in captured.err
        error = float(captured.out.split("top-1 error ")[1].split()[0])
        assert f"accuracy {100 - error:.2f} %" in captured.out
        page = run / "evaluation-digits-train" / "evaluation.html"
    assert json.loads((run / "evaluation.json").read_text())["split"] == "test"
    assert json.loads((page.parent / "evaluation.json").read_text())["split"] == "train"
    assert run_command([*command, "--protocol", "10crop:16"]) == 0
    assert f"page: {run / 'evaluation-digits-test-10crop-16' / 'evaluation.html'}" in capsys.readouterr().err
    assert json.loads((run / "evaluation.json").read_text())["protocol"] == "1crop"


def test_none_of_these_below_the_models_score(
    run: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = resnetlab.load(run)
    assert isinstance(model, Model)
    best = sorted(p.score for p in model.predict(folder))
    model.calibration = {**model.calibration, "none_below": best[2], "none_share": 0.3}
    model.save(tmp_path / "m.safetensors")
    _, out, _ = predict(capsys, tmp_path / "m.safetensors", folder, "--json", "--sort-into", tmp_path / "sorted")
    found = json.loads(out)["predictions"]
    none = [p for p in found if "none_of_these" in p]
    assert len(none) == 2 and all(p["top"][0]["score"] < best[2] for p in none)
    assert sorted(f.name for f in (tmp_path / "sorted" / "none of these").iterdir()) == sorted(
        Path(p["image"]).name for p in none
    )
    rows = list(csv.DictReader(predict(capsys, tmp_path / "m.safetensors", folder, "--format", "csv")[1].splitlines()))
    assert [row["image"] for row in rows if row["class"] == "none of these"] == [p["image"] for p in none]
    assert predict(capsys, tmp_path / "m.safetensors", folder)[1].count("none of these  ") == 2
    model = resnetlab.load(tmp_path / "m.safetensors")
    assert isinstance(model, Model) and "none of these" in [p.label for p in model.predict(folder)]
    served = ServedClassifier(model)
    pixels = [served.prepare(Image.open(p["image"])) for p in found]
    assert [
        served.format(x, s, None, None).get("none_of_these")
        for x, s in zip(pixels, served.predict(pixels), strict=True)
    ] == [p.get("none_of_these") for p in found]
    figures = model.evaluate("digits").to_json()
    assert figures["none_of_these"]["below"] == best[2] and 0 < figures["none_of_these"]["share"] < 1
    assert figures["none_of_these"]["top1_error"] < figures["top1_error"]
    model.keep_classes(["0", "1", "2"])  # whose scores are others
    assert model.none_below == 0
    model.calibration = {"none_below": 2}
    model.save(tmp_path / "bad.safetensors")
    with pytest.raises(ModelFileError, match="its score for none of the classes is 2"):
        resnetlab.load(tmp_path / "bad.safetensors")
