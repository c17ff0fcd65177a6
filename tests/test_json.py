"""Every key of the JSON documents that commands write is documented."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from resnetlab.cli.main import run_command
from resnetlab.data import digits
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing

PAGE = Path(__file__).resolve().parents[1] / "docs" / "json.md"


def section(title: str) -> str:
    """The text of docs/json.md under a heading."""
    (text,) = re.findall(rf"^## {re.escape(title)}.*?\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    return str(text)


def rows(title: str) -> dict[str, str]:
    """key -> the cell beside it, in the table under a heading."""
    return {
        key: value
        for keys, value in re.findall(r"^\| (`.+?) \| (.*) \|$", section(title), re.M)
        for key in re.findall(r"`(\w+)`", keys)
    }


def words(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two models that were never trained, the first with a temperature and a least score, and an image."""
    paths = []
    for seed in (0, 1):
        net: Any = build("resnet8", classes=10, channels=1, seed=seed)
        prepared = Preprocessing(1, (8, 8), 8, torch.tensor([0.3]), torch.tensor([0.3]))
        about: dict[str, Any] = {"data": "digits", "split": "train", "n": 5, "protocol": "1crop"}
        about = about | {"none_below": 1.0, "none_share": 0.05} if seed == 0 else {}
        path = tmp_path / f"m{seed}.safetensors"
        TrainedModel(net.eval(), tuple("0123456789"), prepared, 1.5 - seed / 2, calibration=about).save(path)
        paths.append(str(path))
    Image.fromarray(digits.load_digits().test.images[0, :, :, 0].numpy()).save(tmp_path / "p.png")
    return [*paths, str(tmp_path / "p.png")]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert run_command([*arguments, "--json"]) in (0, 1)
    return json.loads(capsys.readouterr().out)


def test_evaluate(files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table = rows("`resnetlab evaluate --json`")
    evaluate = ["evaluate", "--data", "digits", "--device", "cpu"]
    one, both = run_json(capsys, *evaluate, files[0]), run_json(capsys, *evaluate, *files[:2])
    assert set(one) == set(table) - {"decode_on", "skipped", "members", "comparisons", "corruptions", "by_column"}
    assert set(both) == set(table) - {"decode_on", "skipped", "corruptions", "by_column", "none_of_these"}
    assert set(one["protocol_options"][0]) == words(table["protocol_options"]) and set(one["calibration"][0]) == words(
        table["calibration"]
    )
    assert set(one["per_class"][0]) <= words(table["per_class"]) and set(one["reliability"][0]) <= words(
        table["reliability"]
    )
    assert set(both["members"][0]) == words(table["members"])
    assert set(both["comparisons"][0]) <= words(table["comparisons"])
    assert json.loads((tmp_path / "evaluation.json").read_text()) == both
    csv = tmp_path / "rows.csv"
    assert run_command([*evaluate, files[0], "--predictions", str(csv)]) == 0
    assert set(csv.read_text().splitlines()[0].split(",")) <= words(section("`resnetlab evaluate --json`"))


def test_predict(files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    known = words(section("`resnetlab predict --json`"))
    document = run_json(capsys, "predict", files[0], files[2], str(tmp_path / "bad.png"))
    good, bad = document["predictions"]
    assert set(document) | set(good) | set(good["top"][0]) | set(bad) == known


def test_inspect(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    table = rows("`resnetlab inspect --json`")
    for what in (files[0], "resnet20"):
        document = run_json(capsys, "inspect", what)
        assert set(document) == set(table) and set(document["layers"][0]) == words(table["layers"])


def test_import_and_the_model_file(files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    known, table = words(section("`resnetlab import --json`")), rows("The metadata of a model file")
    assert run_command(["export", files[0], "--to", "torchvision", "--out", str(tmp_path / "w.safetensors")]) == 0
    document = run_json(capsys, "import", str(tmp_path / "w.safetensors"), "--out", str(tmp_path / "again.safetensors"))
    assert set(document) | set(document["preprocessing"]) == known - {
        "interpolation",
        "dtype",
    }  # where they are not the usual ones
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        about = json.loads(file.metadata()["resnetlab"])
    assert set(about) == set(table) and set(about["recipe"]) == words(table["recipe"])
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        beside = json.loads(file.metadata()["resnetlab-export"])
    tail = section("The metadata of a model file").split("`resnetlab export` writes")[1]
    assert set(beside) == words(tail.split("beside the tensors")[0]) - {"mean"}


def test_export(files: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    table, out = rows("`resnetlab export --json`"), tmp_path / "m.pt2"
    document = run_json(capsys, "export", files[0], "--to", "torch", "--images", str(tmp_path), "--out", str(out))
    assert set(document) == set(table) and set(document["batches"][0]) == words(table["batches"])
    assert set(document["bound"]) == words(table["bound"])
    beside = json.loads((tmp_path / "m.pt2.parity.json").read_text())
    assert set(beside) == set(table) - {"model", "file", "to"}
    described = json.loads((tmp_path / "m.pt2.json").read_text())
    assert set(described) <= words(section("`resnetlab export --json`"))
    assert set(described["prepare"]) | set(described["input"]) <= words(section("`resnetlab export --json`"))
