"""Feature vectors, and likely label errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import resnetlab
from images import NAMES, folder
from resnetlab.cli.main import run_command
from resnetlab.errors import DataError
from resnetlab.evaluation.label_errors import find_label_errors, out_of_fold_scores
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing


@pytest.fixture
def model(tmp_path: Path) -> Path:
    net: Any = build("resnet8", classes=3, seed=0)
    TrainedModel(net.eval(), tuple("abc"), Preprocessing(3, (16, 16), 16, torch.full((3,), 0.5), torch.ones(3))).save(
        tmp_path / "m.safetensors"
    )
    return tmp_path / "m.safetensors"


def test_features_are_the_input_of_the_head(model: Path, tmp_path: Path) -> None:
    """Of the command, in both kinds of files, and of Python; the head on them gives the scores."""
    root = folder(tmp_path / "d", {"train": 3, "val": 2})
    (root / "val" / "broken.jpg").write_bytes(b"no image")
    assert run_command(["embed", str(model), str(root), "--out", str(tmp_path / "f.npz"), "--precision", "fp32"]) == 0
    found = np.load(tmp_path / "f.npz")
    assert found["features"].shape == (15, 64) and sorted(set(found["split"])) == ["train", "val"]
    loaded: Any = resnetlab.load(str(model), device="cpu")
    for i in (0, 14):
        path = root / str(found["split"][i]) / str(found["image"][i]).removeprefix(f"{found['split'][i]}/")
        assert found["class"][i] == path.parent.name
        features = loaded.embed(str(path))
        np.testing.assert_allclose(found["features"][i], features.numpy(), rtol=1e-4, atol=1e-6)
        score = loaded.net.fc(features).detach().softmax(0).max()
        assert float(score) == pytest.approx(loaded.predict(str(path)).top[0].score, abs=1e-4)
    assert loaded.embed([str(path), str(path)]).shape == (2, 64)
    with pytest.raises(DataError, match="is not an image"):
        loaded.embed(str(root / "val" / "broken.jpg"))
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run_command(["embed", str(model), str(root / "val"), "--out", str(tmp_path / "f.parquet")]) == 0
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.num_rows == 6 and len(table["features"][0]) == 64
    assert run_command(["embed", str(model), str(root), "--out", str(tmp_path / "f.txt")]) == 2
    assert not list(tmp_path.glob(".f*"))


def test_flipped_labels_are_found() -> None:
    """Of three classes with 5 % of the labels flipped at least 80 % are found, at a precision of 80 %."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.arange(600) % 3
    features = torch.randn(600, 8, generator=draw) + 4 * torch.eye(3, 8)[truth]
    flipped = torch.randperm(600, generator=draw)[:30]
    labels = truth.clone()
    labels[flipped] = (truth[flipped] + 1) % 3
    errors = find_label_errors(out_of_fold_scores(features, labels), labels)
    found, wrong = {each.position for each in errors}, set(flipped.tolist())
    assert len(found & wrong) >= 0.8 * len(wrong) and len(found & wrong) >= 0.8 * len(found)
    right = [each for each in errors if each.position in wrong]
    assert sum(each.likely == int(truth[each.position]) for each in right) > 0.9 * len(right)
    margins = [each.given_score - each.likely_score for each in errors]
    assert margins == sorted(margins)


def test_the_confident_joint_by_hand() -> None:
    """Thresholds .8 * .7 and .8 * .575: image 2, labelled 0, reaches that of class 1; image 3, .55 for class 0, does not."""
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.55, 0.45], [0.3, 0.7]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1])
    (error,) = find_label_errors(scores, labels)
    assert error == (2, 0, 1, pytest.approx(0.3), pytest.approx(0.7))
    with pytest.raises(DataError, match="two images or more"):
        out_of_fold_scores(torch.zeros(3, 2), torch.tensor([0, 0, 1]))


def test_an_audit_writes_a_quarantine_list(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "d", {"train": 12, "val": 3})
    wrong = root / "train" / NAMES[0] / "z.jpg"
    wrong.write_bytes(next((root / "train" / NAMES[1]).iterdir()).read_bytes())
    command = ["data", "audit", str(root), "--model", str(model), "--quarantine", str(tmp_path / "q.txt")]
    assert run_command([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 46 and {row["class"] for row in found["errors"]} <= set(NAMES)
    listed = [line for line in (tmp_path / "q.txt").read_text().splitlines() if not line.startswith("#")]
    assert listed == [row["image"] for row in found["errors"]]
    assert run_command(command) == 0 and "labels of" in capsys.readouterr().out
    assert run_command([*command, "--folds", "1"]) == 2
