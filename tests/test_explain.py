"""Heat maps against autograd, blocks' shares against networks put together by hand, and the command with its files."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from images import photo
from resnetlab.cli.explain import _print_explanations
from resnetlab.cli.main import run_command
from resnetlab.device import select_device
from resnetlab.evaluation.gradcam import draw_overlay, grad_cam, make_cam_overlays
from resnetlab.evaluation.metrics import ClassificationMetrics
from resnetlab.inference.explain import explain
from resnetlab.inference.explain_figure import draw_explanation
from resnetlab.inference.predict import load
from resnetlab.models.lesion import remove_blocks
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.probes import measure_contributions
from resnetlab.models.resnet import ResNet, build
from resnetlab.preprocessing import Preprocessing

NETS = ("resnet8", "plain8", "preresnet8", "resnet18")
CLASSES = ("alpha", "größe ß", "红 花", "<b>&\x07", "e")


def random_network(name: str, **changes: object) -> tuple[ResNet, Tensor]:
    """A network in eval mode whose BN has statistics of its own, and images for it."""
    side = 65 if name == "resnet18" else 20
    net = build(name, classes=5, seed=0, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for buffer in net.buffers():
            if buffer.dtype == torch.float32:
                buffer += 0.3 * torch.rand(buffer.shape, generator=generator)
    return net.eval(), torch.randn(3, 3, side, side + 4, generator=generator)


def bundle(name: str = "resnet8") -> TrainedModel:
    net, _ = random_network(name)
    return TrainedModel(
        net, CLASSES, Preprocessing(3, (20, 24), 20, torch.full((3,), 0.5), torch.full((3,), 0.25)), 2.0
    )


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    bundle().save(path)
    return path


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("asked", [None, torch.tensor([4, 0, 2])], ids=["its answer", "given classes"])
def test_the_heat_map_is_autograds(name: str, asked: Tensor | None) -> None:
    net, x = random_network(name)
    last = net.forward_features(x).detach().requires_grad_()
    logits = net.fc(last.mean((2, 3)))
    chosen = logits.argmax(1) if asked is None else asked
    (gradient,) = torch.autograd.grad(logits.gather(1, chosen[:, None]).sum(), last)
    expected = F.relu((gradient.mean((2, 3), keepdim=True) * last).sum(1)).detach()
    expected = expected / expected.amax((1, 2), keepdim=True).clamp_min(1e-30)
    with torch.no_grad():
        heat, said = grad_cam(net, x, asked)
        torch.testing.assert_close(said, net(x))
    torch.testing.assert_close(heat, expected, atol=1e-5, rtol=1e-4)
    assert heat.ndim == 3 and float(heat.max()) == 1


def test_a_class_without_evidence_has_no_heat() -> None:
    net, x = random_network("resnet8")
    with torch.no_grad():
        net.fc.weight[2] = -net.fc.weight[2].abs()
        heat, _ = grad_cam(net, x, torch.tensor([2, 2, 2]))
    assert torch.equal(heat, torch.zeros_like(heat))


def test_the_heat_is_where_the_object_is() -> None:
    """A network that averages brightness: the bright corner must be hot, wherever it is."""
    net = build("plain8", classes=5, seed=0).eval()
    x = torch.zeros(2, 3, 32, 32)
    x[0, :, :8, :8] = x[1, :, -8:, -8:] = 1
    with torch.no_grad():
        net.fc.weight.fill_(1.0)
        heat, _ = grad_cam(net, x)  # (2, 8, 8)
    for one, (rows, columns) in zip(heat, [(slice(4), slice(4)), (slice(4, 8), slice(4, 8))], strict=True):
        assert float(one[rows, columns].sum()) > 0.8 * float(one.sum())


def test_the_overlay_leaves_cold_parts_unchanged() -> None:
    pixels = torch.full((30, 40, 3), 200, dtype=torch.uint8)
    heat = torch.zeros(8, 8)
    heat[:, 6:] = 1
    shown = np.asarray(draw_overlay(pixels, heat)).astype(int)
    assert shown.shape == (270, 360, 3)
    assert (shown[:, :60] == 200).all()
    assert shown[:, -20:, 0].mean() > shown[:, -20:, 2].mean() + 80  # yellow: much red, little blue
    assert draw_overlay(pixels[..., :1], heat).mode == "RGB"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"shortcut": "B"},
        {"shortcut": "C"},
        {"activation_order": "preact"},
        {"activation_order": "preact", "shortcut": "B"},
        {"shortcut": "exclusive-gate"},
        {"shortcut": "constant"},
        {"activation_order": "relu-only-preact"},
    ],
)
@torch.no_grad()
def test_contributions_are_the_terms_of_the_addition(changes: dict[str, object]) -> None:
    """Of the first block of stage 2: its input by a hook, F by the block without its shortcut, the shortcut by a lesion."""
    net, x = random_network("resnet8", **changes)
    found = measure_contributions(net, x)
    assert list(found) == [name for name, _ in net.blocks()]
    block = dict(net.blocks())["layer2.0"]
    seen: list[Tensor] = []
    handle = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    net(x)
    handle.remove()
    bare = dict(remove_blocks(net, "layer2.0").blocks())["layer2.0"]
    whole, only = dict(net.blocks())["layer2.0"], bare
    activation = whole.activation_order.after_add
    whole.activation_order = only.activation_order = whole.activation_order._replace(
        after_add=""
    )  # what stands before the last activation
    both, shortcut = whole(seen[0].clone()), only(seen[0].clone())
    whole.activation_order = whole.activation_order._replace(after_add=activation)
    expected = (both - shortcut).flatten(1).norm(dim=1) / shortcut.flatten(1).norm(dim=1)
    torch.testing.assert_close(found["layer2.0"], expected, atol=1e-4, rtol=1e-4)


def test_a_plain_network_has_no_ratios_but_is_explained(tmp_path: Path) -> None:
    bundle("plain8").save(tmp_path / "plain.safetensors")
    model = load(tmp_path / "plain.safetensors")
    explanation = explain(model, model.preprocessing(photo(1)))
    assert [share.ratio for share in explanation.blocks] == [None] * 3
    assert [share.score_without is None for share in explanation.blocks] == [
        False,
        True,
        True,
    ]  # the others change the shape
    assert "a plain network has no shortcut" in draw_explanation(explanation, "x.png")


@pytest.mark.parametrize("name", ["resnet8", "preresnet8"])
def test_scores_without_a_block_are_the_lesions(name: str, tmp_path: Path) -> None:
    bundle(name).save(tmp_path / "model.safetensors")
    model = load(tmp_path / "model.safetensors", device="cpu")
    pixels = model.preprocessing(photo(2))
    explanation = explain(model, pixels, top=2)
    assert explanation.top == model.predict(photo(2), top=2).top
    for share in explanation.blocks:
        with torch.no_grad():
            logits = remove_blocks(model.net, share.block)(model.preprocessing.normalise(pixels[None]))[0]
        scores = torch.softmax(logits / model.temperature, 0)
        assert share.predicted_without == CLASSES[int(scores.argmax())]
        assert share.score_without == pytest.approx(float(scores[CLASSES.index(explanation.top[0][0])]), abs=2e-6)


def test_the_figure_is_complete_and_reproducible(model_file: Path) -> None:
    model = load(model_file)
    explanation = explain(model, model.preprocessing(photo(3)))
    svg = draw_explanation(explanation, "<script>\x00 红.png")
    assert svg == draw_explanation(explanation, "<script>\x00 红.png")
    texts = [element.text for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]
    assert "<script>\ufffd 红.png" in texts and "layer3.0" in texts
    assert {name.replace("\x07", "\ufffd") for name in CLASSES} <= set(texts)
    assert "http" not in svg.replace("http://www.w3.org/", "")


def test_overlays_are_correct_images_of_every_class_and_the_most_confident_mistakes() -> None:
    net, _ = random_network("resnet8")
    preprocessing = Preprocessing(3, (20, 24), 20, torch.full((3,), 0.5), torch.ones(3))
    images = torch.stack([preprocessing(photo(i)) for i in range(8)])
    scores = torch.full((8, 5), 0.05)
    said = [0, 1, 0, 1, 2, 3, 4, 0]
    for i, answer in enumerate(said):
        scores[i, answer] = 0.5 + 0.01 * i
    evaluated = ClassificationMetrics.from_scores(CLASSES, scores, torch.tensor([0, 1, 0, 2, 2, 4, 0, 0]))
    shown = make_cam_overlays(net, evaluated, images, preprocessing, select_device("fp32", "cpu"), limit=2)  # type: ignore[arg-type]
    assert [(look.index, look.correct) for look in shown] == [(0, True), (1, True), (6, False), (5, False)]
    assert all(look.uri.startswith("data:image/jpeg;base64,") for look in shown)
    assert len({look.uri for look in shown}) == 4


def test_the_command_writes_two_files_for_each_image(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (("a", "one.jpg"), ("b", "one.png")):
        (tmp_path / folder).mkdir()
        photo(5 if folder == "a" else 6).save(tmp_path / folder / name)
    (tmp_path / "a" / "text.png").write_text("no image")
    out = tmp_path / "deep" / "explained"
    arguments = ["explain", str(model_file), str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out), "--top", "2"]
    assert run_command([*arguments, "--json"]) == 1
    said = capsys.readouterr()
    assert "1 of 3 images could not be read." in said.err
    first, bad, second = json.loads(said.out)["explanations"]
    assert set(bad) == {"image", "error"} and "not an image" in bad["error"]
    assert sorted(file.name for file in out.iterdir()) == [
        "one.blocks.svg", "one.heat.png", "one.png.blocks.svg", "one.png.heat.png",
    ]  # fmt: skip
    known = (
        (Path(__file__).parents[1] / "docs" / "json.md").read_text().split("## `resnetlab explain")[1].split("\n## ")[0]
    )
    assert all(f"`{key}`" in known for key in [*first, *first["blocks"][0], "explanations", "error"])
    for document in (first, second):
        assert len(document["top"]) == 2 and len(document["blocks"]) == 3
        with Image.open(document["heat"]) as heat:
            assert heat.size[0] >= 256
        assert Path(document["figure"]).read_text().startswith("<?xml")
    assert run_command([*arguments[:3], "--out", str(out)]) == 1  # as a table
    table = capsys.readouterr().out
    assert first["top"][0]["class"] in table and "layer" in table
    assert all(f"{file}\n" in table for file in (first["heat"], first["figure"]))


def test_requests_without_images_are_refused(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(1).save(tmp_path / "x.png")
    (tmp_path / "file").touch()
    for arguments, code, words in (
        ([], 2, "explain needs images"),
        ([str(tmp_path / "x.png"), "--top", "0"], 2, "--top must be 1 or more, not 0"),
        ([str(tmp_path / "x.png"), "--out", str(tmp_path / "file")], 1, "cannot write"),
        ([str(tmp_path / "y.png"), "--out", str(tmp_path / "none")], 1, "y.png is not there"),
    ):
        assert run_command(["explain", str(model_file), *arguments]) == code
        assert words in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_names_of_its_files_move_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    _print_explanations([{"image": "a\x1b[31m.png", "error": "no image", "figure": "a\x1b[31m.svg"}])
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"a\x1b[31m.png" in out and r"a\x1b[31m.svg" in out
