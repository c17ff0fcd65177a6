"""Weights of other programs: every layout on disk, equal outputs, assumptions reported, no code executed."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import resnetlab
from resnetlab.cli.main import run_command
from resnetlab.errors import ModelFileError, ResNetLabError, UsageError
from resnetlab.inference.classes import dataset_class_names, parse_class_names
from resnetlab.inference.export import export_weights
from resnetlab.inference.import_model import ImportOptions, import_weights
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.resnet import ResNet, build
from resnetlab.preprocessing import Preprocessing

FIVE = "a,b,c,d,e"
PREPARED: dict[str, Any] = {"mean": (0.49, 0.48, 0.45), "std": (0.25, 0.24, 0.26)}


def randomise(net: nn.Module) -> Any:
    """Sets BN statistics and affine parameters to random values; eval mode."""
    draw = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                cast(Tensor, value).copy_(torch.rand(cast(Tensor, value).shape, generator=draw) + 0.5)
    return net.eval()


def clone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def drop_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in clone_state(state).items() if not name.endswith("num_batches_tracked")}


def add_prefix(prefix: str) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {prefix + name: value for name, value in clone_state(state).items()}


def rename_like_cifar(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace("fc.", "linear.").replace("downsample", "shortcut"): v for name, v in clone_state(state).items()
    }


LAYOUTS: dict[str, tuple[str, Callable[[Mapping[str, Tensor]], Any]]] = {
    "a state_dict": ("w.pth", clone_state),
    "counts missing": ("w.pt", drop_counters),
    "under state_dict, in module.": (
        "w.th",
        lambda s: {"state_dict": add_prefix("module.")(s), "best_prec1": 91.7, "epoch": 3},
    ),
    "under model": ("w.pth", lambda s: {"model": clone_state(s), "optimizer": {"state": {}, "lr": [0.1]}}),
    "under net": ("w.pt", lambda s: {"net": add_prefix("_orig_mod.module.")(s), "acc": 93.0}),
    "under model_ema": ("w.pth", lambda s: {"model_ema": clone_state(s)}),
    "nested twice": ("w.pth", lambda s: {"model": {"state_dict": clone_state(s)}}),
    "backbone.": ("w.bin", add_prefix("backbone.")),
    "within another network": ("w.ckpt", lambda s: {"state_dict": add_prefix("module.encoder_q.")(s)}),
    "linear and shortcut": ("w.pth", rename_like_cifar),
    "safetensors": ("w.safetensors", clone_state),
    "npz": ("w.npz", clone_state),
}


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    elif path.suffix == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in content.items()})
    else:
        torch.save(content, path)
    return path


def assert_same(model: TrainedModel, other: nn.Module, size: int, channels: int = 3) -> None:
    x = torch.randn(2, channels, size, size + 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        expected, found = other.double()(x), model.net.double()(x)
    assert expected.std(0).min() > 0
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return randomise(torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=5))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchvisions_networks_in_every_layout(layout: str, small: nn.Module, tmp_path: Path) -> None:
    """Written to a file, imported, saved as a model file, loaded: equal logits in float64."""
    name, arranged = LAYOUTS[layout]
    model, _ = import_weights(
        write(tmp_path / name, arranged(small.state_dict())), ImportOptions(classes=FIVE, **PREPARED)
    )
    model.save(tmp_path / "model.safetensors")
    assert_same(load_trained_model(tmp_path / "model.safetensors"), copy.deepcopy(small), 75)


@pytest.mark.parametrize(
    ("source", "name", "layout"),
    [
        ("torchvision", "resnet50", "a state_dict"),
        ("timm", "resnet50", "safetensors"),
        ("timm", "resnet26", "a state_dict"),
        ("timm", "resnet34", "safetensors"),
    ],
)
def test_other_networks(source: str, name: str, layout: str, tmp_path: Path) -> None:
    make = torchvision.models.get_model if source == "torchvision" else timm.create_model
    other = randomise(make(name, num_classes=5))
    file, arranged = LAYOUTS[layout]
    path = write(tmp_path / file, arranged(other.state_dict()))
    model, _ = import_weights(
        path, ImportOptions(classes=FIVE, source=source if source == "torchvision" else f"{source}:{name}")
    )
    assert_same(model, other, 70)
    assert model.preprocessing.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])  # known of the source


def test_caffes_values_under_torchvisions_names(tmp_path: Path) -> None:
    """Converted files keep BGR and the max-pool, which names do not determine: --source caffe and --channel-order bgr do."""
    net = randomise(build("resnet50", depths=(1, 1, 1, 1), classes=5, maxpool="ceil", conv1_bias=True, seed=0))
    state = clone_state(net.state_dict())
    state["conv1.weight"] = state["conv1.weight"].flip(1)
    torch.save(state, tmp_path / "w.pth")
    given: dict[str, Any] = {"classes": FIVE, "mean": [0.4], "std": [1 / 255]}
    model, _ = import_weights(tmp_path / "w.pth", ImportOptions(source="caffe", channel_order="bgr", **given))
    assert model.spec == net.spec
    assert_same(model, net, 70)
    changes = {"stride_in": "first", "maxpool": "ceil"}
    assert_same(
        import_weights(tmp_path / "w.pth", ImportOptions(changes=changes, channel_order="bgr", **given))[0], net, 70
    )


def test_caffes_max_pool_is_not_torchvisions() -> None:
    """No padding, over the far edge: the same size of map, other windows."""
    caffe, other = build("resnet18", maxpool="ceil", seed=0).maxpool, build("resnet18", seed=0).maxpool
    assert caffe is not None and other is not None
    x = torch.arange(112.0).expand(1, 1, 112, 112)
    assert caffe(x).shape == other(x).shape == (1, 1, 56, 56)
    assert caffe(x)[0, 0, 0, :2].tolist() == [2, 4] and other(x)[0, 0, 0, :2].tolist() == [1, 3]


def test_option_a_and_the_place_of_its_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """akamaster's files: `linear`, in `module.`, zeros centred; reported. The specification decides what is computed."""
    net = randomise(build("resnet20", zero_pad="centre", seed=0))
    write(
        tmp_path / "r20.th",
        {"state_dict": rename_like_cifar(add_prefix("module.")(net.state_dict())), "best_prec1": 91.7},
    )
    out = tmp_path / "m.safetensors"
    arguments = [
        "import",
        str(tmp_path / "r20.th"),
        "--classes",
        "cifar10",
        "--mean",
        "0.49,0.48,0.45",
        "--std",
        "0.25,0.24,0.26",
    ]
    assert run_command([*arguments, "--out", str(out), "--json"]) == 0
    out_text, err = capsys.readouterr()
    about = json.loads(out_text)
    assert about["specification"]["zero_pad"] == "centre" and about["specification"]["depths"] == [3, 3, 3]
    assert about["classes"][0] == "airplane" and about["preprocessing"]["size"] == [32, 32]
    assert "ASSUMED" in err and "--set zero_pad=" in err and "shortcut=none" in err
    assert_same(load_trained_model(out), net, 32)
    assert run_command([*arguments, "--out", str(out), "--set", "zero_pad=append"]) == 0
    assert load_trained_model(out).spec.zero_pad == "append" and "zero_pad           append" in capsys.readouterr().out


def test_a_network_with_projections_on_cifar(tmp_path: Path) -> None:
    """kuangliu's layout: option B called shortcut, `linear`, four stages from width 64."""
    net = randomise(build("resnet18", stem="cifar", classes=10, widths=(8, 16, 32, 64), seed=0))
    write(tmp_path / "w.pth", {"net": rename_like_cifar(net.state_dict()), "acc": 95.0, "epoch": 1})
    model, notes = import_weights(tmp_path / "w.pth", ImportOptions(classes="cifar10", **PREPARED))
    assert model.spec == net.spec and not any("zero_pad" in note for note in notes)


@pytest.mark.parametrize(("name", "given", "sentence"), [
    ("resnet50", {"classes": FIVE, **PREPARED}, "where the bottlenecks have their stride: give --source torchvision"),
    ("resnet18", {"classes": FIVE}, "does not contain its preprocessing: give --mean and --std"),
    ("resnet18", {"classes": FIVE, "mean": [0.5]}, "give --std, in units of [0, 1]"),
    ("resnet18", PREPARED, "does not name its 5 classes: give --classes"),
    ("resnet18", {"classes": "cifar10", **PREPARED}, "gives 10 names, but the network has 5 classes"),
    ("resnet18", {"classes": "cifar11", **PREPARED}, "is neither a data set"),
    ("resnet18", {"classes": "a,b,c,d,a", **PREPARED}, "every class needs a name of its own"),
    ("resnet18", {"classes": FIVE, "mean": [1, 2], "std": [1]}, "--mean takes 3 numbers, one per channel, or one for all"),
    ("resnet18", {"classes": FIVE, "mean": [0], "std": [0]}, "above 0"),
    ("resnet18", {"classes": FIVE, "source": "torchvison"}, "did you mean 'torchvision'?"),
    ("resnet18", {"classes": FIVE, **PREPARED, "image_size": 224, "eval_resize": 200},
     "--eval-resize 200 must be at least --image-size 224"),
    ("resnet18", {"classes": FIVE, **PREPARED, "channel_order": "grb"}, "unknown channel order 'grb'"),
])  # fmt: skip
def test_missing_and_invalid_options(name: str, given: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        meta = torchvision.models.get_model(name, num_classes=5).state_dict()
    torch.save({k: torch.zeros(v.shape) for k, v in meta.items()}, tmp_path / "w.pth")
    with pytest.raises(UsageError) as error:
        import_weights(tmp_path / "w.pth", ImportOptions(**given))
    assert sentence in str(error.value)


def test_tensors_that_do_not_match_are_named(tmp_path: Path) -> None:
    good = clone_state(build("resnet8", seed=0).state_dict())
    wrong = {
        "missing layer2.0.bn1.running_var": {k: v for k, v in good.items() if k != "layer2.0.bn1.running_var"},
        "not expected layer1.0.bn1.wait (nearest expected: layer1.0.bn1.weight)": {
            ("layer1.0.bn1.wait" if k == "layer1.0.bn1.weight" else k): v for k, v in good.items()
        },
        "misshapen layer1.0.conv2.weight is 16x16x5x5, not 16x16x3x3": good
        | {"layer1.0.conv2.weight": torch.zeros(16, 16, 5, 5)},
        "stages or blocks are missing": {k: v for k, v in good.items() if not k.startswith("layer2")},
        "conv1.weight, layer1.0.conv1.weight … and fc.weight are expected": {"stem.weight": torch.zeros(3)},
    }
    for sentence, state in wrong.items():
        torch.save(state, tmp_path / "w.pth")
        with pytest.raises(ModelFileError) as error:
            import_weights(tmp_path / "w.pth", ImportOptions(classes="cifar10", **PREPARED))
        assert sentence in str(error.value)
    torch.save(timm.create_model("resnet26d").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ModelFileError, match="of a known layout"):
        import_weights(tmp_path / "w.pth", ImportOptions(classes="imagenet", source="timm"))


class Malicious:
    """A pickle of this runs a command when it is loaded carelessly."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_a_malicious_file_is_rejected_and_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "executed"
    torch.save({"state_dict": {"conv1.weight": torch.zeros(1)}, "args": Malicious(trace)}, tmp_path / "zip.pth")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(trace)))
    torch.save({"a": Malicious(trace)}, tmp_path / "old.th", _use_new_zipfile_serialization=False)
    np.savez(tmp_path / "array.npz", a=np.array([Malicious(trace)], dtype=object))
    for name in ("zip.pth", "plain.pt", "old.th", "array.npz"):
        code = run_command(
            [
                "import",
                str(tmp_path / name),
                "--classes",
                "cifar10",
                "--mean",
                "0",
                "--std",
                "1",
                "--out",
                str(tmp_path / "m"),
            ]
        )
        err = capsys.readouterr().err
        assert code == 1 and "could execute code, so it is refused" in err and err.count("\n") == 1, err
        assert not trace.exists() and not (tmp_path / "m").exists()
    with open(tmp_path / "plain.pt", "rb") as file:  # loading it carelessly does
        pickle.load(file)
    assert trace.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
def test_empty_truncated_and_missing_files(suffix: str, tmp_path: Path) -> None:
    whole = write(tmp_path / f"w{suffix}", clone_state(build("resnet8", seed=0).state_dict())).read_bytes()
    file = tmp_path / f"bad{suffix}"
    for content, sentence in (
        (b"", "is empty"),
        (whole[: len(whole) // 2], "download or copy it again"),
        (b"hello", str(file)),
    ):
        file.write_bytes(content)
        with pytest.raises(ModelFileError) as error:
            import_weights(file, ImportOptions(classes="cifar10", **PREPARED))
        assert sentence in str(error.value)
    file.unlink()
    with pytest.raises(ModelFileError, match="does not exist"):
        import_weights(file, ImportOptions())
    with pytest.raises(ModelFileError, match="is a folder"):
        import_weights(tmp_path, ImportOptions())


def test_choosing_between_several_sets_of_weights(tmp_path: Path) -> None:
    one, other = (clone_state(build("resnet8", seed=seed).state_dict()) for seed in (0, 1))
    torch.save({"model": one, "model_ema": other}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="several sets of weights: model, model_ema; choose one with --key model"):
        import_weights(tmp_path / "w.pth", ImportOptions(classes="cifar10", **PREPARED))
    model, _ = import_weights(tmp_path / "w.pth", ImportOptions(classes="cifar10", key="model_ema", **PREPARED))
    assert torch.equal(model.net.conv1.weight, other["conv1.weight"])


NAMES = ["ant", "bee", "cat", "dog", "eel"]
NAMED: dict[str, Callable[[Any], Any]] = {
    "w.pth": lambda s: {"state_dict": s, "classes": NAMES, "epoch": 3},
    "tuple.pt": lambda s: {"model": s, "class_names": tuple(NAMES)},
    "to_idx.pth": lambda s: {
        "model_state_dict": s,
        "class_to_idx": {name: i for i, name in reversed([*enumerate(NAMES)])},
    },
    "id2label.pth": lambda s: {"net": s, "config": {"id2label": {str(i): name for i, name in enumerate(NAMES)}}},
    "ultralytics.pt": lambda s: {"model": s, "names": dict(enumerate(NAMES))},
    "mmengine.pth": lambda s: {"state_dict": s, "meta": {"dataset_meta": {"CLASSES": NAMES}}},
    "lightning.ckpt": lambda s: {"state_dict": s, "hyper_parameters": {"lr": 0.1, "class_names": NAMES}},
    "beside.pth": lambda s: {**s, "classes": NAMES},
    "w.npz": dict,
    "json.safetensors": lambda s: {"classes": json.dumps(NAMES)},
    "commas.safetensors": lambda s: {"class_names": ", ".join(NAMES)},
}


@pytest.mark.parametrize("name", NAMED)
def test_class_names_in_a_checkpoint_are_taken(name: str, small: nn.Module, tmp_path: Path) -> None:
    """In the order of the outputs, as others write them; a note says so, and --classes replaces them."""
    state, file = drop_counters(small.state_dict()), tmp_path / name
    content = NAMED[name](state)
    if file.suffix == ".safetensors":
        save_file(state, file, metadata=content)
    elif file.suffix == ".npz":
        np.savez(file, **{k: v.numpy() for k, v in state.items()}, classes=np.array(NAMES))
    else:
        torch.save(content, file)
    model, notes = import_weights(file, ImportOptions(**PREPARED))
    assert model.classes == tuple(NAMES) and torch.equal(model.net.state_dict()["fc.weight"], state["fc.weight"])
    assert "classes named in the file: ant, bee, cat, dog and 1 more; change them with --classes" in notes
    assert import_weights(file, ImportOptions(classes=FIVE, **PREPARED))[0].classes == ("a", "b", "c", "d", "e")


@pytest.mark.parametrize(("names", "why"), [
    (NAMES[:1], "1 name for 5 outputs"), (["a"] * 5, "two classes are called a"),
    ({"a": 0, "b": 2, "c": 3, "d": 4, "e": 5}, "does not name its 5 classes"), ([1, 2, 3, 4, 5], "does not name its 5 classes"),
])  # fmt: skip
def test_class_names_that_do_not_fit_are_refused(names: Any, why: str, small: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": small.state_dict(), "classes": names}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=f"{why}.*give --classes"):
        import_weights(tmp_path / "w.pth", ImportOptions(**PREPARED))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_exports_are_imported_unchanged(suffix: str, tmp_path: Path) -> None:
    """Specification, classes, a per-pixel mean of values as stored, temperature and thresholds too, with nothing given."""
    net: ResNet = randomise(build("resnet8", zero_pad="centre", channels=5, seed=0))
    before = TrainedModel(
        net,
        dataset_class_names("cifar10"),
        Preprocessing(5, (32, 32), 32, torch.rand(32, 32, 5), torch.ones(5), dtype="uint16"),
        temperature=1.3,
        thresholds=(0.25,) * 10,
    )
    export_weights(before, "torchvision", tmp_path / f"w{suffix}")
    after, _ = import_weights(tmp_path / f"w{suffix}", ImportOptions())
    after.save(tmp_path / "m.safetensors")
    after = load_trained_model(tmp_path / "m.safetensors")
    assert (after.spec, after.classes, after.temperature) == (before.spec, before.classes, 1.3)
    assert after.thresholds == before.thresholds and after.preprocessing.dtype == "uint16"
    assert torch.equal(after.preprocessing.mean, before.preprocessing.mean)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in after.net.state_dict().items())


@pytest.mark.parametrize(
    ("suffix", "make"), [(".pth", torchvision.models.get_model), (".safetensors", timm.create_model)]
)
def test_torchvision_and_timm_load_exports(suffix: str, make: Callable[..., nn.Module], tmp_path: Path) -> None:
    net: ResNet = randomise(build("resnet50v1.5", classes=5, seed=0))
    model = TrainedModel(net, tuple("abcde"), Preprocessing(3, (224, 224), 256, torch.zeros(3), torch.ones(3)))
    path = tmp_path / f"w{suffix}"
    assert export_weights(model, "torchvision", path) == []
    from safetensors.torch import load_file

    state = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    other = make("resnet50", num_classes=5)
    other.load_state_dict(state, strict=True)
    assert_same(model, other.eval(), 65)


def test_differences_to_other_libraries_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    v1 = TrainedModel(build("resnet50", depths=(1, 1, 1, 1), classes=5, maxpool="ceil", seed=0), tuple("abcde"),
                Preprocessing(3, (224, 224), 256, torch.zeros(3), torch.ones(3)))  # fmt: skip
    v1.save(tmp_path / "m.safetensors")
    assert run_command(["export", str(tmp_path / "m.safetensors"), "--to", "torchvision"]) == 0
    out, err = capsys.readouterr()
    assert Path(out.strip()).is_file() and "the stride is in the first 1x1" in err and "Caffe's alignment" in err
    for arguments, sentence in (
        (["--to", "torchvison"], "did you mean 'torchvision'?"),
        (["--to", "torchvision", "--out", "x.zip"], ".pth"),
    ):
        assert run_command(["export", str(tmp_path / "m.safetensors"), *arguments]) == 2
        assert sentence in capsys.readouterr().err


def test_published_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what they download put in their place: weights, preprocessing, classes and published figures come along."""
    other = randomise(torchvision.models.resnet18())
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, **_: other.state_dict())
    model = resnetlab.load("torchvision:resnet18.IMAGENET1K_V1", device="cpu")
    assert (
        model.preprocessing.resize == 256 and model.preprocessing.size == (224, 224) and len(set(model.classes)) == 1000
    )
    assert model.metrics["published"]["top1_error"] == pytest.approx(0.30242)
    assert_same(model, other, 70)
    made = randomise(timm.create_model("resnet18.a1_in1k"))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: made)
    model = resnetlab.load("timm:resnet18.a1_in1k", device="cpu")
    assert model.preprocessing.interpolation == "bicubic" and model.recipe["source"] == "timm:resnet18.a1_in1k"
    assert_same(model, made, 70)


def test_a_repository_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's layout, weights and config.json; and a model file of ours."""
    import huggingface_hub

    other = randomise(timm.create_model("resnet26", num_classes=5))
    save_file(clone_state(other.state_dict()), tmp_path / "model.safetensors")
    about = {"mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 0.95, "input_size": [3, 224, 224], "interpolation": "bicubic",
             "label_names": list("abcde")}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet26", "pretrained_cfg": about}))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: str(tmp_path / name))
    model = resnetlab.load("hf:somebody/resnet26", device="cpu")
    assert_same(model, other, 70)
    assert (model.classes, model.preprocessing.resize) == (tuple("abcde"), 235)
    assert model.preprocessing.interpolation == "bicubic" and model.preprocessing.std.tolist() == [0.25] * 3
    model.save(tmp_path / "model.safetensors")
    assert resnetlab.load("hf:somebody/ours", device="cpu").classes == model.classes


@pytest.mark.parametrize(("name", "sentence"), [
    ("torchvision:resnet18.IMAGENET1K_V1", "could not be downloaded (no route to host); without a network"),
    ("timm:resnet18.a1_in1k", "in Python build(NAME, weights=FILE), or for a model of them: resnetlab import FILE"),
    ("hf:timm/resnet18.a1_in1k", "could not be downloaded (no route to host)"),
    ("torchvision:resnet18.IMAGENET1K_V9", "unknown weights of torchvision's resnet18 'IMAGENET1K_V9'; did you mean"),
    ("torchvision:resnut", "torchvision's resnut is not one of the papers' networks; use one of resnet18"),
    ("torchvision:vgg16", "not one of the papers' networks"),
    ("torchvision:wide_resnet50_2", "not one of the papers' networks"),
    ("timm:resnetaa50.a1h_in1k", "timm's resnetaa50 is not one of the papers' networks"),
    ("timm:resnetblur50.bt_in1k", "not one of the papers' networks"),
])  # fmt: skip
def test_messages_without_a_network(name: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    import huggingface_hub

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ResNetLabError) as error:
        resnetlab.load(name)
    assert sentence in str(error.value)


def test_class_names(tmp_path: Path) -> None:
    for name in ("rose", "daisy"):  # in torchvision's order
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name / "1.png")
    assert parse_class_names(str(tmp_path / "photos"), 2) == ("daisy", "rose")
    (tmp_path / "names").write_text("a\nb\n\nc\n")
    assert parse_class_names(str(tmp_path / "names"), 3) == parse_class_names("a, b,c", 3) == ("a", "b", "c")
    assert len(parse_class_names("cifar100", 100)) == 100 and len(parse_class_names("imagenet", 1000)) == 1000


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_class_file_may_begin_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\r\nd\u00f6g\r\n", encoding)
    assert parse_class_names(str(tmp_path / "names.txt"), 2) == ("cat", "d\u00f6g")
