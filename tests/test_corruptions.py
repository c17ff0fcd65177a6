"""Corrupted images: known values, the reference's parameters, and errors relative to a baseline."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from corruption_formulas import FORMULAS
from resnetlab.cli.main import run_command
from resnetlab.errors import UsageError
from resnetlab.evaluation import robustness
from resnetlab.evaluation.corruptions import CORRUPTIONS, CorruptionChoice, corrupt, parse_corruptions
from resnetlab.evaluation.evaluate import evaluate
from resnetlab.evaluation.robustness import evaluate_corruptions
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing
from resnetlab.random import seed_for


def photograph(side: int, channels: int = 3) -> Tensor:
    """A smooth random image, uint8 (side, side, channels)."""
    rows = torch.rand(1, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.interpolate(rows, (side, side), mode="bicubic").clamp(0, 1)
    return (x[0].permute(1, 2, 0) * 255).to(torch.uint8).contiguous()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_every_kind_at_every_size(kind: str) -> None:
    """uint8 of the same shape, a function of seed and name, different from the image, and more so at higher severity."""
    for side, channels in ((32, 3), (70, 3), (8, 1)):
        x = photograph(side, channels)
        images = {severity: corrupt(x, kind, severity, 0, "a") for severity in (1, 5)}
        assert all(y.shape == x.shape and y.dtype == torch.uint8 for y in images.values())
        assert torch.equal(images[5], corrupt(x, kind, 5, 0, "a"))
        change = {k: float((y.float() - x.float()).abs().mean()) for k, y in images.items()}
        assert change[5] > 0.2 and (side == 8 or "elastic" in kind or change[5] > 0.9 * change[1])
    if kind not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"):
        assert not torch.equal(corrupt(photograph(32), kind, 5, 0, "a"), corrupt(photograph(32), kind, 5, 1, "a"))


@pytest.mark.parametrize("kind", FORMULAS)
def test_every_kind_is_the_authors(kind: str) -> None:
    """Beside the authors' formulas, written a second time (docs/log.md: beside their programs): within a grey level."""
    for side, severities in ((32, (1, 2, 3, 4, 5)), (66, (1, 5))):
        for severity in severities:
            x, entry = photograph(side), CORRUPTIONS[kind]
            parameters = (entry.small if side == 32 else entry.large)[severity - 1]
            draw = np.random.default_rng(seed_for(0, "corruption", kind, severity, "a"))
            expected = FORMULAS[kind](x.numpy() / 255, parameters, draw).clip(0, 1) * 255
            difference = np.abs(corrupt(x, kind, severity, 0, "a").numpy() - np.floor(expected + 1e-6))
            assert difference.max() <= 1 and difference.mean() < 0.01, (side, severity)


def test_known_values() -> None:
    """What the authors' formulas give for constant images, and the strength of the noise."""
    grey, large = torch.full((32, 32, 3), 102, dtype=torch.uint8), torch.full((224, 224, 3), 102, dtype=torch.uint8)
    for kind in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"):
        assert (corrupt(large, kind, 3, 0, "a").int() - 102).abs().max() <= 1, kind
    assert corrupt(grey, "brightness", 5, 0, "a").unique().tolist() == [int(102 + 0.3 * 255)]
    assert corrupt(large, "brightness", 1, 0, "a").unique().tolist() == [int(102 + 0.1 * 255)]
    red = torch.tensor([200, 100, 0], dtype=torch.uint8).expand(32, 32, 3)
    assert corrupt(red, "brightness", 1, 0, "a")[0, 0].tolist() == [212, 106, 0]  # V + .05, same hue and saturation
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8)[:, None, None].expand(32, 32, 3)
    expected = (ramp[:, 0, 0].double() - 124) * 0.15 + 124
    assert torch.equal(corrupt(ramp, "contrast", 5, 0, "a")[:, 0, 0], (expected + 1e-6).floor().to(torch.uint8))
    noisy = corrupt(large, "gaussian_noise", 2, 0, "a").double() / 255
    assert float(noisy.std()) == pytest.approx(0.12, rel=0.02)
    shot = corrupt(large, "shot_noise", 3, 0, "a").double() / 255
    assert float(shot.std()) == pytest.approx((0.4 / 12) ** 0.5, rel=0.05)
    impulses = corrupt(large, "impulse_noise", 5, 0, "a")
    assert float((impulses != 102).float().mean()) == pytest.approx(0.27, rel=0.02)
    assert set(impulses.unique().tolist()) == {0, 102, 255}


def test_blurs_of_a_point() -> None:
    """A single white pixel shows a blur's kernel: a disk, and half a Gaussian along a direction."""
    point = torch.zeros(101, 101, 1, dtype=torch.uint8)
    point[50, 50] = 255
    disk = corrupt(point.expand(101, 101, 3).contiguous(), "defocus_blur", 1, 0, "a")[:, :, 0]
    assert int((disk > 0).sum()) == pytest.approx(37, abs=16) and disk[50, 50] == disk[52, 50] == disk[50, 48] > 0
    from resnetlab.evaluation.corruptions import _blur_along

    line = _blur_along(point.double().numpy() / 255, 10, 3, 0)[:, :, 0]
    weights = np.exp(-(np.arange(21) ** 2) / 18)
    np.testing.assert_allclose(line[50, 50:29:-1], weights / weights.sum())
    assert line.sum() == pytest.approx(1)


def model(seed: int) -> TrainedModel:
    net: Any = build("resnet8", classes=10, channels=1, seed=seed)
    return TrainedModel(net.eval(), tuple("0123456789"), Preprocessing(1, (8, 8), 8, torch.zeros(1), torch.ones(1)))


def test_errors_relative_to_a_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        model(seed).save(tmp_path / f"{seed}.safetensors")
    command = [
        "evaluate",
        str(tmp_path / "0.safetensors"),
        "--data",
        "digits",
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--json",
    ]
    asked = [
        "--corruptions",
        "contrast,gaussian_noise",
        "--severities",
        "5,2",
        "--baseline",
        str(tmp_path / "1.safetensors"),
    ]
    assert run_command([*command, *asked]) == 0
    found = json.loads(capsys.readouterr().out)["corruptions"]
    assert found["severities"] == [2, 5] and [row["kind"] for row in found["kinds"]] == ["contrast", "gaussian_noise"]
    ratios = [np.mean(row["errors"]) / row["baseline_error"] for row in found["kinds"]]
    assert [row["corruption_error"] for row in found["kinds"]] == pytest.approx(ratios)
    assert found["mean_corruption_error"] == pytest.approx(np.mean(ratios))
    clean = evaluate(model(1), "digits", device="cpu", precision="fp32")
    other = evaluate_corruptions(
        clean, parse_corruptions("contrast", "2,5"), device="cpu", precision="fp32"
    ).corruptions
    assert other is not None and found["kinds"][0]["baseline_error"] == pytest.approx(np.mean(other.errors["contrast"]))
    assert other.mean_corruption_error is None and other.clean_error == clean.top1_error
    rows = list(csv.DictReader((tmp_path / "corruptions.csv").read_text().splitlines()))
    assert [float(row["top1_error"]) for row in rows[:2]] == found["kinds"][0]["errors"]
    page = (tmp_path / "evaluation.html").read_text()
    assert "Corrupted images" in page and "relative to the given model" in page
    fog = ["--corruptions", "fog"]
    for wrong in (["--corruptions", "rain"], [*fog, "--severities", "6"], ["--baseline", "alexnet"],
                  [*fog, "--baseline", "alexnet"], [*fog, "--protocol", "flip"]):  # fmt: skip
        assert run_command([*command, *wrong]) == 2, wrong


def test_alexnets_errors_are_for_imagenet_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With errors equal to AlexNet's the mean corruption error is 1."""
    assert parse_corruptions("all", "1,2,3,4,5") == CorruptionChoice()
    evaluation = evaluate(model(0), "digits", device="cpu")
    monkeypatch.setattr(
        robustness, "_measure", lambda *_: {k: (CORRUPTIONS[k].alexnet_error,) * 5 for k in CORRUPTIONS}
    )
    with pytest.raises(UsageError, match=r"AlexNet's errors are for ImageNet's 1,000 classes"):
        evaluate_corruptions(evaluation, baseline="alexnet")
    names = {str(i): name for i, name in enumerate(evaluation.metrics.classes)}
    monkeypatch.setattr("resnetlab.data.imagenet.imagenet_class_names", lambda: names)
    found = evaluate_corruptions(evaluation).corruptions
    assert (
        found is not None
        and found.baseline == "AlexNet (published)"
        and found.mean_corruption_error == pytest.approx(1)
    )
    part = evaluate_corruptions(replace(evaluation, scope="some")).corruptions
    assert part is not None and part.baseline == ""
