"""Detectors: torchvision's answer, the paper's form and additions, and a run through the loop, killed and gone on with."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

import cells
from residuum.cli.main import run as residuum_
from residuum.data import boxes
from residuum.data.ahead import Ahead
from residuum.data.samples import Draw, Samples, mirrored, mirrored_boxes
from residuum.errors import ModelFileError, UsageError
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.dense import Regions, detector
from residuum.models.dense_file import load_dense
from residuum.models.resnet import build
from residuum.models.testing import Scale, adjacent, detect
from residuum.models.values import Additions, Detector
from residuum.preprocessing import Preprocessing
from residuum.tasks.dense import start, statistics
from residuum.tasks.detect import anchor_sides, sample
from residuum.training import loop, recipes
from residuum.training.dense_recipe import DetectRecipe
from residuum.training.result import BoxResult
from residuum.use.localise import around, iou
from residuum.world import World

VALUES: dict[str, Any] = {
    "size": 72, "longest": 128, "mean": (0.5,) * 3, "std": (0.25,) * 3, "bn": "fixed", "frozen": "", "context": False,
}  # fmt: skip
NET = {"widths": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
FORMS = {"fpn": (8, 16, 32, 64, 128), "c4": (16, 32)}


def small(form: str, context: bool = False, **changes: Any) -> Any:
    values = Detector(**VALUES | {"form": form, "anchors": FORMS[form], "context": context, "pyramid": 16})
    torch.manual_seed(0)
    return detector(build("resnet18", seed=0, **NET | changes), values, 2, seed=1).eval()


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(3, 72, 90, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("context", [False, True])
def test_both_forms_learn_and_answer(form: str, context: bool) -> None:
    net = small(form, context)
    targets = [{"boxes": torch.tensor([[4.0, 4, 30, 30]]), "labels": torch.tensor([1])}] * 2
    losses = net.train()([picture(), picture(1)], targets)
    assert 0 <= float(losses.pop("error")) <= 1
    torch.stack(list(losses.values())).sum().backward()
    unused = [k for k, p in net.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []
    with torch.inference_mode():
        assert net.eval()([picture()])[0]["boxes"].shape[1] == 4


def test_c4_shares_conv1_to_conv4_and_pools_before_conv5() -> None:
    net = small("c4")
    shapes = {}
    net.backbone.register_forward_hook(
        lambda m, i, out: shapes.update(maps={k: tuple(v.shape) for k, v in out.items()})
    )
    net.roi_heads.box_head.stage.register_forward_hook(lambda m, i, out: shapes.update(at=i[0].shape, out=out.shape))
    with torch.inference_mode():
        net([picture()])
    assert shapes["maps"] == {"0": (1, 8, 6, 6)}  # 72x90, padded to 96x96, 16 pixels a step
    assert shapes["at"][1:] == (8, 14, 14) and shapes["out"][1:] == (8, 7, 7)
    names = set(net.state_dict())
    assert "roi_heads.box_head.stage.0.conv1.weight" in names and not any("layer4" in n or "fc." in n for n in names)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_said_of_a_picture_does_not_depend_on_the_one_before(form: str) -> None:
    """torchvision's pooling guesses the maps' strides from the first picture, and wrongly from a narrow one."""
    fresh, used = small(form), small(form)
    used.transform.min_size = (66,)  # padded to 96
    with torch.inference_mode():
        used([picture(1)])
        used.transform.min_size = fresh.transform.min_size
        assert all(torch.equal(a, b) for a, b in zip(*(n([picture()])[0].values() for n in (fresh, used)), strict=True))
    assert fresh.roi_heads.box_roi_pool.scales == [1 / s for s in ((4, 8, 16, 32) if form == "fpn" else (16,))]


def test_preactivated_c4_ends_in_its_last_activation() -> None:
    net = small("c4", order="preact")
    with torch.inference_mode():
        features = net.roi_heads.box_head(torch.randn(3, 8, 14, 14))
    assert features.shape == (3, 8) and float(features.min()) >= 0


def test_without_additions_the_answer_is_torchvisions() -> None:
    from torchvision.models.detection.roi_heads import RoIHeads

    net = small("fpn")
    net.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        ours = detect(net, picture(), Additions())
        refined = detect(net, picture(), Additions(refine=True))
        own = cast(Any, RoIHeads.forward)  # torchvision's forward on the same parts
        images, _ = net.transform([picture()])
        maps = net.backbone(images.tensors)
        theirs, _ = own(net.roi_heads, maps, net.rpn(images, maps)[0], images.image_sizes)
    assert len(ours[0]) > 10
    torch.testing.assert_close(ours[0], theirs[0]["boxes"] * 1.0, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours[1], theirs[0]["scores"], rtol=0, atol=1e-6)
    assert len(refined[0]) and not torch.equal(refined[0][:5], ours[0][:5])


def test_multi_scale_testing_at_equal_scales_changes_nothing() -> None:
    """Two scales that are both the detector's own: the larger of each feature is the feature."""
    net = small("fpn")
    net.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        plain = detect(net, picture(), Additions())
        doubled = Additions(sides=(72, 73))
        object.__setattr__(doubled, "sides", (72, 72))
        torch.testing.assert_close(detect(net, picture(), doubled)[1], plain[1], rtol=0, atol=1e-5)
        other = detect(net, picture(), Additions(sides=(66, 72, 96)))
    assert len(other[0]) and not torch.allclose(other[1][:5], plain[1][:5])


def test_the_two_scales_are_those_that_bring_a_box_nearest_to_224_of_600() -> None:
    scales = [Scale({}, (300 * k // 2, 1)) for k in (1, 2, 3, 4)]  # of a picture of 300: 150, 300, 450, 600
    boxes = torch.tensor([[0.0, 0, 112, 112], [0, 0, 30, 30], [0, 0, 290, 290], [0, 0, 70, 70]])
    assert adjacent(boxes, (300, 1), scales, 300).tolist() == [1, 2, 0, 2]


def test_votes_are_means_weighted_by_score() -> None:
    from residuum.models.testing import _kept

    regions = cast(Regions, small("fpn").roi_heads)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 12, 10], [40, 40, 50, 50]])
    scores = torch.tensor([[0.2, 0.6, 0.2], [0.6, 0.3, 0.1], [0.1, 0.0, 0.9]])
    found, values, labels = _kept(regions, boxes[:, None].expand(3, 3, 4), scores, vote=True)
    where = (labels == 1).nonzero().flatten()
    assert values[where].tolist() == [pytest.approx(0.6)]
    assert found[where][0].tolist() == pytest.approx([0, 0, (0.6 * 10 + 0.3 * 12) / 0.9, 10])


def test_flips_carry_the_boxes_along() -> None:
    pixels = torch.zeros(64, 80, 3, dtype=torch.uint8)
    pixels[10:20, 5:25] = 255
    for draw in (Draw(True, False, 0, 0, 0), Draw(False, True, 0, 0, 0), Draw(True, True, 0, 0, 0)):
        x1, y1, x2, y2 = map(int, mirrored_boxes(torch.tensor([[5.0, 10, 25, 20]]), (64, 80), draw)[0])
        turned = mirrored(pixels, draw)
        assert turned[y1:y2, x1:x2].min() == 255 and int((turned > 0).sum()) == 10 * 20 * 3


SETTINGS = (
    "--steps", "6", "--net", "resnet18", "--set", "widths=8,8,8,8", "--set", "depths=1,1,1,1", "--set", "size=72",
    "--set", "longest=96", "--set", "sides=66", "--set", "batch=2", "--set", "regions=16", "--set", "pyramid=8",
    "--set", "record_every=1", "--set", "judge_every=3", "--set", "held_out=2", "--set", "checkpoint_minutes=0",
    "--device", "cpu",
)  # fmt: skip


def command(*arguments: str, task: str = "detect") -> subprocess.Popen[str]:
    code = f"from residuum.cli.main import main\nmain({[task, *arguments]!r})"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data and a finished run."""
    root = tmp_path_factory.mktemp("detect")
    cells.voc(root / "voc")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert residuum_(["detect", "train", str(root / "voc"), *SETTINGS, "--out", str(root / "run"), "--json"]) == 0
    (root / "printed.json").write_text(printed.getvalue())
    return root


def test_a_run_has_all_its_parts(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "run"
    printed = json.loads((trained / "printed.json").read_text())
    assert (
        printed["split"] == "val"
        and printed["n"] == 3
        and [c["class"] for c in printed["per_class"]] == ["round", "square"]
    )
    assert json.loads((run / "drawn.json").read_text())["judged while training"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "held_out"] == [3, 6]
    page = (run / "report.html").read_text()
    assert "mAP@.5" in page and page.count("data:image/jpeg") == 3 and "http-equiv" in page and 'src="http' not in page
    assert (
        residuum_(["detect", "evaluate", str(run / "model.safetensors"), "--data", str(trained / "voc"), "--json"]) == 0
    )
    figures = json.loads(capsys.readouterr().out)
    assert figures["map"] == printed["map"] and figures["per_class"] == printed["per_class"]


def test_predict_draws_and_tells(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, image = str(trained / "run" / "model.safetensors"), str(trained / "voc" / "JPEGImages" / "p7.png")
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    out = tmp_path / "found"
    code = residuum_(["detect", "predict", model, image, str(tmp_path / "no.jpg"), "--score", "0", "--out", str(out)])
    printed = capsys.readouterr()
    first, second = json.loads(printed.out)["predictions"]
    assert code == 1 and "no.jpg" in second["error"] and "1 of 2 pictures" in printed.err
    assert {"class", "score", "box"} == set(first["boxes"][0])
    with Image.open(first["drawn"]) as drawn:
        assert drawn.size == (80, 64)
    assert residuum_(["predict", model, image]) == 1
    assert "is no classifier; use it with: residuum detect predict" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with command("train", str(trained / "voc"), *SETTINGS, "--out", str(out)) as process:
        deadline = time.monotonic() + 120
        while not list((out / "checkpoints").glob("step-*2.safetensors")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL and not (out / "model.safetensors").exists()
    with command("train", "--resume", str(out)) as process:
        _, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert "going on from step" in stderr
    assert (out / "model.safetensors").read_bytes() == (trained / "run" / "model.safetensors").read_bytes()


def test_a_run_is_gone_on_with_by_its_own_command(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained / "run"
    assert residuum_(["train", "--resume", str(run)]) == 1
    assert f"is a run of another task; go on with: residuum detect train --resume {run}" in capsys.readouterr().err


def test_a_classifier_is_started_from(trained: Path, tmp_path: Path) -> None:
    """Its weights and preprocessing are taken over; another network's, or a detector's, are refused."""
    net = build("resnet18", seed=5, classes=4, **NET)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.4, 0.5, 0.6])
    file = tmp_path / "classifier.safetensors"
    Bundle(net, ("a", "b", "c", "d"), Preprocessing(3, (32, 32), 32, mean, std)).save(file)
    begun = start("resnet18", NET, file, "fan_in", 0, "fixed", iter(()))
    assert begun.mean == pytest.approx(mean.tolist()) and begun.std == pytest.approx(std.tolist())
    assert all(torch.equal(v, begun.net.state_dict()[k]) for k, v in net.state_dict().items())
    with pytest.raises(UsageError, match="holds another network than resnet18"):
        start("resnet18", NET | {"shortcut": "A"}, file, "fan_in", 0, "fixed", iter(()))
    with pytest.raises(ModelFileError, match="is no classifier"):
        start("resnet18", NET, trained / "run" / "model.safetensors", "fan_in", 0, "fixed", iter(()))


def test_fixed_bn_needs_a_classifier(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["detect", "train", str(trained / "voc"), "--set", "bn=fixed", "--out", str(trained / "none")]
    assert residuum_(arguments) == 2 and not (trained / "none").exists()
    assert "bn=fixed keeps the statistics of a classifier" in capsys.readouterr().err


def test_workers_change_nothing(trained: Path) -> None:
    steps = Samples(boxes.load(trained / "voc").train, sample, 4, 0, "both")
    alone, helped = Ahead(steps, 0), Ahead(steps, 1)
    for step in (0, 1, 5):  # the last is out of turn
        for a, b in zip(*(it.get(step).parts[0] for it in (alone, helped)), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    helped.close()


def test_statistics_are_those_of_all_pixels() -> None:
    pictures = [torch.randint(256, (n, 7, 3), dtype=torch.uint8) for n in (5, 9)]
    pixels = torch.cat([p.reshape(-1, 3) for p in pictures]).double() / 255
    mean, std = statistics(pictures)
    assert mean == pytest.approx(pixels.mean(0).tolist(), abs=1e-6)
    assert std == pytest.approx(pixels.std(0, correction=0).tolist(), abs=1e-6)


def test_anchors_fit_the_boxes(tmp_path: Path) -> None:
    train = boxes.load(cells.voc(tmp_path)).train  # sides from 16 to 25 pixels in pictures whose shorter side is 64
    assert anchor_sides(train, 128, 1000, "fpn") == pytest.approx((20, 40, 80, 160, 320), rel=0.12)
    assert all(30 <= side <= 52 for side in anchor_sides(train, 128, 1000, "c4"))


def test_recipes_know_their_own_values_alone(trained: Path) -> None:
    recipe = recipes.named("boxes", "detect")
    assert isinstance(recipe, DetectRecipe) and recipe.name == "boxes"
    with pytest.raises(UsageError, match="unknown key 'crop'"):
        recipe.with_values({"crop": "scale"})
    with pytest.raises(UsageError, match="did you mean 'anchors'"):
        recipe.with_values({"anchor": "1"})
    with pytest.raises(UsageError, match="plateau watches a held-out error"):
        recipe.with_values({"schedule": "plateau"})
    with pytest.raises(UsageError, match="unknown recipe 'photos'"):
        recipes.named("photos", "detect")
    assert DetectRecipe.from_values(recipe.to_json()) == recipe
    again = loop.resume(trained / "run", task="detect")
    assert isinstance(again, BoxResult) and again.steps == 6


def test_model_files_of_another_kind_are_told_apart(trained: Path) -> None:
    model = trained / "run" / "model.safetensors"
    assert load_dense(model, "detect").classes == ("round", "square")
    with pytest.raises(ModelFileError, match="is a detector, and a segmenter is needed here"):
        load_dense(model, "segment")
    with pytest.raises(ModelFileError, match="is no classifier"):
        load_bundle(model)


def test_the_onnx_graph_says_the_same(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="onnx and onnxruntime are not installed")
    other = tmp_path / "wide.png"
    cells.scene(20)[0].resize((150, 70)).save(other)  # a size that the graph was not traced with
    model, known = str(trained / "run" / "model.safetensors"), str(trained / "voc" / "JPEGImages" / "p7.png")
    assert residuum_(["detect", "export", model, known, str(other), "--out", str(tmp_path / "m.onnx"), "--json"]) == 0
    proof = json.loads(capsys.readouterr().out)
    assert proof["pictures"] == 2 and proof["agreement"] > 0.99 and proof["largest_difference"] < 0.01


def test_the_papers_form_and_additions_from_the_command_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = str(trained / "voc"), str(tmp_path / "c4")
    more = ("--set", "form=c4", "--set", "context=true", "--steps", "2")
    assert residuum_(["detect", "train", data, *SETTINGS[2:], *more, "--out", out]) == 0
    assert load_dense(Path(out) / "model.safetensors", "detect").values.form == "c4"
    capsys.readouterr()
    plain = ["detect", "evaluate", f"{out}/model.safetensors", "--data", data, "--json"]
    assert residuum_([*plain, "--refine", "--scales", "66,72,90"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (
        figures["refine"] is True
        and figures["context"] is True
        and figures["scales"] == [66, 72, 90]
        and 0 <= figures["map"] <= figures["map_50"]
    )
    assert residuum_([*plain, "--scales", "66"]) == 2 and "two or more rising lengths" in capsys.readouterr().err


def test_every_number_of_processes_shows_the_same_pictures_in_the_same_parts(trained: Path) -> None:
    train = boxes.load(trained / "voc").train
    whole = Samples(train, sample, 4, 0, "both", together=2)(3).parts
    halves = [Samples(train, sample, 4, 0, "both", World(rank, 2), 2)(3).parts for rank in range(2)]
    found = [part for half in halves for part in half]
    assert [len(part) for part in whole] == [2, 2] == [len(part) for part in found]
    for ours, theirs in zip(whole, found, strict=True):
        assert all(torch.equal(x, y) for a, b in zip(ours, theirs, strict=True) for x, y in zip(a, b, strict=True))
    with pytest.raises(UsageError, match="batch 4 in parts of 2 cannot be shared evenly by 4 processes"):
        Samples(train, sample, 4, 0, "none", World(0, 4), 2)
    with pytest.raises(UsageError, match="bn_batch 3 does not divide the batch of 8"):
        recipes.named("boxes", "detect").with_values({"bn_batch": "3"})


@pytest.mark.slow
def test_two_processes_come_to_the_bits_of_one(trained: Path, tmp_path: Path) -> None:
    """With the parts that BN sees the same."""
    more = ("--set", "bn_batch=2", "--set", "threads=1")
    settings = [each.replace("batch=2", "batch=4") for each in SETTINGS] + [*more]
    models = []
    for procs in ([], ["--procs", "2"]):
        out = tmp_path / f"run{len(procs)}"
        with command("train", str(trained / "voc"), *settings, *procs, "--out", str(out), "--json") as process:
            stdout, stderr = process.communicate()
        assert process.returncode == 0, stderr
        assert json.loads(stdout)["steps"] == 6
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1]


def test_the_box_of_a_heat_map_lies_around_its_highest_part() -> None:
    heat = torch.zeros(20, 30)
    heat[5:9, 10:16], heat[15:19, 20:29] = 1.0, 0.9  # two places; the second is larger
    heat[6, 12] = 1.5
    assert around(heat).tolist() == [10, 5, 16, 9]
    assert iou(torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])) == pytest.approx(1 / 3)


def test_a_classifier_is_held_against_boxes(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = build("resnet18", seed=5, classes=2, **NET)
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)
    file = tmp_path / "c.safetensors"
    Bundle(net, ("round", "other"), Preprocessing(3, (64, 64), 64, mean, std)).save(file)
    command = [
        "detect",
        "localise",
        str(file),
        "--data",
        str(trained / "voc"),
        "--out",
        str(tmp_path / "out"),
        "--json",
    ]
    assert residuum_(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n"] == 3 == len(list((tmp_path / "out").glob("*.place.png"))) == len(found["pictures"])
    assert all((row["class"] == "round") or row["iou"] == 0 for row in found["pictures"])
    assert found["localisation_error"] == sum(row["iou"] < 0.5 for row in found["pictures"]) / 3


def test_processes_that_cannot_share_are_told_before_they_start(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert residuum_(arguments) == 2 and not (trained / "none").exists()
    assert "batch 3 cannot be shared evenly by 2 processes" in capsys.readouterr().err
