"""Metrics against torchmetrics and scipy, preprocessing against torchvision, and the model file's round trip."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

import resnetlab
from resnetlab.evaluation.metrics import ClassificationMetrics, wilson_interval
from resnetlab.models.model_file import MEAN_TENSOR, TrainedModel, load_trained_model
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing


def evaluation(n: int, classes: int, seed: int) -> ClassificationMetrics:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(n, classes, generator=draw).mul(3).softmax(1)
    labels = torch.randint(classes, (n,), generator=draw)
    return ClassificationMetrics.from_scores(tuple(map(str, range(classes))), scores, labels)


@given(n=st.integers(1, 60), classes=st.integers(2, 12), seed=st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_metrics_equal_torchmetrics(n: int, classes: int, seed: int) -> None:
    from torchmetrics.functional import classification as reference

    j = evaluation(n, classes, seed)
    assert torch.equal(j.confusion, reference.multiclass_confusion_matrix(j.predicted, j.labels, classes))
    expected = float(reference.multiclass_calibration_error(j.scores, j.labels, classes, n_bins=15))
    assert j.calibration_error == pytest.approx(expected, abs=1e-6)
    for k in (1, 5):
        if k <= classes:
            accuracy = reference.multiclass_accuracy(j.scores, j.labels, classes, average="micro", top_k=k)
            assert j.top_error(k) == pytest.approx(1 - float(accuracy), abs=1e-6)


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_interval_equals_scipy(n: int, share: float) -> None:
    from scipy.stats import binomtest

    wrong = round(share * n)
    expected = binomtest(wrong, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(wrong / n, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (31, 64), (333, 257), (224, 224), (9, 400)])
def test_preprocessing_equals_torchvision(size: tuple[int, int]) -> None:
    from torchvision import transforms

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ours = Preprocessing(3, (224, 224), 256, torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    pixels = ours(image)
    assert np.array_equal(pixels.numpy(), np.asarray(theirs(image)))
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(ours.mean.tolist(), ours.std.tolist())])
    torch.testing.assert_close(ours.normalise(pixels[None])[0], normalise(theirs(image)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_pixel", [False, True])
def test_model_file_round_trip(per_pixel: bool, tmp_path: Path) -> None:
    net = build("preresnet8", classes=3, channels=1, seed=1).eval()
    mean = torch.rand(16, 16, 1) if per_pixel else torch.tensor([0.3])
    preprocessing = Preprocessing(1, (16, 16), 18, mean, torch.tensor([0.2]))
    names = ("ä cat", "dog", "貓")
    bundle = TrainedModel(
        net, names, preprocessing, 1.5, {"lr": 0.1}, {"test": {"n": 3}}, {"name": "x"}, {"torch": "2"}
    )
    bundle.save(tmp_path / "m.safetensors")
    again = load_trained_model(tmp_path / "m.safetensors")
    assert again.spec == net.spec and again.classes == names and again.temperature == 1.5
    assert (again.recipe, again.metrics, again.data, again.versions) == (
        bundle.recipe,
        bundle.metrics,
        bundle.data,
        bundle.versions,
    )
    assert torch.equal(again.preprocessing.mean, mean) and again.preprocessing.size == (16, 16)
    for key, value in net.state_dict().items():
        assert torch.equal(again.net.state_dict()[key], value)
    x = torch.randn(2, 1, 16, 16)
    assert torch.equal(again.net(x), net(x))
    bundle.save(tmp_path / "again.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_model_file_is_a_contract(tmp_path: Path) -> None:
    net = build("resnet8", classes=2)
    preprocessing = Preprocessing(3, (32, 32), 32, torch.zeros(32, 32, 3), torch.ones(3))
    TrainedModel(net, ("a", "b"), preprocessing).save(tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == set(net.state_dict()) | {MEAN_TENSOR}
        about = json.loads(file.metadata()["resnetlab"])
    assert set(about) == {
        "format", "task", "specification", "classes", "preprocessing", "temperature", "recipe", "metrics", "data",
        "versions"}  # fmt: skip
    assert about["format"] == 2 and set(about["preprocessing"]) == {"channels", "size", "resize", "mean", "std"}


def test_a_model_predicts_what_its_network_computes(tmp_path: Path) -> None:
    net = build("resnet8", classes=4, seed=3).eval()
    preprocessing = Preprocessing(3, (24, 24), 24, torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.2, 0.2]))
    TrainedModel(net, tuple("abcd"), preprocessing, temperature=2.0).save(tmp_path / "m.safetensors")
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    x = (
        torch.from_numpy(np.asarray(image).copy()).double() / 255 - preprocessing.mean.double()
    ) / preprocessing.std.double()
    with torch.inference_mode():
        expected = (net.double()(x.permute(2, 0, 1)[None]) / 2.0).softmax(1)[0]
    prediction = resnetlab.load(tmp_path / "m.safetensors", device="cpu").predict(image, top=4)
    assert [name for name, _ in prediction.top] == ["abcd"[i] for i in expected.argsort(descending=True)]
    assert [score for _, score in prediction.top] == pytest.approx(sorted(expected.tolist(), reverse=True), abs=1e-5)


def test_model_files_are_readable_by_others(tmp_path: Path) -> None:
    """Written through a temporary file, but with the permissions that any new file would get."""
    TrainedModel(
        build("resnet8"), tuple("0123456789"), Preprocessing(3, (32, 32), 32, torch.zeros(3), torch.ones(3))
    ).save(tmp_path / "m")
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "m").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
