"""Weights to start from and to build with: published names, files of others, trunks; the right variant of the network."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

import resnetlab
from images import folder
from resnetlab.cli.main import run_command
from resnetlab.cli.train import TrainOptions, complete_recipe, read_overrides
from resnetlab.errors import UsageError
from resnetlab.inference.build import adapt_channels
from resnetlab.inference.start import NO_HEAD, choose_specification, find_pretrained, load_start
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.resnet import build
from resnetlab.models.spec import get_specification, nearest_name
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.recipe import Overrides
from resnetlab.training.recipes import find_recipe, read_recipe_file

SMALL: dict[str, Any] = {"widths": (4, 4, 4, 4), "depths": (1, 1, 1, 1)}


def save_model(path: Path, name: str, **changes: Any) -> Path:
    net = build(name, seed=0, **{"classes": 3, **changes}).eval()
    TrainedModel(net, tuple("abc"), Preprocessing(3, (32, 32), 32, torch.zeros(3), torch.ones(3))).save(path)
    return path


def state(name: str, **changes: Any) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in build(name, seed=0, **{"classes": 3, **changes}).state_dict().items()}


def test_values_that_mean_nothing_are_not_compared() -> None:
    """A ResNet-18 imported from torchvision (stride_in=3x3) is resnet18; a ResNet-50 with it is resnet50v1.5."""
    imported = get_specification("resnet18", stride_in="3x3", zero_pad="centre", gate_bias=-3.0)
    assert nearest_name(get_specification("plain14")) == ("plain14", {})
    assert nearest_name(imported) == ("resnet18", {}) and choose_specification("w", imported, "resnet18", {}) == []
    v15 = get_specification("resnet50", stride_in="3x3")
    (note,) = choose_specification("w", v15, "resnet50", {})
    assert "brings its own network, resnet50v1.5" in note and choose_specification("w", v15, "", {}) == []
    for net, changes in (("resnet34", {}), ("resnet50", {"stride_in": "first"}), ("", {"shortcut": "C"})):
        with pytest.raises(UsageError, match=r"holds another network than .* resnet50v1\.5"):
            choose_specification("w", v15, net, changes)
    assert get_specification("resnet20").canonical() == get_specification("resnet20", maxpool="ceil").canonical()
    assert get_specification("resnet20").canonical() != get_specification("resnet20", zero_pad="centre").canonical()


def test_starts_of_others(tmp_path: Path) -> None:
    """A whole network, a trunk, and a head of several layers; the stride of bottlenecks is assumed, and said."""
    whole = state("resnet50v1.5", **SMALL)
    trunk = {k: v for k, v in whole.items() if not k.startswith("fc.")}
    for content in (whole, trunk, {**trunk, "fc.0.weight": torch.ones(4, 16), "fc.2.weight": torch.ones(3, 4)}):
        torch.save(content, tmp_path / "w.pth")
        start = load_start(str(tmp_path / "w.pth"))
        assert start.model.spec.stride_in == "3x3" and any("ASSUMED: stride_in=3x3" in note for note in start.notes)
        assert torch.equal(start.model.net.layer4[0].conv2.weight, whole["layer4.0.conv2.weight"])  # type: ignore[index]
        assert (start.model.classes == NO_HEAD) is (content is not whole)
    for names, found in (
        (["cat", "dog", "eel"], ("cat", "dog", "eel")),
        (["cat", "cat", "eel"], ("class 0", "class 1", "class 2")),
    ):
        torch.save({"state_dict": whole, "class_names": names}, tmp_path / "w.pth")
        assert load_start(str(tmp_path / "w.pth")).model.classes == found  # by which the head's rows are matched
    first = load_start(str(tmp_path / "w.pth"), {"stride_in": "first"})
    assert first.model.spec.stride_in == "first" and not any("stride" in note for note in first.notes)


@pytest.mark.parametrize("start", ["torchvision:resnet18.IMAGENET1K_V1", "trunk.pth"])
def test_train_starts_from_weights_of_others(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published names and trunks are accepted, bring their network, and give the same weights after 0 learning rate."""
    small = state("resnet8", classes=3)
    monkeypatch.setattr(
        torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, **_: state("resnet18", classes=1000)
    )
    root = folder(tmp_path / "d", {"train": 4, "val": 2})
    torch.save({k: v for k, v in small.items() if "fc" not in k}, tmp_path / "trunk.pth")
    monkeypatch.chdir(tmp_path)
    values = {"start_from": start, "batch": "4", "image_size": "32", "lr": "1e-9", "val_images": "0", "precise_bn": "0"}
    recipe = Overrides(data=str(root), steps=1, values=values).apply(find_recipe("finetune", "classify"))
    assert recipe.net == ""
    with warnings.catch_warnings(action="ignore"):  # small images
        from resnetlab.training.train import start_run

        result = start_run(recipe, tmp_path / "run")
    model = load_trained_model(Path(result.model))
    named = read_recipe_file(tmp_path / "run" / "recipe.toml", "classify")
    assert (named.net, named.specification) == ("resnet18" if ":" in start else "resnet8", {}) and len(
        model.classes
    ) == 3
    expected = state("resnet18", classes=1000)["conv1.weight"] if ":" in start else small["conv1.weight"]
    torch.testing.assert_close(model.net.conv1.weight.detach(), expected, rtol=1e-3, atol=1e-5)


def test_unmarked_weights_in_a_v1_bottleneck_are_warned_of() -> None:
    """torchvision's ResNet-50 has the same names and shapes as resnet50, and other logits."""
    v1, v15 = (build(name, seed=0, classes=3, **SMALL) for name in ("resnet50", "resnet50v1.5"))
    plain = {k: v.clone() for k, v in v15.state_dict().items()}
    with pytest.warns(UserWarning, match=r"do not say where .* build 'resnet50v1\.5'"):
        v1.load_state_dict(plain)
    with pytest.warns(UserWarning, match=r"weights from resnet50v1\.5 are loaded into resnet50"):
        v1.load_state_dict(v15.state_dict())
    with pytest.warns(UserWarning, match="weights from resnet50 are loaded into"):
        v15.load_state_dict(v1.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        v1.load_state_dict(build("resnet50", seed=1, classes=3, **SMALL).state_dict())
        v15.load_state_dict(plain)
        build("resnet8", classes=3).load_state_dict(state("resnet8"))


def test_build_with_weights(tmp_path: Path) -> None:
    """The variant is the weights'; another number of classes gets a new head, of channels a converted first convolution."""
    file = str(save_model(tmp_path / "m.safetensors", "resnet50v1.5"))
    own = load_trained_model(Path(file)).net.state_dict()
    with pytest.warns(UserWarning, match=r"brings its own network, resnet50v1\.5") as caught:
        net = resnetlab.build("resnet50", weights=file)
    assert caught[0].filename == __file__  # not a line of ours
    assert net.training and net.spec.stride_in == "3x3" and torch.equal(net.fc.weight, own["fc.weight"])
    net = resnetlab.build("resnet50v1.5", weights=file, num_classes=7, in_chans=1, seed=0)
    assert net.fc.weight.shape == (7, 2048) and torch.equal(net.conv1.weight, own["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(net.layer1[0].conv1.weight, own["layer1.0.conv1.weight"])  # type: ignore[index]
    with pytest.raises(UsageError, match="holds another network"):
        resnetlab.build("resnet18", weights=file)
    with pytest.raises(UsageError, match="num_classes and classes are the same"):
        resnetlab.build("resnet18", num_classes=3, classes=3)
    with torch.device("meta"):
        assert resnetlab.build("resnet8", in_chans=1).conv1.weight.device.type == "meta"
    assert resnetlab.build("resnet8", device="meta").fc.bias.device.type == "meta"
    assert resnetlab.list_models("resnet*v1.5") == ["resnet50v1.5", "resnet101v1.5", "resnet152v1.5", "resnet200v1.5"]


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_channels_are_converted_as_timm_does(channels: int) -> None:
    manipulate = pytest.importorskip("timm.models._manipulate")
    kernels = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adapt_channels(kernels, channels), manipulate.adapt_input_conv(channels, kernels))


def test_pretrained_takes_the_named_networks_imagenet_weights(capsys: pytest.CaptureFixture[str]) -> None:
    options = TrainOptions(net="resnet50", pretrained=True)
    overrides = read_overrides("digits", options, {})
    assert overrides.values["start_from"] == "torchvision:resnet50.IMAGENET1K_V2"
    assert complete_recipe("classify", options, overrides).name == "finetune"
    assert find_pretrained("resnet101v1.5") == "torchvision:resnet101.IMAGENET1K_V2"
    for task, recipe, net in (
        ("classify", None, "resnet18"),
        ("classify", "modern", "resnet50"),
        ("detect", "paper-boxes", "resnet101"),
    ):
        options = TrainOptions(recipe=recipe, start_from="IMAGENET1K_V1")
        assert read_overrides("x", options, {}, task).values["start_from"] == f"torchvision:{net}.IMAGENET1K_V1"
    for command, message in (
        ("--pretrained", "give it. Other weights: --start-from"),
        ("--pretrained --net resnet20", "there are none of resnet20"),
        ("--pretrained --net resnet18 --start-from x", "two starts; give one of them"),
    ):
        assert run_command(["train", "digits", *command.split()]) == 2
        assert message in capsys.readouterr().err
