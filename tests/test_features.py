"""Feature vectors, and likely label errors."""

from __future__ import annotations

import json
import pickle
import re
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import resnetlab
from images import NAMES, folder
from resnetlab.cli.main import run_command
from resnetlab.data import digits
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation.label_errors import find_label_errors, find_label_errors_by_cleanlab, out_of_fold_scores
from resnetlab.inference import embed
from resnetlab.inference.audit import Audit
from resnetlab.inference.embed import EmbeddingRow, read_features, write_features
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
    with pytest.raises(UsageError, match="there is no image to embed"):
        loaded.embed([])
    with pytest.raises(DataError, match="is not an image"):
        loaded.embed(str(root / "val" / "broken.jpg"))
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run_command(["embed", str(model), str(root / "val"), "--out", str(tmp_path / "f.parquet")]) == 0
    table = parquet.read_table(tmp_path / "f.parquet")
    assert table.num_rows == 6 and len(table["features"][0]) == 64
    assert run_command(["embed", str(model), str(root), "--out", str(tmp_path / "f.txt")]) == 2
    assert not list(tmp_path.glob(".f*"))


def test_the_backend_of_features_is_chosen(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of predictions: the same lines and errors; without --backend torch computes what it always has."""
    pytest.importorskip("onnxruntime")
    root, out, others = folder(tmp_path / "d", {"train": 3, "val": 2}), tmp_path / "f.npz", tmp_path / "others"
    others.mkdir()
    draw = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), np.uint8)).save(others / f"{i}.png")

    def run(*options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = run_command(["embed", str(model), str(root), "--out", str(out), "--device", "cpu", *options])
        return code, capsys.readouterr().err

    code, err = run("--precision", "fp32")
    plain = np.load(out)
    loaded: Any = resnetlab.load(str(model), device="cpu")
    names = [str(root / s / str(n).removeprefix(f"{s}/")) for s, n in zip(plain["split"], plain["image"], strict=True)]
    assert code == 0 and "backend:" not in err and np.array_equal(plain["features"], loaded.embed(names).numpy())
    code, err = run("--backend", "onnxruntime", "--precision", "fp32")
    chosen = np.load(out)
    assert code == 0 and "backend: onnxruntime fp32 (as requested; features agree to a cosine of 1.0000" in err
    assert all(np.array_equal(plain[key], chosen[key]) for key in ("image", "split", "class"))
    np.testing.assert_allclose(chosen["features"], plain["features"], rtol=1e-4, atol=1e-5)
    code, err = run("--backend", "auto")
    assert code == 0 and "backend: torch fp32 (for 64 images or fewer building another takes longer" in err
    for wrong, sentence in (
        (("--backend", "opnvino"), "unknown backend 'opnvino'; did you mean 'openvino'?"),
        (("--precision", "fp16"), "unknown precision 'fp16'"),
        (("--backend", "onnxruntime", "--precision", "bf16"), "onnxruntime computes in fp32 or int8 here, not in bf16"),
        (("--backend", "onnxruntime", "--precision", "int8"), "--calibrate FOLDER"),
        (("--precision", "int8"), "add --backend auto"),
    ):
        code, err = run(*wrong)
        assert code == 2 and sentence in err
    assert run("--backend", "auto", "--calibrate", "nowhere")[0] == 1
    code, err = run("--backend", "onnxruntime", "--precision", "int8", "--calibrate", str(others))
    assert code == 0 and "backend: onnxruntime int8 (as requested; features agree" in err

    before = loaded.embed(names)
    loaded.select_backend("onnxruntime", "fp32")  # of scores alone
    assert torch.equal(loaded.embed(names), before)
    assert "features agree" in loaded.select_backend("onnxruntime", "fp32", images=names, output="features")
    found = loaded.embed(names)
    assert not torch.equal(found, before) and torch.allclose(found, before, rtol=1e-4, atol=1e-5)
    copied = pickle.loads(pickle.dumps(loaded))
    assert torch.equal(copied.embed(names), found) and copied.backend_name == "onnxruntime fp32"
    assert torch.equal(copied.to("cpu").embed(names), before)


def test_flipped_labels_are_found() -> None:
    """Of three classes with 5 % of the labels flipped at least 80 % are found, at a precision of 80 %."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.arange(600) % 3
    features = torch.randn(600, 8, generator=draw) + 4 * torch.eye(3, 8)[truth]
    flipped = torch.randperm(600, generator=draw)[:30]
    labels = truth.clone()
    labels[flipped] = (truth[flipped] + 1) % 3
    errors = find_label_errors(out_of_fold_scores(features, labels), labels)
    found, wrong = {each.position for each in errors}, set((labels != truth).nonzero().flatten().tolist())
    assert len(found & wrong) >= 0.8 * len(wrong) and len(found & wrong) >= 0.8 * len(found)
    right = [each for each in errors if each.position in wrong]
    assert sum(each.likely == int(truth[each.position]) for each in right) > 0.9 * len(right)
    margins = [each.given_score - each.likely_score for each in errors]
    assert margins == sorted(margins)


def test_the_confident_joint_by_hand() -> None:
    """Thresholds .7 and .575: image 2, labelled 0, reaches that of class 1; image 3, .55 for class 0, does not.

    Of the label 0 one of three confident predictions is wrong, of three images; of the label 1 none of one: one error.
    """
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.3, 0.7], [0.55, 0.45], [0.3, 0.7]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0, 1, 1])
    (error,) = find_label_errors(scores, labels)
    assert error == (2, 0, 1, pytest.approx(0.3), pytest.approx(0.7))
    with pytest.raises(DataError, match="two images or more"):
        out_of_fold_scores(torch.zeros(3, 2), torch.tensor([0, 0, 1]))


def test_an_image_whose_label_is_clearly_less_likely_is_listed() -> None:
    """Image 2 is not confident (thresholds .67 and .84), but its scores are .6 apart; those of image 3 are .2 apart."""
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4], *[[0.05, 0.95]] * 4]).double()
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    assert [each.position for each in find_label_errors(scores, labels)] == [2]


def test_an_audit_writes_a_quarantine_list(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "d", {"train": 12, "val": 3})
    wrong = root / "train" / NAMES[0] / "z.jpg"
    wrong.write_bytes(next((root / "train" / NAMES[1]).iterdir()).read_bytes())
    command = ["data", "audit", str(root), "--model", str(model), "--quarantine", str(tmp_path / "q.txt")]
    command += ["--out", str(tmp_path / "audit.html")]
    assert run_command([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 46 and {row["class"] for row in found["errors"]} <= set(NAMES)
    text = (tmp_path / "audit.html").read_text()
    assert text.count('<img src="data:image/') == len(found["errors"]) > 0 and all(
        r["image"] in text for r in found["errors"]
    )
    listed = [line for line in (tmp_path / "q.txt").read_text().splitlines() if not line.startswith("#")]
    assert listed == [row["image"] for row in found["errors"]]
    assert run_command(command) == 0
    out, err = capsys.readouterr()
    doubt = "are taken for another class, so many of these labels may be right"
    assert "labels of" in out and (doubt in err) == (doubt in text) == (found["out_of_fold_error"] > 0.2)
    assert run_command([*command, "--folds", "1"]) == 2


def test_an_audit_by_folds_predicts_each_image_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the network whose run held it out; what no run held out is said, and so are other data."""
    root, runs, scores = folder(tmp_path / "d", {"": 4}), tmp_path / "runs", dict[str, Any]()
    names = [f"{name}/bild {i}.jpg" for name in NAMES for i in range(4)]
    for number, held_out in enumerate((names[::2], names[1:-1:2])):
        (runs / f"fold-{number}").mkdir(parents=True)
        (runs / f"fold-{number}" / "holdout.json").write_text(json.dumps({"held-out": [*held_out, "alpha/gone.jpg"]}))
        net: Any = build("resnet8", classes=3, seed=number)
        half = torch.full((3,), 0.5)
        trained = TrainedModel(net.eval(), NAMES[::-1], Preprocessing(3, (16, 16), 16, half, half))
        trained.save(runs / f"fold-{number}" / "model.safetensors")
        loaded: Any = resnetlab.load(str(runs / f"fold-{number}"), device="cpu")
        scores |= {name: {each.label: each.score for each in loaded.predict(str(root / name)).top} for name in held_out}
    (runs / "folds.json").write_text(json.dumps({"runs": [{"run": f"elsewhere/fold-{number}"} for number in range(2)]}))
    command = ["data", "audit", str(root), "--model", str(runs), "--json"]
    assert run_command(command) == 0
    out, err = capsys.readouterr()
    assert f"1 image of {root} that no fold of {runs} held out: not audited" in err and "images 11/11" in err
    found = json.loads(out)
    best = {name: max(each, key=lambda label: each[label]) for name, each in scores.items()}
    assert found["n"] == 11 and found["folds"] == 2
    assert found["out_of_fold_error"] == pytest.approx(sum(best[n] != n.split("/")[0] for n in scores) / 11)
    for each in found["errors"]:
        expected = scores[each["image"]]
        assert each["likely"] == best[each["image"]] and each["class"] == each["image"].split("/")[0]
        assert each["likely_score"] == pytest.approx(expected[each["likely"]], abs=1e-2)
        assert each["score"] == pytest.approx(expected[each["class"]], abs=1e-2)
    held_out = runs / "fold-0" / "holdout.json"
    content = held_out.read_text()
    held_out.unlink()
    assert run_command(command) == 1 and "does not say which images it held out" in capsys.readouterr().err
    held_out.write_text(content)
    assert run_command([*command, "--seed", "0"]) == run_command([*command, "--folds", "5"]) == 2
    assert "has folds of its own; leave out --folds and --seed" in capsys.readouterr().err
    other = folder(tmp_path / "other", {"": 4}, ("a", "b", "c"))
    assert run_command(["data", "audit", str(other), "--model", str(runs)]) == 1
    assert "was trained on other classes than those of" in capsys.readouterr().err


def test_an_audit_says_when_its_features_cannot_tell() -> None:
    values: dict[str, Any] = {"data": "d", "n": 10, "folds": 5, "method": "resnetlab", "errors": [], "unreadable": {}}
    assert Audit(out_of_fold_error=0.2, **values).describe_doubt() == ""
    assert "40.00 % of the images are taken" in Audit(out_of_fold_error=0.4, **values).describe_doubt()


def test_neighbours_are_those_of_an_exact_search(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "d", {"train": 4, "val": 2})
    broken = root / "val" / NAMES[0] / "broken.jpg"
    broken.write_bytes(b"no image")
    query, page = root / "val" / NAMES[1] / "bild 0.jpg", tmp_path / "page.html"
    command = ["neighbours", str(model), str(root), str(query), "--top", "4", "--precision", "fp32"]
    assert run_command([*command, str(broken), "--json", "--out", str(page)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["n"] == 18 and err.count("broken.jpg is left out") == 2  # of what is searched, and of the given ones
    assert [each["image"] for each in found["images"]] == [str(query)]
    assert f"{query} is in {root}, and is left out of its neighbours" in err
    near = found["images"][0]["neighbours"]
    loaded: Any = resnetlab.load(str(model), device="cpu")
    files = sorted(f for f in root.rglob("bild*.jpg"))
    features = loaded.embed([str(f) for f in files])
    exact = torch.cosine_similarity(features, loaded.embed(str(query))[None])
    assert int(exact.argmax()) == files.index(query)
    for each, i in zip(near, exact.argsort(descending=True)[1:5].tolist(), strict=True):
        assert each["similarity"] == pytest.approx(float(exact[i]), abs=1e-5)
        assert float(exact[files.index(root / each["image"])]) == pytest.approx(float(exact[i]), abs=1e-5)
        assert each["class"] == (root / each["image"]).parent.name and each["split"] in ("train", "val")
    text = page.read_text()
    assert text.count('<img src="data:image/') == 5 and all(each["image"] in text for each in near)
    assert run_command(command) == 0 and "similarity" in capsys.readouterr().out
    assert run_command(command[:3]) == 2 and "name the images" in capsys.readouterr().err
    assert run_command([*command[:3], str(broken)]) == 1
    assert "none of the images to find similar ones of can be read" in capsys.readouterr().err
    (tmp_path / "other.jpg").write_bytes(query.read_bytes())  # a copy under another name is a neighbour
    assert run_command([*command[:3], str(tmp_path / "other.jpg"), "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["images"][0]["neighbours"][0]
    assert first["image"] == str(query.relative_to(root)) and first["similarity"] == pytest.approx(1, abs=1e-3)
    assert run_command([*command, "--out", str(tmp_path / "page.txt")]) == 2
    bare = tmp_path / "bare"  # images without classes
    bare.mkdir()
    for i, file in enumerate(files[:3]):
        (bare / f"{i}.jpg").write_bytes(file.read_bytes())
    assert run_command(["neighbours", str(model), str(bare), str(bare / "1.jpg"), "--json", "--out", str(page)]) == 0
    near = json.loads(capsys.readouterr().out)["images"][0]["neighbours"]
    assert {each["image"] for each in near} == {str(bare / "0.jpg"), str(bare / "2.jpg")}
    assert page.read_text().count('<img src="data:image/') == 3


def test_cleanlab_as_the_method(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """cleanlab finds flipped labels too; its likely class is the best of the others."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    features = torch.randn(300, 8, generator=draw) + 4 * torch.eye(3, 8)[truth]
    labels = torch.where(torch.arange(300) < 15, (truth + 1) % 3, truth)
    errors = find_label_errors_by_cleanlab(out_of_fold_scores(features, labels), labels)
    found = {each.position for each in errors}
    assert len(found & set(range(15))) >= 12 and len(found) <= 18
    assert all(each.given == int(labels[each.position]) != each.likely for each in errors)
    root = folder(tmp_path / "d", {"train": 12, "val": 3})
    command = ["data", "audit", str(root), "--model", str(model), "--json"]
    assert run_command([*command, "--method", "cleanlab"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "cleanlab"


@pytest.mark.parametrize("name", ["features.npz", "features.parquet"])
def test_neighbours_in_a_file_of_features(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same as in the data themselves; a file of another model, a damaged one and a packed one are refused."""
    root = folder(tmp_path / "d", {"train": 4, "val": 2})
    query, file = str(root / "val" / NAMES[1] / "bild 0.jpg"), tmp_path / name
    assert run_command(["embed", str(model), str(root), "--out", str(file), "--precision", "fp32"]) == 0
    answers = []
    for data in (str(root), str(file)):
        capsys.readouterr()
        assert run_command(["neighbours", str(model), data, query, "--json", "--precision", "fp32"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0] == answers[1]
    command = ["neighbours", str(model), str(file), query, "--out", str(tmp_path / "n.html")]
    assert run_command(command) == 0 and (tmp_path / "n.html").read_text().count('<img src="data:image/') == 1
    assert re.search(
        r"\d+ images of the page cannot be read, such as .*; give the data themselves", capsys.readouterr().err
    )
    rows = [row._replace(features=torch.zeros(3)) for row in read_features(file)]
    write_features(file, iter(rows))
    capsys.readouterr()
    assert run_command(command) == 1 and "embed them with the same model" in capsys.readouterr().err
    if name.endswith(".npz"):
        np.savez_compressed(file, features=np.zeros((2, 3), np.float32))
        assert run_command(command) == 1 and "its records are packed" in capsys.readouterr().err
        file.write_bytes(b"no archive")
        assert run_command(command) == 1 and "is no file that embed wrote" in capsys.readouterr().err


def test_heads_are_fitted_without_the_suspects_of_a_first_round() -> None:
    """Labels that are wrong together lower no score of the right class; a class without any trusted image stays."""
    draw = torch.Generator().manual_seed(0)
    truth = torch.arange(400) % 2
    features = torch.randn(400, 20, generator=draw) + 3 * torch.eye(2, 20)[truth]
    labels = truth.clone()
    labels[:80:4] = 1
    errors = find_label_errors(out_of_fold_scores(features, labels), labels)
    assert len(set(range(0, 80, 4)) & {each.position for each in errors}) >= 17  # 15 by heads that are fitted once
    assert len(errors) <= 25  # some images resemble the other class more, whatever their label
    labels[100:110:2] = 2
    assert out_of_fold_scores(features, labels).shape == (400, 3)


def flip_digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """All digits, their labels, and labels of which 90 (5 %) are wrong."""
    data = digits.load_digits()
    images, truth = (torch.cat([data.train.images, data.test.images]), torch.cat([data.train.labels, data.test.labels]))
    draw = torch.Generator().manual_seed(seed)
    flipped = torch.randperm(len(truth), generator=draw)[:90]
    labels = truth.clone()
    labels[flipped] = (truth[flipped] + torch.randint(1, 10, (90,), generator=draw)) % 10
    return images, truth, labels


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_flipped_labels_of_the_digits_are_found(seed: int) -> None:
    """Of 5 % of the digits' labels at least 80 % are found at a precision of 80 %, here on pixels in place of features."""
    pixels, truth, labels = flip_digits(seed)
    errors = find_label_errors(out_of_fold_scores(pixels.float().flatten(1) / 16, labels), labels)
    found, wrong = {each.position for each in errors}, set((labels != truth).nonzero().flatten().tolist())
    assert len(found & wrong) >= 0.8 * len(wrong) and len(found & wrong) >= 0.8 * len(found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_command_finds_flipped_labels_of_the_digits(
    seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of 5 % of the labels at least 80 % at a precision of 80 %, by the networks of a cross-validation on these labels."""
    images, truth, labels = flip_digits(seed)
    flipped = (labels != truth).nonzero().flatten()
    root, runs = tmp_path / "digits", tmp_path / "runs"
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        (root / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0].numpy()).save(root / str(label) / f"im{i:04d}.png")
    train = ["train", str(root), "--recipe", "quick", "--steps", "300", "--folds", "5", "--out", str(runs)]
    assert run_command(train) == 0
    capsys.readouterr()
    assert run_command(["data", "audit", str(root), "--model", str(runs), "--json"]) == 0
    likely = {int(Path(e["image"]).stem[2:]): int(e["likely"]) for e in json.loads(capsys.readouterr().out)["errors"]}
    right = set(likely) & set(flipped.tolist())
    assert len(right) >= 0.8 * 90 and len(right) >= 0.8 * len(likely)
    assert sum(likely[i] == int(truth[i]) for i in right) >= 0.9 * len(right)


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_features_are_written_as_they_come(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "PART", 2)
    alive: list[weakref.ref[torch.Tensor]] = []

    def rows() -> Iterator[EmbeddingRow]:
        for i in range(12):
            features = torch.full((3,), float(i))
            alive.append(weakref.ref(features))
            yield EmbeddingRow(f"{i}.png", "train", "a", features)
            del features
            assert sum(each() is not None for each in alive) <= 4

    assert write_features(tmp_path / f"f{suffix}", rows()) == (12, {})
    found = list(read_features(tmp_path / f"f{suffix}"))
    assert [(row.image, row.split, row.label) for row in found] == [(f"{i}.png", "train", "a") for i in range(12)]
    assert [row.features.tolist() for row in found if row.features is not None] == [[i] * 3 for i in range(12)]
