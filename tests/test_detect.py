"""Detectors: predictions equal torchvision's, the paper's form and additions, and runs, killed and resumed."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import pytest
import torch
from PIL import Image
from torchvision.models import ResNet18_Weights

import cells
from resnetlab.cli.main import run_command as resnetlab_
from resnetlab.data import box_dataset
from resnetlab.data.annotated_sampler import AnnotatedLoader, AugmentationDraw, flip_boxes, flip_image
from resnetlab.distributed import World
from resnetlab.errors import ModelFileError, UsageError
from resnetlab.inference import annotated_export
from resnetlab.inference.localization import box_around_peak
from resnetlab.models.annotated_model import load_annotated
from resnetlab.models.detection import RegionHeads, build_detector, reorder_classes
from resnetlab.models.head_spec import DetectionOptions, DetectorSpec
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.resnet import build
from resnetlab.models.test_time import ImageScale, adjacent_scales, detect
from resnetlab.preprocessing import Preprocessing
from resnetlab.training import recipes
from resnetlab.training.annotated_recipes import DetectionRecipe, boxes
from resnetlab.training.machine import describe_differences
from resnetlab.training.result import DetectionResult
from resnetlab.training.tasks.annotated import build_starting_network, channel_statistics
from resnetlab.training.tasks.detection import choose_anchors, make_detection_sample
from resnetlab.training.train import resume
from runs import start_command

VALUES: dict[str, Any] = {
    "image_size": 72, "longest": 128, "mean": (0.5,) * 3, "std": (0.25,) * 3, "bn": "fixed", "frozen": "", "context": False,
}  # fmt: skip
NET = {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
FORMS = {"fpn": (8, 16, 32, 64, 128), "c4": (16, 32)}


def small(form: str, context: bool = False, **changes: Any) -> Any:
    values = DetectorSpec(**VALUES | {"form": form, "anchors": FORMS[form], "context": context, "pyramid": 16})
    torch.manual_seed(0)
    return build_detector(build("resnet18", seed=0, **NET | changes), values, 2, seed=1).eval()


def image(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 72, 90, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context", [False, True])
def test_both_forms_train_and_predict(form: str, context: bool) -> None:
    net = small(form, context)
    targets = [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}] * 2
    losses = net.train()([image(), image(1)], targets)
    assert 0 <= float(losses.pop("error")) <= 1
    torch.stack(list(losses.values())).sum().backward()
    unused = [k for k, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    with torch.inference_mode():
        assert net.eval()([image()])[0]["boxes"].shape[1] == 4


def test_c4_shares_conv1_to_conv4_and_pools_before_conv5() -> None:
    net = small("c4")
    shapes = {}
    net.backbone.register_forward_hook(
        lambda m, i, out: shapes.update(maps={k: tuple(v.shape) for k, v in out.items()})
    )
    net.roi_heads.box_head.stage.register_forward_hook(lambda m, i, out: shapes.update(at=i[0].shape, out=out.shape))
    with torch.inference_mode():
        net([image()])
    assert shapes["maps"] == {"0": (1, 8, 6, 6)}  # 72x90, padded to 96x96, 16 pixels a step
    assert shapes["at"][1:] == (8, 14, 14) and shapes["out"][1:] == (8, 7, 7)
    names = set(net.state_dict())
    assert "roi_heads.box_head.stage.0.conv1.weight" in names and not any("layer4" in n or "fc." in n for n in names)


@pytest.mark.parametrize("form", FORMS)
def test_predictions_do_not_depend_on_the_image_before(form: str) -> None:
    """torchvision's pooling infers the maps' strides from the first image, wrongly if that is narrow."""
    fresh, used = small(form), small(form)
    used.transform.min_size = (66,)  # padded to 96
    with torch.inference_mode():
        used([image(1)])
        used.transform.min_size = fresh.transform.min_size
        assert all(torch.equal(a, b) for a, b in zip(*(n([image()])[0].values() for n in (fresh, used)), strict=True))
    assert fresh.roi_heads.box_roi_pool.scales == [1 / s for s in ((4, 8, 16, 32) if form == "fpn" else (16,))]


def test_preactivated_c4_ends_in_its_last_activation() -> None:
    net = small("c4", activation_order="preact")
    with torch.inference_mode():
        features = net.roi_heads.box_head(torch.randn(3, 8, 14, 14))
    assert features.shape == (3, 8) and float(features.min()) >= 0


def test_without_additions_predictions_are_torchvisions() -> None:
    from torchvision.models.detection.roi_heads import RoIHeads

    net = small("fpn")
    net.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        ours = detect([net], image(), DetectionOptions())
        refined = detect([net], image(), DetectionOptions(refine=True))
        own = cast(Any, RoIHeads.forward)  # torchvision's forward on the same parts
        images, _ = net.transform([image()])
        maps = net.backbone(images.tensors)
        theirs, _ = own(net.roi_heads, maps, net.rpn(images, maps)[0], images.image_sizes)
    assert len(ours[0]) > 10
    torch.testing.assert_close(ours[0], theirs[0]["boxes"] * 1.0, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[0]["scores"], rtol=0, atol=1e-6)
    assert len(refined[0]) and not torch.equal(refined[0][:5], ours[0][:5])


def test_multi_scale_testing_at_equal_scales_changes_nothing() -> None:
    """Two scales that are both the detector's own: the maximum of equal features is the feature."""
    net = small("fpn")
    net.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        plain = detect([net], image(), DetectionOptions())
        doubled = DetectionOptions(sides=(72, 73))
        object.__setattr__(doubled, "sides", (72, 72))
        torch.testing.assert_close(detect([net], image(), doubled)[1], plain[1], rtol=0, atol=1e-5)
        other = detect([net], image(), DetectionOptions(sides=(66, 72, 96)))
    assert len(other[0]) and not torch.allclose(other[1][:5], plain[1][:5])


def test_an_ensemble_classifies_the_union_of_its_proposals() -> None:
    """2015, appendix B, by hand from torchvision's parts; a network beside itself changes nothing."""
    from torchvision.models.detection.transform import resize_boxes
    from torchvision.ops import clip_boxes_to_image

    from resnetlab.models.test_time import suppress_and_vote

    nets = [small("fpn"), small("c4", context=True)]
    nets[1].load_state_dict({k: v * 1.5 for k, v in nets[1].state_dict().items()})
    nets[1].transform.min_size = (96,)
    for net in nets:
        net.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        together, own, parts = detect(nets, image(), DetectionOptions()), [], []
        for net in nets:
            images, _ = net.transform([image()])
            maps = net.backbone(images.tensors)
            maps = maps if isinstance(maps, dict) else {"0": maps}
            parts.append((net.roi_heads, maps, images.image_sizes))
            own.append(resize_boxes(net.rpn(images, maps)[0][0], images.image_sizes[0], (72, 90)))
        boxes, scores = [], []
        for heads, maps, sizes in parts:
            union = resize_boxes(torch.cat(own), (72, 90), sizes[0])
            logits, shifts = heads.predict(heads.region_features(maps, [union], sizes))
            decoded = heads.box_coder.decode(shifts, [union]).reshape(-1, 4)
            boxes.append(clip_boxes_to_image(resize_boxes(decoded, sizes[0], (72, 90)), (72, 90)).reshape(-1, 3, 4))
            scores.append(logits.softmax(1))
        assert len(own[0]) > 10 and len(own[1]) > 10 and not torch.allclose(*scores, atol=0.01)
        expected = suppress_and_vote(parts[0][0], (boxes[0] + boxes[1]) / 2, (scores[0] + scores[1]) / 2, False)
        torch.testing.assert_close(together[1], expected[1], rtol=0, atol=1e-5)
        torch.testing.assert_close(together[0], expected[0], rtol=0, atol=1e-3)
        for options in (DetectionOptions(), DetectionOptions(sides=(66, 96))):
            alone, twice = detect(nets[:1], image(), options), detect([nets[0], nets[0]], image(), options)
            torch.testing.assert_close(twice[1], alone[1], rtol=0, atol=1e-6)


def test_detectors_are_evaluated_together(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Classes are matched by name: a detector beside itself with its classes in the other order has the same metrics."""
    first, data = str(trained / "run" / "model.safetensors"), str(trained / "voc")
    other, command = load_annotated(Path(first), "detect"), ["detect", "evaluate", first]
    reorder_classes(other.net, [1, 0])
    other.classes = other.classes[::-1]
    other.save(tmp_path / "b.safetensors")
    documents = []
    for models in ([], [str(tmp_path / "b.safetensors")]):
        assert resnetlab_([*command, *models, "--data", data, "--scales", "72,80", "--json", "--device", "cpu"]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert documents[1].pop("models") == [first, str(tmp_path / "b.safetensors")] and documents[1] == documents[0]
    other.classes = ("cat", "dog")
    other.save(tmp_path / "c.safetensors")
    assert resnetlab_([*command, str(tmp_path / "c.safetensors"), "--data", data]) == 1
    assert "only with the same classes" in capsys.readouterr().err


def test_adjacent_scales_are_those_nearest_to_224_of_600_pixels() -> None:
    scales = [ImageScale({}, (300 * k // 2, 1)) for k in (1, 2, 3, 4)]  # of an image of 300: 150, 300, 450, 600
    boxes = torch.tensor([[0.0, 0, 112, 112], [0, 0, 30, 30], [0, 0, 290, 290], [0, 0, 70, 70]])
    assert adjacent_scales(boxes, (300, 1), scales, 300).tolist() == [1, 2, 0, 2]


def test_votes_are_means_weighted_by_score() -> None:
    from resnetlab.models.test_time import suppress_and_vote

    regions = cast(RegionHeads, small("fpn").roi_heads)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 12, 10], [40, 40, 50, 50]])
    scores = torch.tensor([[0.2, 0.6, 0.2], [0.6, 0.3, 0.1], [0.1, 0.0, 0.9]])
    found, values, labels = suppress_and_vote(regions, boxes[:, None].expand(3, 3, 4), scores, vote=True)
    where = (labels == 1).nonzero().flatten()
    assert values[where].tolist() == [pytest.approx(0.6)]
    assert found[where][0].tolist() == pytest.approx([0, 0, (0.6 * 10 + 0.3 * 12) / 0.9, 10])


def test_boxes_are_flipped_with_the_image() -> None:
    pixels = torch.zeros(64, 80, 3, dtype=torch.uint8)
    pixels[10:20, 5:25] = 255
    for draw in (
        AugmentationDraw(True, False, 0, 0, 0),
        AugmentationDraw(False, True, 0, 0, 0),
        AugmentationDraw(True, True, 0, 0, 0),
    ):
        x1, y1, x2, y2 = map(int, flip_boxes(torch.tensor([[5.0, 10, 25, 20]]), (64, 80), draw)[0])
        turned = flip_image(pixels, draw)
        assert turned[y1:y2, x1:x2].min() == 255 and int((turned > 0).sum()) == 10 * 20 * 3


SETTINGS = (
    "--steps", "6", "--net", "resnet18", "--set", "widths=8,8,8,8", "--set", "depths=1,1,1,1", "--set", "image_size=72",
    "--set", "longest=96", "--set", "sides=66", "--set", "batch=2", "--set", "regions=16", "--set", "pyramid=8",
    "--set", "log_every=1", "--set", "eval_every=3", "--set", "val_images=2", "--set", "checkpoint_minutes=0",
    "--device", "cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and a finished run."""
    root = tmp_path_factory.mktemp("detect")
    cells.make_voc_folder(root / "voc")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert resnetlab_(["detect", "train", str(root / "voc"), *SETTINGS, "--out", str(root / "run"), "--json"]) == 0
    (root / "printed.json").write_text(printed.getvalue())
    return root


def test_a_run_folder_is_complete(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "run"
    printed = json.loads((trained / "printed.json").read_text())
    assert (
        printed["split"] == "val"
        and printed["n"] == 3
        and [c["class"] for c in printed["per_class"]] == ["round", "square"]
    )
    assert json.loads((run / "holdout.json").read_text())["evaluated while training"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "held_out"] == [3, 6]
    page = (run / "report.html").read_text()
    assert "mAP@.5" in page and page.count("data:image/jpeg") == 3 and "http-equiv" in page and 'src="http' not in page
    assert (
        resnetlab_(["detect", "evaluate", str(run / "model.safetensors"), "--data", str(trained / "voc"), "--json"])
        == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["map"] == printed["map"] and figures["per_class"] == printed["per_class"]


def test_predict_prints_and_draws_boxes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, image = str(trained / "run" / "model.safetensors"), str(trained / "voc" / "JPEGImages" / "p7.png")
    (tmp_path / "no.jpg").write_bytes(b"no image")
    out = tmp_path / "found"
    code = resnetlab_(["detect", "predict", model, image, str(tmp_path / "no.jpg"), "--score", "0", "--out", str(out)])
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)["predictions"]
    assert code == 1 and "no.jpg" in second["error"] and "1 of 2 images" in printed.err
    assert {"class", "score", "box"} == set(first["boxes"][0])
    with Image.open(first["drawn"]) as drawn:
        assert drawn.size == (80, 64)


@pytest.mark.slow
def test_a_killed_run_resumes_bit_identically(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with start_command("train", str(trained / "voc"), *SETTINGS, "--out", str(out)) as process:
        deadline = time.monotonic() + 120
        while not list((out / "checkpoints").glob("step-*2.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (out / "model.safetensors").exists()
    with start_command("train", "--resume", str(out)) as process:
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "resuming from step" in stderr
    assert (out / "model.safetensors").read_bytes() == (trained / "run" / "model.safetensors").read_bytes()


def test_a_run_is_resumed_by_its_own_command_only(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "run"
    assert resnetlab_(["train", "--resume", str(run)]) == 1
    assert f"is a run of another task; resume with: resnetlab detect train --resume {run}" in capsys.readouterr().err


def test_training_starts_from_a_classifier(trained: Path, tmp_path: Path) -> None:
    """Its weights and preprocessing are taken over; another network's, or a detector's, are refused."""
    net = build("resnet18", seed=5, classes=4, **NET)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    file = tmp_path / "classifier.safetensors"
    TrainedModel(net, ("a", "b", "c", "d"), Preprocessing(3, (32, 32), 32, mean, std)).save(file)
    recipe = replace(boxes(), net="resnet18", specification=NET, bn="fixed")
    start = build_starting_network(recipe, str(file), iter(()))
    assert start.mean == pytest.approx(mean.tolist()) and start.std == pytest.approx(std.tolist())
    assert all(torch.equal(v, start.net.state_dict()[k]) for k, v in net.state_dict().items())
    with pytest.raises(UsageError, match="holds another network than resnet18"):
        build_starting_network(replace(recipe, specification=NET | {"shortcut": "A"}), str(file), iter(()))
    with pytest.raises(ModelFileError, match="is not a classifier"):
        build_starting_network(recipe, str(trained / "run" / "model.safetensors"), iter(()))


def test_training_starts_from_a_published_classifier(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From torch's cache, with its network and preprocessing; without the file and a network one sentence says so."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name, cache = "torchvision:resnet18.IMAGENET1K_V1", tmp_path / "hub" / "checkpoints"
    monkeypatch.setattr("torch.hub.urlopen", Mock(side_effect=OSError("no network")))
    out = tmp_path / "run"
    assert resnetlab_(["detect", "train", str(trained / "voc"), "--start-from", name, "--out", str(out)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("resnetlab: ") and "no network" in said and not out.exists()
    weights = build("resnet18", seed=3, classes=1000).state_dict()
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(weights, cache / Path(ResNet18_Weights.IMAGENET1K_V1.url).name)
    start = build_starting_network(replace(boxes(), net="", bn="fixed"), name, iter(()))
    assert start.mean == pytest.approx((0.485, 0.456, 0.406)) and start.std == pytest.approx((0.229, 0.224, 0.225))
    assert all(torch.equal(v, start.net.state_dict()[k]) for k, v in weights.items())


def test_fixed_bn_needs_a_classifier(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["detect", "train", str(trained / "voc"), "--set", "bn=fixed", "--out", str(trained / "none")]
    assert resnetlab_(arguments) == 2 and not (trained / "none").exists()
    assert "bn=fixed keeps the statistics of a classifier" in capsys.readouterr().err


def test_workers_change_nothing(trained: Path) -> None:
    train = box_dataset.load_boxes(trained / "voc").train
    alone, helped = (AnnotatedLoader(train, make_detection_sample, 4, 0, "both", workers=n) for n in (0, 1))
    for step in (0, 1, 5):  # the last is out of turn
        for a, b in zip(*(it.micro_batches(step)[0] for it in (alone, helped)), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    helped.close()


def test_channel_statistics_are_those_of_all_pixels() -> None:
    images = [torch.randint(256, (n, 7, 3), dtype=torch.uint8) for n in (5, 9)]
    pixels = torch.cat([p.reshape(-1, 3) for p in images]).double() / 255
    mean, std = channel_statistics(images)
    assert mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std(0, correction=0).tolist(), abs=1e-6)


def test_chosen_anchors_fit_the_boxes(tmp_path: Path) -> None:
    train = box_dataset.load_boxes(
        cells.make_voc_folder(tmp_path)
    ).train  # sides from 16 to 25 pixels in images whose shorter side is 64
    assert choose_anchors(train, 128, 1000, "fpn") == pytest.approx((20, 40, 80, 160, 320), rel=0.12)
    assert all(30 <= side <= 52 for side in choose_anchors(train, 128, 1000, "c4"))
    crowd = torch.tensor([[0.0, 0.0, 64.0, 64.0]] * 99)  # not trained on
    marked = [replace(each, boxes=torch.cat([each.boxes, crowd]), ignored=torch.arange(len(each.boxes) + 99) >= len(each.boxes))
              for each in train]  # fmt: skip
    assert choose_anchors(marked, 128, 1000, "fpn") == choose_anchors(train, 128, 1000, "fpn")


def test_recipes_accept_only_their_own_values(trained: Path) -> None:
    recipe = recipes.find_recipe("boxes", "detect")
    assert isinstance(recipe, DetectionRecipe) and recipe.name == "boxes"
    with pytest.raises(UsageError, match="unknown key 'crop'"):
        recipe.with_values({"crop": "scale"})
    with pytest.raises(UsageError, match="did you mean 'anchors'"):
        recipe.with_values({"anchor": "1"})
    with pytest.raises(UsageError, match="regions must be from 1 to 1,000,000,000, not -1"):
        recipe.with_values({"regions": "-1"})
    values: dict[str, Any] = {
        "image_size": 64,
        "longest": 64,
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
        "bn": "live",
        "frozen": "",
    }
    with pytest.raises(UsageError, match="anchors must be side lengths in pixels, from 1 up"):
        DetectorSpec(form="c4", anchors=(0, 8), context=False, **values)
    with pytest.raises(UsageError, match="plateau watches a held-out error"):
        recipe.with_values({"schedule": "plateau"})
    with pytest.raises(UsageError, match="unknown recipe 'photos'"):
        recipes.find_recipe("photos", "detect")
    assert DetectionRecipe.from_values(recipe.to_json()) == recipe
    elsewhere = {"processes": 1}, {"processes": 2} | dict.fromkeys(("device", "cpu", "gpu", "torch"))
    assert [len(describe_differences(*elsewhere, replace(recipe, bn=bn))) for bn in ("live", "fixed")] == [
        1,
        0,
    ]
    again = resume(trained / "run", task="detect")
    assert isinstance(again, DetectionResult) and again.steps == 6


def test_model_files_of_another_task_are_refused(trained: Path) -> None:
    model = trained / "run" / "model.safetensors"
    assert load_annotated(model, "detect").classes == ("round", "square")
    with pytest.raises(ModelFileError, match="is a detector, and a segmenter is needed here"):
        load_annotated(model, "segment")
    with pytest.raises(ModelFileError, match="is not a classifier"):
        load_trained_model(model)


def test_the_onnx_graph_agrees_with_pytorch(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="onnx and onnxruntime are not installed")
    other = tmp_path / "wide.png"
    cells.scene(20)[0].resize((150, 70)).save(other)  # a size that the graph was not traced with
    model, known = str(trained / "run" / "model.safetensors"), str(trained / "voc" / "JPEGImages" / "p7.png")
    assert resnetlab_(["detect", "export", model, known, str(other), "--out", str(tmp_path / "m.onnx"), "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["images"] == 2 and proof["agreement"] > 0.99 and proof["largest_difference"] < 0.01


def test_boxes_of_a_graph_are_compared_whatever_their_order() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 60, 60], [5, 5, 9, 9]])
    expected = boxes, torch.tensor([0.9, 0.8, 0.06]), torch.tensor([0, 1, 1])
    swapped = boxes[[1, 0]] + torch.tensor(0.1), torch.tensor([0.8, 0.8]), torch.tensor([1, 0])
    agreement, difference = annotated_export._compare_boxes(expected, swapped)  # the third is near the bound
    assert agreement == 1.0 and difference == pytest.approx(0.1, abs=1e-5)
    other = boxes[:2], torch.tensor([0.9, 0.8]), torch.tensor([0, 0])
    assert annotated_export._compare_boxes(expected, other) == (0.5, 0.0)  # one of two each way
    nothing = boxes[:0], torch.ones(0), torch.ones(0, dtype=torch.long)
    assert annotated_export._compare_boxes(expected, nothing)[0] == 0.0
    assert annotated_export._compare_boxes(nothing, nothing) == (1.0, 0.0)
    assert annotated_export._compare_boxes(expected, (boxes * torch.nan, *expected[1:]))[0] == 0.0


def test_the_papers_form_and_additions_from_the_command_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(trained / "voc"), str(tmp_path / "c4")
    more = ("--set", "form=c4", "--set", "context=true", "--steps", "2")
    assert resnetlab_(["detect", "train", data, *SETTINGS[2:], *more, "--out", out]) == 0
    assert load_annotated(Path(out) / "model.safetensors", "detect").head_spec.form == "c4"
    capsys.readouterr()
    plain = ["detect", "evaluate", f"{out}/model.safetensors", "--data", data, "--json"]
    assert resnetlab_([*plain, "--refine", "--scales", "66,72,90"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (
        figures["refine"] is True
        and figures["context"] is True
        and figures["scales"] == [66, 72, 90]
        and 0 <= figures["map"] <= figures["map_50"]
    )
    assert resnetlab_([*plain, "--scales", "66"]) == 2 and "two or more rising lengths" in capsys.readouterr().err


def test_micro_batches_do_not_depend_on_the_number_of_processes(trained: Path) -> None:
    train = box_dataset.load_boxes(trained / "voc").train
    whole = AnnotatedLoader(train, make_detection_sample, 4, 0, "both", micro_batch=2).micro_batches(3)
    loaders = [AnnotatedLoader(train, make_detection_sample, 4, 0, "both", World(rank, 2), 2) for rank in range(2)]
    found = [part for loader in loaders for part in loader.micro_batches(3)]
    assert [len(part) for part in whole] == [2, 2] == [len(part) for part in found]
    for ours, theirs in zip(whole, found, strict=True):
        assert all(torch.equal(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True))
    with pytest.raises(UsageError, match="batch 4 in micro-batches of 2 cannot be shared evenly by 4 processes"):
        AnnotatedLoader(train, make_detection_sample, 4, 0, "none", World(0, 4), 2)
    with pytest.raises(UsageError, match=r"by 4 processes; change --procs, batch or bn_batch \(bn_batch=2 would fit\)"):
        AnnotatedLoader(train, make_detection_sample, 8, 0, "none", World(0, 4), 4)
    with pytest.raises(UsageError, match="bn_batch 3 does not divide the batch of 8"):
        recipes.find_recipe("boxes", "detect").with_values({"bn_batch": "3"})


@pytest.mark.slow
def test_two_processes_train_bit_identically_to_one(trained: Path, tmp_path: Path) -> None:
    """BN sees the same micro-batches."""
    more = ("--set", "bn_batch=2", "--set", "threads=1")
    settings = [each.replace("batch=2", "batch=4") for each in SETTINGS] + [*more]
    models = []
    for procs in ([], ["--procs", "2"]):
        out = tmp_path / f"run{len(procs)}"
        with start_command("train", str(trained / "voc"), *settings, *procs, "--out", str(out), "--json") as process:
            stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert json.loads(stdout)["steps"] == 6
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_the_box_of_a_heat_map_surrounds_its_maximum() -> None:
    heat = torch.zeros(20, 30)
    heat[5:9, 10:16], heat[15:19, 20:29] = 1.0, 0.9  # two regions; the second is larger
    heat[6, 12] = 1.5
    assert box_around_peak(heat).tolist() == [10, 5, 16, 9]


def test_localise_compares_a_classifier_with_boxes(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = build("resnet18", seed=5, classes=2, **NET)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    file = tmp_path / "c.safetensors"
    TrainedModel(net, ("round", "other"), Preprocessing(3, (64, 64), 64, mean, std)).save(file)
    localise = ["detect", "localise", str(file), "--data", str(trained / "voc"), "--json"]
    assert resnetlab_([*localise, "--out", str(tmp_path / "out")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["split"] == "val" and found["n"] == 3 == len(list((tmp_path / "out").glob("*.place.png"))) == len(
        found["images"]
    )
    assert all((row["class"] == "round") or row["iou"] == 0 for row in found["images"])
    assert found["localisation_error"] == sum(row["iou"] < 0.5 for row in found["images"]) / 3
    for channels, dtype, code in ((1, "", 0), (5, "uint16", 2)):
        net = build("resnet18", seed=5, classes=2, channels=channels, **NET)
        images = Preprocessing(channels, (64, 64), 64, torch.zeros(channels), torch.ones(channels), dtype=dtype)
        TrainedModel(net, ("round", "other"), images).save(file)
        assert resnetlab_(localise) == code
    assert "the model takes 5 channels of 16 bits" in capsys.readouterr().err


def test_an_uneven_batch_is_refused_before_processes_start(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "detect",
        "train",
        str(trained / "voc"),
        "--set",
        "batch=3",
        "--procs",
        "2",
        "--out",
        str(trained / "none"),
    ]
    assert resnetlab_(arguments) == 2 and not (trained / "none").exists()
    assert "batch 3 cannot be shared evenly by 2 processes" in capsys.readouterr().err
