"""Calibration, ensembles, comparisons, published figures, per-image results and the page of an evaluation."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import resnetlab
from images import NAMES as NAMES_ON_DISK
from images import folder
from resnetlab.cli.main import run_command
from resnetlab.data import digits, disk_split, imagenet
from resnetlab.data.dataset import MemorySplit
from resnetlab.device import select_device
from resnetlab.errors import DataError, UsageError, install_hint
from resnetlab.evaluation import scores, split_selection
from resnetlab.evaluation.calibration import fit_temperature, reliability_bins
from resnetlab.evaluation.comparison import compare_models
from resnetlab.evaluation.evaluate import evaluate
from resnetlab.evaluation.figures import class_prototypes, find_mistakes
from resnetlab.evaluation.metrics import ClassificationMetrics, evaluate_errors, evaluate_network
from resnetlab.evaluation.page import render_evaluation
from resnetlab.evaluation.predictions import tabulate_predictions, write_predictions
from resnetlab.evaluation.protocols import parse_protocol
from resnetlab.evaluation.published import find_published
from resnetlab.evaluation.scores import ScoreSummary, average_scores
from resnetlab.formatting import format_json
from resnetlab.inference.classes import top_classes
from resnetlab.inference.inference_module import InferenceModule
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.resnet import ResNet, build
from resnetlab.models.spec import get_specification
from resnetlab.peer_words import EVALUATION_ATTRIBUTES
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.run_options import RunOptions
from resnetlab.training.train import start_run
from tiny_runs import tiny

NAMES = tuple("0123456789")
GREY = Preprocessing(1, (8, 8), 8, torch.tensor([0.3]), torch.tensor([0.3]))


def model(
    seed: int, classes: tuple[str, ...] = NAMES, preprocessing: Preprocessing = GREY, temperature: float = 1.0
) -> TrainedModel:
    net: Any = build("resnet8", classes=len(classes), channels=1, seed=seed)
    net.fc.weight.data.mul_(4)
    return TrainedModel(net.eval(), classes, preprocessing, temperature=temperature)


def test_a_runs_evaluation_has_the_threads_of_a_later_one() -> None:
    """Those inside an operation decide the last bits: in bf16 a run ended with 0.466 mAP, and `evaluate` showed 0.467."""
    config = select_device("fp32", "cpu", 2)
    before = torch.get_num_threads()
    for in_run in (replace(config, op_threads=2), config):
        with in_run.side_by_side_map(8) as evaluate_all:
            assert set(evaluate_all(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == before


def sample_logits(n: int, classes: int, temperature: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of a network that is right as often as softmax(logits / temperature) predicts."""
    draw = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, classes, generator=draw, dtype=torch.float64)
    return z, torch.multinomial((z / temperature).softmax(1), 1, generator=draw).flatten()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_the_temperature_is_found(temperature: float) -> None:
    z, labels = sample_logits(20_000, 5, temperature)
    assert fit_temperature(z, labels) == pytest.approx(temperature, rel=0.05)


def test_the_temperature_has_the_least_cross_entropy() -> None:
    z, labels = sample_logits(5_000, 4, 1.7)
    found = fit_temperature(z, labels)
    loss = lambda t: float(torch.nn.functional.cross_entropy(z / t, labels))  # noqa: E731
    assert loss(found) < min(loss(found * 1.03), loss(found / 1.03))


def test_all_correct_images_do_not_make_scores_certain() -> None:
    """Without pseudo-counts a lower temperature were always better; they bound scores by (N + 1) / (N + 2)."""
    z = 5 * torch.eye(3, dtype=torch.float64).repeat(20, 1)
    labels = torch.arange(3).repeat(20)
    scores = (z / fit_temperature(z, labels)).softmax(1)
    assert float(scores.max()) == pytest.approx(61 / 62, abs=1e-6)


@given(st.integers(1, 200), st.integers(2, 6), st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_reliability_bins_give_the_calibration_error(n: int, classes: int, seed: int) -> None:
    z, labels = sample_logits(n, classes, 2.0, seed)
    evaluated = ClassificationMetrics.from_scores(tuple(map(str, range(classes))), z.softmax(1).float(), labels)
    bins = [b for b in reliability_bins(evaluated.confidence, evaluated.right) if b.n]
    assert sum(b.n for b in bins) == n
    error = sum(b.n * abs((b.accuracy or 0) - (b.confidence or 0)) for b in bins) / n
    assert evaluated.calibration_error == pytest.approx(error, abs=1e-6)
    assert all(b.low < (b.confidence or 0) + 1e-6 and (b.confidence or 0) <= b.high + 1e-6 for b in bins)


def evaluated(wrong: list[int], n: int = 40) -> ClassificationMetrics:
    labels = torch.zeros(n, dtype=torch.long)
    scores = torch.tensor([[0.2, 0.8] if i in wrong else [0.8, 0.2] for i in range(n)])
    return ClassificationMetrics.from_scores(("a", "b"), scores, labels)


def test_mcnemar_is_a_binomial_test_on_the_images_that_differ() -> None:
    found = compare_models(evaluated([0, 1, 2, 3, 4, 5, 6, 7, 20]), evaluated([8, 20]), "a", "b")
    assert (found.only_a_wrong, found.only_b_wrong, found.difference) == (8, 1, 7 / 40)
    assert found.p_value == pytest.approx(2 * (comb(9, 0) + comb(9, 1)) / 2**9)  # by hand: 9 tosses, 1 or fewer
    assert found.interval[0] < 7 / 40 < found.interval[1] and found.interval[0] > 0
    assert found.interval[1] - found.interval[0] == pytest.approx(
        2 * 1.96 * (((9 / 40) - (7 / 40) ** 2) / 40) ** 0.5, rel=0.15
    )
    same = compare_models(evaluated([3]), evaluated([3]), "a", "b")
    assert (same.p_value, same.difference, same.interval) == (1.0, 0.0, (0.0, 0.0))


@given(n=st.integers(1, 60), classes=st.integers(2, 12), ties=st.booleans(), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_summary_of_scores_has_the_same_figures(n: int, classes: int, ties: bool, seed: int) -> None:
    """Made batch after batch, of two members and their ensemble, with a temperature or without; the scores are not kept."""
    draw = torch.Generator().manual_seed(seed)
    names, labels = tuple(map(str, range(classes))), torch.randint(classes, (n,), generator=draw)
    logits = [3 * torch.randn(n, classes, generator=draw) for _ in range(2)]
    scores = [(x.round() if ties else x).softmax(1) for x in logits]
    for weights, temperature in (((1.0,), None), ((1.0,), 1.7), ((0.75, 0.25), None)):
        used = scores[: len(weights)]
        summary, batch = ScoreSummary(labels, weights, temperature), 1 + seed % 7
        parts = [
            summary([each[i : i + batch] for each in used], list(range(n))[i : i + batch]) for i in range(0, n, batch)
        ]
        found = [ClassificationMetrics(names, torch.cat(rows), labels) for rows in zip(*parts, strict=True)]
        whole = [*used, average_scores(used, weights)] if len(weights) > 1 else used
        for ours, each in zip(found, whole, strict=True):
            expected = ClassificationMetrics.from_scores(names, each, labels)
            if temperature is not None:
                expected = expected.with_temperature(temperature)
            assert ours.to_json() == expected.to_json() and torch.equal(ours.ranks, expected.ranks)
            assert tabulate_predictions(ours, names) == tabulate_predictions(expected, names)
            assert find_mistakes(ours, 5) == find_mistakes(expected, 5)
            assert torch.equal(expected.predicted, each.argmax(1)) or temperature is not None
            assert ours.with_none_below(0.5) == expected.with_none_below(0.5)
            assert torch.equal(expected.confidence, expected.scores.max(1).values)


def test_many_scores_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are those of kept ones; without them a page has no typical images."""
    members, test = [model(0), model(1, tuple(reversed(NAMES)))], digits.load_digits().test
    config = select_device("fp32", "cpu")

    def measure() -> list[Any]:
        alone = [evaluate(each, "digits", device="cpu", precision="fp32") for each in (members[0], members)]
        final = evaluate_network(members[0].net, test, GREY, NAMES, config, 1.3)
        assert evaluate_network(members[0].net, test, GREY, NAMES, config).scores.shape == (len(test), 10)  # to fit on
        assert [each.metrics.all_scores is None for each in alone] == [final.all_scores is None] * 2
        return [*(each.to_json() for each in alone), final.to_json()], alone[0], final

    (kept, evaluation, _), limit = measure(), len(test) * 10
    assert class_prototypes(evaluation.metrics, test.images)
    monkeypatch.setattr(scores, "MAX_SCORES", limit - 1)
    summarised, evaluation, final = measure()
    assert summarised == kept and final.summary.shape == (len(test), 4)
    assert class_prototypes(evaluation.metrics, test.images) == []
    assert "Typical images" not in render_evaluation(evaluation)
    with pytest.raises(UsageError, match=r"360 images have more scores of 10 classes than are kept"):
        _ = evaluation.metrics.scores
    monkeypatch.setattr(scores, "MAX_SCORES", limit)
    assert measure()[1].metrics.all_scores is not None


def test_an_ensemble_is_the_weighted_mean_of_scores_matched_by_name() -> None:
    turned = tuple(reversed(NAMES))
    other = Preprocessing(1, (12, 12), 14, torch.tensor([0.5]), torch.tensor([0.2]))
    members = [model(0, temperature=2.0), model(1, turned, other)]
    both = evaluate(members, "digits", weights=[3, 1], device="cpu", precision="fp32")
    alone = [evaluate(each, "digits", device="cpu", precision="fp32").metrics for each in members]
    assert alone[1].classes == turned and both.metrics.classes == NAMES
    expected = 0.75 * alone[0].scores + 0.25 * alone[1].scores.flip(1)
    torch.testing.assert_close(both.metrics.scores, expected, rtol=1e-5, atol=1e-6)
    assert [m.top1_error for m in both.members] == [j.top1_error for j in alone]
    for ours in EVALUATION_ATTRIBUTES.values():  # what is said in place of other programs' attributes is there
        assert (
            "pandas" in ours
            or "command" in ours
            or eval(ours if "result" in ours else f"result.{ours}", {"result": both}) is not None
        )
    document = both.to_json()
    assert [(m["model"], m["weight"]) for m in document["members"]] == [("model 1", 0.75), ("model 2", 0.25)]
    assert [(c["a"], c["b"]) for c in document["comparisons"]] == [
        ("model 1", "model 2"), ("model 1", "ensemble"), ("model 2", "ensemble")]  # fmt: skip
    assert document["temperature"] == [2.0, 1.0]


def test_members_share_one_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image file is decoded once, though the two models see it at other sizes and the third with another mean."""
    root = folder(tmp_path / "d", {"train": 2, "val": 5})
    classes = tuple(sorted(NAMES_ON_DISK))
    prepared = [(16, 20, 0.5), (24, 24, 0.5), (16, 20, 0.1)]
    members = []
    for seed, (size, resize, mean) in enumerate(prepared):
        net: Any = build("resnet8", classes=3, seed=seed)
        preprocessing = Preprocessing(3, (size, size), resize, torch.full((3,), mean), torch.ones(3))
        members.append(TrainedModel(net.eval(), classes, preprocessing))
    decoded: list[str] = []
    decode = disk_split.decode_as
    monkeypatch.setattr(
        disk_split, "decode_as", lambda data, name, form: (decoded.append(name), decode(data, name, form))[1]
    )
    evaluate(members, str(root), device="cpu", precision="fp32")
    assert len(decoded) == 15 and len(set(decoded)) == 15


def test_few_large_images_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded, and the scores are those of all images read together."""
    from resnetlab.evaluation import scores as evaluating

    test, engine = digits.load_digits().test, select_device("fp32", "cpu")
    asked: list[int] = []
    score_images = evaluating.score_images

    def score(member: Any, images: list[Tensor], *rest: Any) -> Tensor:
        asked.append(len(images))
        return score_images(member, images, *rest)

    monkeypatch.setattr(evaluating, "score_images", score)
    member = evaluating.Member.from_network(model(0).net, GREY, engine)
    (together,) = evaluating.predict_scores([member], test, engine)
    assert max(asked) > 100
    asked.clear()
    monkeypatch.setattr(evaluating, "READ_BYTES", 64 * 3)  # a digit has 64 bytes
    (apart,) = evaluating.predict_scores([member], test, engine)
    assert max(asked) == 8 and asked.count(3) > 90  # the first of each batch tell how large images are
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("members", "weights", "error", "sentence"), [
    (["0123456789", "012345678x"], None, DataError, "the members of an ensemble name different classes: only in model 2 x"),
    (["0123456789"] * 2, [1.0], UsageError, "weights are 2 numbers above 0, one for each model, not 1.0"),
    (["0123456789"] * 2, [1.0, -1.0], UsageError, "weights are 2 numbers above 0"),
    (["0123456789"] * 2, 0.5, UsageError, "weights are 2 numbers above 0, one for each model, not 0.5"),
    ([], None, UsageError, "evaluate needs at least one model"),
])  # fmt: skip
def test_invalid_ensembles_are_refused(members: list[str], weights: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        evaluate([model(i, tuple(names)) for i, names in enumerate(members)], "digits", weights=weights, device="cpu")
    with pytest.raises(UsageError, match="names are 1, one for each model, not 2"):
        evaluate(model(0), "digits", names=["a", "b"], device="cpu")


@pytest.mark.parametrize(("labels", "sentence"), [([-1, 0], "have no labels"), ([], "there is no image to evaluate")])
def test_a_split_without_labels_or_images(labels: list[int], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from resnetlab.data import sources

    data = digits.load_digits()
    n = len(labels)
    object.__setattr__(data, "test", MemorySplit(data.test.images[:n], torch.tensor(labels, dtype=torch.long)))
    monkeypatch.setattr(sources, "load_dataset", lambda *_: data)
    with pytest.raises(DataError, match=sentence):
        evaluate(model(0), "digits", device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model file of a short run on the digits."""
    out = tmp_path_factory.mktemp("trained") / "run"
    changes: dict[str, Any] = {"net": "resnet8", "steps": 60, "image_size": 8, "normalise": "per-pixel mean"}
    return Path(resnetlab.train(data="digits", out=out, device="cpu", precision="fp32", **changes).model)


def test_training_fits_a_temperature_and_predictions_are_calibrated(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = resnetlab.load(trained, device="cpu")
    assert kept.temperature != 1.0
    assert kept.calibration == {
        "data": "digits",
        "split": "held_out",
        "n": kept.metrics["held_out"]["n"],
        "protocol": "1crop",
    }
    data = digits.load_digits()
    found = evaluate_network(kept.net, data.test, kept.preprocessing, kept.classes, select_device("fp32", "cpu"))
    assert kept.metrics["test"]["loss"] == pytest.approx(found.with_temperature(kept.temperature).loss, rel=1e-4)
    assert kept.metrics["test"]["loss"] != pytest.approx(found.loss, rel=1e-4)
    with monkeypatch.context() as patch:  # without the scores of all classes in memory, the same figures
        patch.setattr(ClassificationMetrics, "from_scores", lambda *_: pytest.fail("scores of all classes were kept"))
        figures = evaluate_errors(kept.net, data.test, kept.preprocessing, select_device("fp32", "cpu"))
    assert figures == {"top1_error": found.top1_error, "loss": found.loss}
    again = evaluate(kept, "digits", device="cpu", precision="fp32")
    assert again.metrics.loss == pytest.approx(kept.metrics["test"]["loss"], rel=1e-4)
    first = kept.predict(Image.fromarray(data.test.images[0, :, :, 0].numpy()), top=1)
    assert kept.predict(data.test.images[0, :, :, 0].numpy(), top=1) == first
    assert first.top[0][1] == pytest.approx(float(again.metrics.scores[0].max()), abs=1e-5)


IMAGENET = tuple(imagenet.imagenet_class_names().values())
SEEN = {"size": (224, 224), "resize": 256}


@pytest.mark.parametrize(("name", "changes", "asked", "error"), [
    ("resnet20", {}, {}, 0.0875),
    ("resnet20", {"zero_pad": "centre"}, {}, 0.0875),  # the paper does not say where they stand
    ("preresnet164", {}, {}, 0.0546),
    ("resnet20", {"shortcut": "B"}, {}, None),
    ("resnet20", {}, {"protocol": "flip"}, None),
    ("resnet20", {}, {"data": "digits"}, None),
    ("resnet20", {}, {"split": "train"}, None),
    ("resnet20", {}, {"n": 9_000}, None),  # some were set aside
    ("resnet50", {}, {"data": "imagenet", "protocol": "10crop"}, 0.2285),
    ("resnet50", {}, {"data": "/any/folder", "split": "val", "protocol": "10crop"}, 0.2285),
    ("resnet50", {}, {"data": "imagenet", "protocol": "multiscale:224,256,384,480,640"}, 0.2074),
    ("resnet34", {"shortcut": "C"}, {"data": "imagenet", "protocol": "10crop"}, 0.2419),
    ("resnet50v1.5", {}, {"data": "imagenet", "protocol": "10crop"}, None),
    ("resnet50", {}, {"data": "imagenet", "protocol": "10crop", "split": "train"}, None),
    ("resnet50", {}, {"data": "imagenet", "protocol": "10crop", "n": 10_000}, None),
    ("resnet50", {}, {"data": "imagenet", "protocol": "10crop", "resize": 288}, None),
    ("resnet50", {}, {"data": "imagenet", "protocol": "10crop", "size": (288, 288), "resize": 320}, None),
    ("resnet50", {}, {"data": "mine", "protocol": "10crop", "classes": tuple(map(str, range(1000)))}, None),
])  # fmt: skip
def test_published_figures(name: str, changes: dict[str, Any], asked: dict[str, Any], error: float | None) -> None:
    with torch.device("meta"):
        net = ResNet(get_specification(name, **changes))
    usual = {"data": "cifar10", "split": "test", "protocol": "1crop", "size": (32, 32), "resize": 32, "n": 10_000,
             "classes": ()}  # fmt: skip
    if net.spec.stem == "imagenet":
        usual |= {"n": 50_000, "classes": IMAGENET, **SEEN}
    a = usual | asked
    prepared = Preprocessing(3, a["size"], a["resize"], torch.zeros(3), torch.ones(3))
    found = find_published(
        TrainedModel(net, a["classes"], prepared), a["data"], a["split"], parse_protocol(a["protocol"]), a["n"]
    )
    assert (found.top1_error if found else None) == error


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({}, "2015 Table 6, 64,000 steps on all 50,000 images"),
        ({"steps": 64_000}, "2015 Table 6, 64,000 steps on all 50,000 images"),
        ({"steps": 7820}, "2015 Table 6, 64,000 steps on all 50,000 images; this model 7,820"),
    ],
)
def test_a_printed_error_says_after_how_many_steps(recipe: dict[str, Any], said: str) -> None:
    prepared = Preprocessing(3, (32, 32), 32, torch.zeros(3), torch.ones(3))
    trained = TrainedModel(build("resnet20", classes=10), NAMES, prepared, recipe=recipe)
    found = find_published(trained, "cifar10", "test", parse_protocol("1crop"), 10_000)
    assert found is not None and found.source == said


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model(0).save(tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_the_command_writes_figures_a_page_and_a_table(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model(1).save(tmp_path / "other.safetensors")
    out, rows = tmp_path / "out", tmp_path / "rows.csv"
    arguments = [
        "evaluate",
        str(file),
        str(tmp_path / "other.safetensors"),
        "--data",
        "digits",
        "--device",
        "cpu",
        "--protocol",
        "flip",
    ]
    assert run_command([*arguments, "--out", str(out), "--predictions", str(rows), "--weights", "2,1", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert json.loads((out / "evaluation.json").read_text()) == document and document["protocol"] == "1crop+flip"
    page = (out / "evaluation.html").read_text()
    mistakes, typical = page.split('id="prototypes">Typical images')
    assert mistakes.count('<img src="data:image/png;base64,') == 24 and 0 < typical.count("<img src=") <= 10
    assert "Reliability diagram" in page and "McNemar" in page
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    with open(rows) as lines:
        table = list(csv.DictReader(lines))
    assert len(table) == 360 and sum(row["right"] == "False" for row in table) == round(document["top1_error"] * 360)
    assert (
        all((row["rank"] == "1") == (row["right"] == "True") for row in table)
        and len({row["image"] for row in table}) == 360
    )
    assert run_command([*arguments, "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert "the ensemble" in output and "p (McNemar)" in output and "1crop+flip" in output


def test_one_model_has_a_page_beside_it(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", str(file), "--data", "digits", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    page = (file.parent / "evaluation.html").read_text()
    assert "1crop" in out and "evaluation.html" in err and "McNemar" not in page and "How it was measured" in page
    assert run_command(["evaluate", str(file), "--data", "digits", "--device", "cpu", "--out", str(file)]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_parquet_holds_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyarrow import parquet

    found = evaluated([1, 5])
    for suffix in (".csv", ".parquet"):
        write_predictions(tmp_path / f"rows{suffix}", found, [f"p{i}" for i in range(40)])
    rows = parquet.read_table(tmp_path / "rows.parquet").to_pylist()
    with open(tmp_path / "rows.csv") as lines:
        assert [row["image"] for row in csv.DictReader(lines)] == [row["image"] for row in rows]
    assert [i for i, row in enumerate(rows) if not row["right"]] == [1, 5] and rows[1]["rank"] == 2
    with pytest.raises(UsageError, match=r"ends in .csv or .parquet"):
        write_predictions(tmp_path / "rows.xlsx", found, [])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UsageError, match=re.escape(install_hint("parquet"))):
        write_predictions(tmp_path / "rows.parquet", found, [])


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--protocol", "10crop:4"], "the model sees 8 pixels on a side, but an image with its shorter side at 4 has fewer"),
    (["--protocol", "11crop"], "unknown protocol '11crop'; did you mean"),
    (["--weights", "a,b"], "--weights takes comma-separated numbers"),
    (["--predictions", "rows.xlsx"], "ends in .csv or .parquet"),
])  # fmt: skip
def test_wrong_requests(arguments: list[str], sentence: str, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", str(file), "--data", "digits", *arguments]) == 2
    assert sentence in capsys.readouterr().err and [p.name for p in file.parent.iterdir()] == ["model.safetensors"]


def test_an_exported_and_imported_model_has_the_same_errors(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, from the files alone: per-pixel mean, classes, temperature and training data are preserved."""
    again = tmp_path / "again.safetensors"
    before = load_trained_model(trained)
    documents = []
    for suffix in (".pth", ".safetensors"):
        assert run_command(["export", str(trained), "--to", "torchvision", "--out", str(tmp_path / f"w{suffix}")]) == 0
        assert run_command(["import", str(tmp_path / f"w{suffix}"), "--out", str(again)]) == 0
        assert "ASSUMED" not in capsys.readouterr().err
        after = load_trained_model(again)
        assert (after.spec, after.data, after.calibration) == (before.spec, before.data, before.calibration)
        assert torch.equal(after.preprocessing.mean, before.preprocessing.mean) and before.preprocessing.mean.ndim == 3
    for path in (trained, again):
        assert (
            run_command(
                ["evaluate", str(path), "--data", "digits", "--device", "cpu", "--out", str(tmp_path), "--json"]
            )
            == 0
        )
        documents.append(json.loads(capsys.readouterr().out))
        assert documents[-1].pop("model") == str(path)
    assert documents[0] == documents[1] and documents[0]["top1_error"] < 0.5


def test_an_imported_mean_for_every_pixel_is_used_by_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`import --mean-file` through predict, evaluate and what is exported: scores by hand, (x / 255 - mean) / std."""
    net: Any = build("resnet8", classes=3, seed=0).eval()
    mean = np.random.default_rng(0).uniform(0, 255, (32, 32, 3)).astype(np.float32)
    np.save(tmp_path / "mean.npy", mean)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    file, data = str(tmp_path / "m.safetensors"), folder(tmp_path / "d", {"val": 2, "train": 1})
    names = ",".join(sorted(NAMES_ON_DISK))
    given = ["--mean-file", str(tmp_path / "mean.npy"), "--std", "0.25", "--classes", names, "--out", file]
    assert run_command(["import", str(tmp_path / "w.pth"), *given]) == 0
    preprocessing = load_trained_model(Path(file)).preprocessing
    images = sorted((data / "val").rglob("*.jpg"))
    pixels = np.stack([preprocessing(Image.open(path)).numpy() for path in images])
    x = torch.from_numpy((pixels / 255 - mean / 255) / 0.25).float().permute(0, 3, 1, 2)
    with torch.no_grad():
        scores, other = (
            net(x).softmax(1),
            net(x + torch.from_numpy(mean / 255 - mean.mean((0, 1)) / 255).permute(2, 0, 1) * 4),
        )
    assert float((scores - other.softmax(1)).abs().max()) > 0.01  # with the mean of each channel the scores are others
    device = ["--device", "cpu", "--precision", "fp32"]
    capsys.readouterr()
    assert run_command(["predict", file, *map(str, images), "--json", *device]) == 0
    for row, score in zip(json.loads(capsys.readouterr().out)["predictions"], scores, strict=True):
        assert row["top"][0]["score"] == pytest.approx(float(score.max()), abs=1e-4)
    labels = torch.tensor([sorted(NAMES_ON_DISK).index(path.parent.name) for path in images])
    assert run_command(["evaluate", file, "--data", str(data), "--json", *device]) == 0
    assert json.loads(capsys.readouterr().out)["top1_error"] == pytest.approx(
        float((scores.argmax(1) != labels).float().mean())
    )
    exported = InferenceModule(load_trained_model(Path(file)))  # what every exported file computes
    torch.testing.assert_close(exported(torch.from_numpy(pixels)), scores, rtol=0, atol=1e-4)


def test_a_temperature_is_fitted_on_images_that_are_not_evaluated(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", str(file), "--data", "digits", "--device", "cpu", "--precision", "fp32"]
    assert run_command([*arguments, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["temperature"] == [1.0] and plain["calibration"] == [None]
    before = file.read_bytes()
    assert run_command([*arguments, "--fit-temperature", "train", "--json"]) == 0
    fitted = json.loads(capsys.readouterr().out)
    assert file.read_bytes() == before  # it is kept only where a person says so
    about = {"data": "digits", "split": "train", "n": 1437, "protocol": "1crop"}
    assert fitted["calibration"] == [about] and fitted["top1_error"] == plain["top1_error"]
    train, bundle = digits.load_digits().train, load_trained_model(file)
    metrics = evaluate_network(bundle.net, train, GREY, NAMES, select_device("fp32", "cpu"))
    assert fitted["temperature"] == [pytest.approx(fit_temperature(metrics.log_scores, train.labels), rel=1e-4)]
    assert fitted["loss"] < plain["loss"] and fitted["calibration_error"] < plain["calibration_error"]
    assert run_command([*arguments, "--fit-temperature", "100", "--save-temperature", "--protocol", "flip"]) == 0
    output = capsys.readouterr().out
    assert (
        "260 images" in output
        and "fitted on 100 images (set aside from test of digits) by 1crop; used here for" in output
    )
    kept = load_trained_model(file)
    assert kept.calibration["n"] == 100 and kept.temperature != 1.0
    assert run_command(arguments) == 0
    assert f"temperature {kept.temperature:.3f}, fitted on 100 images" in capsys.readouterr().out
    page = (file.parent / "evaluation.html").read_text()
    assert f"Temperature {kept.temperature:.3f}, fitted on 100 images" in page


def test_a_temperature_is_fitted_on_no_more_scores_than_are_kept(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `evaluate`, and at the end of training, whose figures are of all held-out images all the same."""
    recipe, options = replace(tiny(), val_images=100), RunOptions(device="cpu")
    whole = start_run(recipe, tmp_path / "whole", options)
    monkeypatch.setattr(split_selection, "MAX_SCORES", 60 * 10)
    found = evaluate(file, "digits", fit_on="train", device="cpu", precision="fp32")
    assert [model.calibration["n"] for model in found.trained_models] == [60]
    assert found.metrics.n == 360
    part = start_run(recipe, tmp_path / "part", options)
    model = load_trained_model(tmp_path / "part" / "model.safetensors")
    assert (model.calibration["n"], model.metrics["held_out"]["n"]) == (60, 100)
    assert part.to_dict()["held_out_error"] == whole.to_dict()["held_out_error"]


def test_uncalibrated_models_are_reported(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["evaluate", str(file), "--data", "digits", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "uncalibrated: no temperature was fitted" in said and "`evaluate --fit-temperature N` fits one" in said
    assert "Uncalibrated: no temperature was fitted" in (file.parent / "evaluation.html").read_text()


def test_splits_that_a_temperature_cannot_be_fitted_on(
    file: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path, arguments, sentence in (
        (file, ["--fit-temperature", "test"], "fitted on test, which holds images that are evaluated"),
        (file, ["--fit-temperature", "trian"], "did you mean 'train'?"),
        (trained, ["--fit-temperature", "train"], "which the model was trained on"),
        (file, ["--save-temperature"], "--save-temperature needs --fit-temperature"),
    ):
        assert run_command(["evaluate", str(path), "--data", "digits", "--device", "cpu", *arguments]) == 2
        assert sentence in capsys.readouterr().err
    assert run_command(["evaluate", str(file), "--data", "digits", "--fit-temperature", "360"]) == 1
    assert "cannot hold out 360 of 360" in capsys.readouterr().err


def test_equal_scores_have_one_order_everywhere(tmp_path: Path) -> None:
    """A head of zeros gives equal scores: the first class is predicted, and every figure agrees on what is wrong (case 50)."""
    zero = model(0)
    zero.net.fc.weight.data.zero_()
    zero.net.fc.bias.data.zero_()
    metrics = evaluate(zero, "digits", device="cpu", precision="fp32").metrics
    wrong = metrics.n - int(metrics.confusion.diag().sum())
    assert round(metrics.top1_error * metrics.n) == wrong == int((metrics.labels != 0).sum())
    assert round(metrics.top5_error * metrics.n) == int((metrics.labels > 4).sum())
    write_predictions(tmp_path / "rows.csv", metrics, [str(i) for i in range(metrics.n)])
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [row["rank"] for row in rows] == [str(1 + int(label)) for label in metrics.labels]
    assert {row["right"] == "True" for row in rows if row["rank"] == "1"} == {True}
    assert [name for name, _ in top_classes(NAMES, torch.full((10,), 0.1), 3)] == ["0", "1", "2"]


def test_precision_recall_and_f1_are_a_hand_computation() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 1])
    metrics = ClassificationMetrics.from_scores(tuple("abcd"), torch.eye(4)[predicted], labels)
    rows = {row["class"]: row for row in metrics.to_json()["per_class"]}
    assert [rows["a"][key] for key in ("precision", "recall", "f1")] == pytest.approx([2 / 3, 2 / 3, 2 / 3])
    assert [rows["b"][key] for key in ("precision", "recall", "f1")] == pytest.approx([1 / 3, 1 / 2, 2 / 5])
    assert (rows["c"]["precision"], rows["c"]["recall"], rows["c"]["f1"]) == (None, 0, 0)
    assert [rows["d"][key] for key in ("top1_error", "precision", "recall", "f1")] == [None] * 4
    assert metrics.to_json()["balanced_error"] == pytest.approx(1 - (2 / 3 + 1 / 2 + 0) / 3)
    assert metrics.macro("precision") == pytest.approx((2 / 3 + 1 / 3 + 0) / 3)
    assert metrics.to_json()["f1"] == pytest.approx((2 / 3 + 2 / 5 + 0) / 3)
    assert metrics.taken_for == [[("b", 1)], [("a", 1)], [("b", 1)], []]


def test_many_classes_have_a_sparse_confusion() -> None:
    k, n = 3000, 500
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(k, (n,), generator=draw)
    scores = torch.zeros(n, k)
    scores[torch.arange(n), torch.where(torch.arange(n) % 2 == 0, labels, 7)] = 1
    metrics = ClassificationMetrics.from_scores(tuple(map(str, range(k))), scores, labels)
    document = metrics.to_json()
    assert document["confusion"] is None and sum(row[2] for row in document["confusion_counts"]) == n
    text = format_json(document)
    assert len(text) < 1_000_000 and json.loads(text) == document
    dense = [[int(value) for value in row] for row in metrics.confusion.nonzero()]
    assert [row[:2] for row in document["confusion_counts"]] == dense
    assert (
        '"confusion_counts": [\n    [' in text and format_json([[1, 2], ["a"]]) == '[\n  [1, 2],\n  [\n    "a"\n  ]\n]'
    )


def test_some_of_a_models_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Scores over all outputs, or over the data's classes alone: by hand, for one model and two, in every output."""
    classes = ("other", *sorted(NAMES_ON_DISK), "more")
    colour = Preprocessing(3, (16, 16), 16, torch.full((3,), 0.5), torch.ones(3))
    root = folder(tmp_path / "d", {"train": 1, "val": 4})
    members = []
    for seed, names in ((0, classes), (1, classes[::-1])):
        net: Any = build("resnet8", classes=5, seed=seed)
        members.append(TrainedModel(net.eval(), names, colour))
        members[-1].save(tmp_path / f"{seed}.safetensors")
    given: dict[str, Any] = {"device": "cpu", "precision": "fp32"}
    over_all, alone = (evaluate(members[0], root, classes=scope, **given) for scope in ("all", "data"))
    assert over_all.metrics.classes == classes and alone.metrics.classes == classes[1:4]
    part = over_all.metrics.scores[:, 1:4]
    torch.testing.assert_close(alone.metrics.scores, part / part.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)
    assert over_all.top1_error >= alone.top1_error and over_all.metrics.macro("recall") == 1 - over_all.top1_error
    both = evaluate(members, root, classes="data", **given)
    other = evaluate(members[1], root, classes="data", **given).metrics
    flipped = other.scores[:, [other.classes.index(name) for name in classes[1:4]]]
    torch.testing.assert_close(both.metrics.scores, (alone.metrics.scores + flipped) / 2, rtol=1e-4, atol=1e-6)
    command = ["evaluate", str(tmp_path / "0.safetensors"), "--data", str(root), "--device", "cpu"]
    assert run_command([*command, "--classes", "data"]) == 0
    assert "scores are over the data's 3 classes alone, of 5 outputs" in capsys.readouterr().out
    page, document = ((tmp_path / f"evaluation.{kind}").read_text() for kind in ("html", "json"))
    assert "the data&#39;s 3 classes alone" in page and "top-5" not in page
    assert json.loads(document)["classes"] == alone.scope
    assert run_command([*command, "--classes", "folder"]) == 2
    image = str(next((root / "val").rglob("*.jpg")))
    explain = [
        "explain",
        str(tmp_path / "0.safetensors"),
        image,
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "x"),
        "--json",
    ]
    assert run_command([*explain, "--classes", str(root)]) == 0
    capsys.readouterr()
    assert run_command([*explain, "--classes", ",".join(classes[1:4])]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["classes"] == "3 classes alone, of 5 outputs" and len(printed["explanations"][0]["top"]) == 3
    assert run_command([*explain, "--classes", "nothing,at"]) == 2
    members[0].classes = ("a", *classes[:2], "b", "c")
    with pytest.raises(DataError, match="only in the data"):
        evaluate(members[0], root, **given)


def test_a_temperature_needs_more_than_a_few_images(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="fitted on 3 images means nothing"):
        evaluate(model(0), "digits", fit_on="3", device="cpu")
    few = evaluate(model(0), "digits", fit_on=20, device="cpu")
    assert any("fitted on only 20 images" in note for note in few.notes)
