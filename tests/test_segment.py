"""Segmenters: torchvision's heads on our backbones, training on masks, and a run killed and resumed."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import cells
from resnetlab.cli.main import run_command as resnetlab_
from resnetlab.data import mask_dataset
from resnetlab.data.annotated_sampler import AugmentationDraw
from resnetlab.data.mask_files import VOID
from resnetlab.evaluation.segmentation import resize_bounded
from resnetlab.models.head_spec import SegmenterSpec
from resnetlab.models.resnet import build
from resnetlab.models.segmentation import SegmentationNet
from resnetlab.training.tasks.segmentation import make_segmentation_sample
from runs import start_command

NET = {"widths": (8, 8, 8, 16), "depths": (1, 1, 1, 1)}


def small(head: str, output_stride: int) -> SegmentationNet:
    values = SegmenterSpec(
        image_size=72,
        longest=128,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        bn="live",
        frozen="",
        head=head,
        output_stride=output_stride,
    )
    return SegmentationNet(build("resnet18", seed=0, **NET), values, 3)


@pytest.mark.parametrize("head", ["fcn", "deeplab"])
@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_heads_read_the_map_of_their_output_stride(head: str, output_stride: int) -> None:
    net = small(head, output_stride)
    shapes = []
    net.backbone.register_forward_hook(lambda m, i, out: shapes.append(out["out"].shape))
    logits = net(torch.randint(256, (2, 96, 128, 3), dtype=torch.uint8))
    assert shapes == [(2, 16, 96 // output_stride, 128 // output_stride)] and logits.shape == (2, 3, 96, 128)
    F.cross_entropy(logits, torch.zeros(2, 96, 128, dtype=torch.long)).backward()
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_a_sample_is_a_square_with_an_aligned_mask(tmp_path: Path) -> None:
    train = mask_dataset.load_masks(cells.make_voc_folder(tmp_path)).train
    for scale, top, left in ((0.0, 0.3, 0.9), (0.9, 0.99, 0.1)):
        one = make_segmentation_sample(
            train[0], AugmentationDraw(True, True, scale, top, left), size=64, sides=(64, 100)
        )
        assert one.pixels.shape == (64, 64, 3) and one.mask.shape == (64, 64)
        dark, bright = (one.pixels.float().mean(2)[one.mask == value] for value in (1, 2))
        assert all(
            len(part) == 0 or test(part)
            for part, test in ((dark, lambda p: p.median() < 60), (bright, lambda p: p.median() > 200))
        )
    padded = make_segmentation_sample(train[0], AugmentationDraw(False, False, 0, 0, 0), size=64, sides=(32,))
    assert (
        (padded.mask[:32, :40] != VOID).all() and (padded.mask[32:] == VOID).all() and (padded.pixels[32:] == 0).all()
    )


def test_resizing_keeps_the_aspect_ratio() -> None:
    assert resize_bounded(torch.zeros(480, 640, 3, dtype=torch.uint8), 240, 1000).shape == (240, 320, 3)
    assert resize_bounded(torch.zeros(100, 1000, 3, dtype=torch.uint8), 100, 500).shape == (50, 500, 3)


SETTINGS = (
    "--steps", "150", "--set", "widths=8,16,16,16", "--set", "depths=1,1,1,1", "--set", "image_size=72", "--set", "sides=80",
    "--set", "batch=4", "--set", "output_stride=8", "--set", "log_every=10", "--set", "checkpoint_minutes=0",
    "--set", "flips=both", "--set", "lr=0.1", "--device", "cpu",
)  # fmt: skip
segment = partial(start_command, task="segment")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and a finished run."""
    root = tmp_path_factory.mktemp("segment")
    cells.make_voc_folder(root / "voc", train=12, val=4)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert resnetlab_(["segment", "train", str(root / "voc"), *SETTINGS, "--out", str(root / "run"), "--json"]) == 0
    (root / "printed.json").write_text(printed.getvalue())
    return root


def test_training_segments_dark_discs_and_bright_squares(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = json.loads((trained / "printed.json").read_text())
    assert [c["class"] for c in printed["per_class"]] == ["background", "round", "square"]
    assert printed["mean_iou"] > 0.6 and all(c["iou"] > 0.4 for c in printed["per_class"])
    model = str(trained / "run" / "model.safetensors")
    assert resnetlab_(["segment", "evaluate", model, "--data", str(trained / "voc"), "--json"]) == 0
    evaluated, said = capsys.readouterr()
    assert json.loads(evaluated)["mean_iou"] == printed["mean_iou"]
    assert "voc: Pascal VOC masks, 2 splits, 16 images, 3 classes" in said
    assert json.loads(evaluated)["layout"] == "Pascal VOC masks, 2 splits, 16 images, 3 classes"
    assert "mean IoU" in (trained / "run" / "report.html").read_text()


def test_predict_prints_shares_and_draws_masks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, image = str(trained / "run" / "model.safetensors"), str(trained / "voc" / "JPEGImages" / "p13.png")
    assert resnetlab_(["segment", "predict", model, image, "--out", str(tmp_path)]) == 0
    (found,) = json.loads(capsys.readouterr().out)["predictions"]
    assert sum(c["share"] for c in found["classes"]) == pytest.approx(1, abs=1e-5)
    with Image.open(found["drawn"]) as drawn:
        assert drawn.size == (80, 64)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with segment("train", str(trained / "voc"), *SETTINGS, "--out", str(out)) as process:
        deadline = time.monotonic() + 120
        while not list((out / "checkpoints").glob("step-*11.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    with segment("train", "--resume", str(out)) as process:
        _, stderr = process.communicate()
    assert process.returncode == 0 and "resuming from step" in stderr, stderr
    assert (out / "model.safetensors").read_bytes() == (trained / "run" / "model.safetensors").read_bytes()


def test_the_onnx_graph_agrees_with_pytorch(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="onnx and onnxruntime are not installed")
    other = tmp_path / "wide.png"
    cells.scene(20)[0].resize((150, 70)).save(other)  # a size that the graph was not traced with
    model, known = str(trained / "run" / "model.safetensors"), str(trained / "voc" / "JPEGImages" / "p7.png")
    assert resnetlab_(["segment", "export", model, known, str(other), "--out", str(tmp_path / "m.onnx"), "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["images"] == 2 and proof["agreement"] > 0.99 and proof["largest_difference"] < 1e-4


def test_a_graph_that_disagrees_is_not_written(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnx and onnxruntime are not installed")
    run = onnxruntime.InferenceSession.run
    monkeypatch.setattr(onnxruntime.InferenceSession, "run", lambda *given: [-scores for scores in run(*given)])
    model, image = str(trained / "run" / "model.safetensors"), str(trained / "voc" / "JPEGImages" / "p7.png")
    assert resnetlab_(["segment", "export", model, image, "--out", str(tmp_path / "m.onnx")]) == 1
    error = capsys.readouterr().err
    assert "m.onnx was not written: on 1 image " in error and "agreement with PyTorch, 99% are needed" in error
    assert not (tmp_path / "m.onnx").exists()


def test_an_unreadable_image_to_evaluate_is_found_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = cells.make_voc_folder(tmp_path / "voc")
    file = root / "JPEGImages" / "p7.png"
    file.write_bytes(file.read_bytes()[:-2000])  # its header can be read
    assert resnetlab_(["segment", "train", str(root), *SETTINGS, "--out", str(tmp_path / "run")]) == 1
    assert "p7.png is damaged" in capsys.readouterr().err and not (tmp_path / "run").exists()
