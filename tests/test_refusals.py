"""Imports that could fail silently: damaged and foreign files, networks that only look like ours, malicious caches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

import resnetlab
from images import folder
from resnetlab.cli.main import run_command
from resnetlab.data import imagenet
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.folder import load_folder
from resnetlab.errors import ModelFileError, ResNetLabError, UsageError
from resnetlab.inference.classes import dataset_class_names
from resnetlab.inference.download import download_model
from resnetlab.inference.import_model import ImportOptions, import_weights
from resnetlab.models.import_weights import SUPPORTED, infer_specification
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.resnet import ResNet, build
from resnetlab.models.state_dicts import StateDictFile
from resnetlab.preprocessing import Preprocessing

GIVEN: dict[str, Any] = {"classes": "cifar10", "mean": [0.5], "std": [0.25]}
ON_COMMAND = ["--classes", "cifar10", "--mean", "0.5", "--std", "0.25"]


def state(name: str = "resnet8", **changes: Any) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in build(name, seed=0, **changes).state_dict().items()}


class Malicious:
    """A pickle of this runs a command when it is loaded without weights_only."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return (Path.touch, (self.trace,))


def test_a_malicious_file_in_torchs_cache_is_not_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise anyone with write access could run code in a process that loads torchvision's weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    cache, trace = tmp_path / "hub" / "checkpoints", tmp_path / "executed"
    cache.mkdir(parents=True)
    for zipped in (True, False):
        torch.save({"a": Malicious(trace)}, cache / Path(weights.url).name, _use_new_zipfile_serialization=zipped)
        assert run_command(["import", f"torchvision:resnet18.{weights.name}", "--out", str(tmp_path / "m")]) == 1
        err = capsys.readouterr().err
        assert "(it requires " in err and "); reading it could execute code, so it is refused" in err
        assert err.count("\n") == 1
        assert not trace.exists() and not (tmp_path / "m").exists()
    torch.load(cache / Path(weights.url).name, weights_only=False)  # it would have
    assert trace.exists()


# An independent network of Caffe's layers: written from the released prototxt's layer names, in functional torch.


def caffe_arrays(units: tuple[list[str], ...], classes: int) -> dict[str, np.ndarray]:
    """Random blobs of a bottleneck net with these units in stages 2, 3, …, as the released .caffemodels have them."""
    draw = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}

    def layer(suffix: str, c_in: int, c_out: int, k: int, conv: str) -> None:
        arrays[f"{conv}/0"] = draw.normal(0, (2 / (k * k * c_in)) ** 0.5, (c_out, c_in, k, k)).astype(np.float32)
        factor = 999.0
        arrays[f"bn{suffix}/0"] = (factor * draw.normal(0, 0.1, c_out)).astype(np.float32)
        arrays[f"bn{suffix}/1"] = (factor * draw.uniform(0.5, 1.5, c_out)).astype(np.float32)
        arrays[f"bn{suffix}/2"] = np.array([factor], np.float32)
        arrays[f"scale{suffix}/0"] = draw.uniform(0.5, 1.0, c_out).astype(np.float32)
        arrays[f"scale{suffix}/1"] = draw.normal(0, 0.1, c_out).astype(np.float32)

    layer("_conv1", 3, 8, 7, "conv1")
    arrays["conv1/1"] = draw.normal(0, 0.1, 8).astype(np.float32)
    channels = 8
    for stage, names in enumerate(units, 2):
        width = 4 * 2**stage // 2
        for i, unit in enumerate(names):
            place = f"{stage}{unit}"
            if i == 0:
                layer(f"{place}_branch1", channels, 4 * width, 1, f"res{place}_branch1")
            layer(f"{place}_branch2a", channels if i == 0 else 4 * width, width, 1, f"res{place}_branch2a")
            layer(f"{place}_branch2b", width, width, 3, f"res{place}_branch2b")
            layer(f"{place}_branch2c", width, 4 * width, 1, f"res{place}_branch2c")
        channels = 4 * width
    arrays["fc1000/0"] = draw.normal(0, 0.2, (classes, channels)).astype(np.float32)
    arrays["fc1000/1"] = draw.normal(0, 0.2, classes).astype(np.float32)
    return arrays


def caffe_logits(arrays: dict[str, np.ndarray], units: tuple[list[str], ...], bgr: Tensor) -> Tensor:
    """What Caffe computes: BatchNorm, Scale, pooling with ceil and no padding, the stride in branch1 and branch2a."""
    blob = {name: torch.from_numpy(value).double() for name, value in arrays.items()}

    def conv(x: Tensor, name: str, suffix: str, stride: int = 1, pad: int = 0) -> Tensor:
        x = F.conv2d(x, blob[f"{name}/0"], blob.get(f"{name}/1"), stride, pad)
        factor = blob[f"bn{suffix}/2"][0]
        mean, variance = blob[f"bn{suffix}/0"] / factor, blob[f"bn{suffix}/1"] / factor
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        return x * blob[f"scale{suffix}/0"][:, None, None] + blob[f"scale{suffix}/1"][:, None, None]

    x = F.max_pool2d(conv(bgr, "conv1", "_conv1", 2, 3).relu(), 3, 2, ceil_mode=True)
    for stage, names in enumerate(units, 2):
        for i, unit in enumerate(names):
            place, stride = f"{stage}{unit}", 2 if i == 0 and stage > 2 else 1
            left = conv(x, f"res{place}_branch1", f"{place}_branch1", stride) if i == 0 else x
            y = conv(x, f"res{place}_branch2a", f"{place}_branch2a", stride).relu()
            y = conv(y, f"res{place}_branch2b", f"{place}_branch2b", 1, 1).relu()
            x = (left + conv(y, f"res{place}_branch2c", f"{place}_branch2c")).relu()
    return F.linear(x.mean((2, 3)), blob["fc1000/0"], blob["fc1000/1"])


UNITS = (["a", "b", "c"], ["a", *(f"b{i}" for i in range(1, 12))], ["a", "b"])


@pytest.fixture(scope="module")
def caffe() -> dict[str, np.ndarray]:
    return caffe_arrays(UNITS, 5)


def test_caffes_nets_compute_what_caffe_does(caffe: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", **caffe)  # type: ignore[arg-type]
    bundle, notes = import_weights(tmp_path / "w.npz", ImportOptions(classes="a,b,c,d,e", mean=[0.4], std=[1 / 255]))
    assert bundle.spec.depths == (3, 12, 2) and bundle.spec.conv1_bias and bundle.spec.maxpool == "ceil"
    assert "BGR to RGB" in " ".join(notes)
    rgb = torch.randn(2, 3, 75, 70, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = caffe_logits(caffe, UNITS, rgb.flip(1))
    with torch.no_grad():
        found = bundle.net.double()(rgb)
    assert expected.std(0).min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the factor was divided by in float32


@pytest.mark.parametrize(("unit", "sentence"), [
    ("2b", "unit res2b is missing, there are only res2a, res2c"),
    ("2a", "unit res2a is missing"),
    ("3b4", "unit res3b4 is missing, there are only res3a, res3b1, res3b2, res3b3, res3b5"),
    ("3b1", "unit res3b1 is missing"),
])  # fmt: skip
def test_a_caffe_net_that_lacks_a_unit_is_no_shallower_net(
    unit: str, sentence: str, caffe: dict[str, np.ndarray], tmp_path: Path
) -> None:
    rest: Any = {name: value for name, value in caffe.items() if f"{unit}_" not in name}
    np.savez(tmp_path / "w.npz", **rest)
    with pytest.raises(ModelFileError) as error:
        import_weights(tmp_path / "w.npz", ImportOptions(classes="a,b,c,d,e", mean=[0.4], std=[1]))
    assert sentence in str(error.value)


def akamaster(tensors: dict[str, Tensor], x: Tensor, depth: int) -> Tensor:
    """The public CIFAR code's forward pass, option A with its zero channels centred, in functional torch."""
    t = {name: value.double() for name, value in tensors.items()}

    def bn(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (t[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, 1e-5)

    x = bn(F.conv2d(x, t["conv1.weight"], None, 1, 1), "bn1").relu()
    for stage, planes in enumerate((16, 32, 64), 1):
        for unit in range((depth - 2) // 6):
            name, stride = f"layer{stage}.{unit}", 2 if unit == 0 and stage > 1 else 1
            y = bn(F.conv2d(x, t[f"{name}.conv1.weight"], None, stride, 1), f"{name}.bn1").relu()
            y = bn(F.conv2d(y, t[f"{name}.conv2.weight"], None, 1, 1), f"{name}.bn2")
            left = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, planes // 4, planes // 4)) if stride == 2 else x
            x = (y + left).relu()
    return F.linear(F.avg_pool2d(x, x.shape[3]).flatten(1), t["linear.weight"], t["linear.bias"])


def test_option_a_with_centred_zeros_computes_what_the_public_code_does(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {name.replace("fc.", "linear."): value for name, value in state("resnet14").items() if value.dim()}
    for name, value in tensors.items():
        if ".bn" in name or name.startswith("bn"):
            around = 1.0 if name.endswith(("weight", "running_var")) else 0.0
            value.copy_(around + torch.rand(value.shape, generator=draw) - 0.5)
    torch.save({"state_dict": {f"module.{name}": value for name, value in tensors.items()}}, tmp_path / "r.th")
    bundle, _ = import_weights(tmp_path / "r.th", ImportOptions(**GIVEN, source="akamaster"))
    x = torch.randn(2, 3, 32, 32, generator=draw, dtype=torch.float64)
    expected = akamaster(tensors, x, 14)
    with torch.no_grad():
        torch.testing.assert_close(bundle.net.double()(x), expected, rtol=1e-10, atol=1e-10)
        other = build("resnet14", zero_pad="append")
        other.load_state_dict(bundle.net.state_dict())
        assert not torch.allclose(other.eval().double()(x), expected, rtol=1e-3)


@pytest.mark.parametrize("name", SUPPORTED["timm"])
def test_timms_plain_networks_are_those_that_ours_compute(name: str) -> None:
    """Kernels, strides and paddings of every convolution, and the types of layers, on the meta device."""
    with torch.device("meta"):
        other: Any = timm.create_model(name)
        spec, _ = infer_specification(StateDictFile(other.state_dict()), f"timm:{name}")
        ours = ResNet(spec)
    shapes = [
        {n: (m.kernel_size, m.stride, m.padding) for n, m in net.named_modules() if isinstance(m, torch.nn.Conv2d)}
        for net in (other, ours)
    ]
    assert shapes[0] == shapes[1] and spec.depth == (26 if name == "resnet26" else int(name.removeprefix("resnet")))
    kinds = {type(m).__name__ for m in other.modules()}
    layers = {"Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Linear", "Identity", "Flatten"}
    pools = {"SelectAdaptivePool2d", "FastAdaptiveAvgPool", "AdaptiveAvgPool2d"}
    assert kinds <= layers | pools | {"ResNet", "Sequential", "BasicBlock", "Bottleneck"}


def test_networks_that_only_look_like_timms_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """resnetaa50 has a ResNet-50's tensors; so a file from timm needs its network's name, and its preprocessing is assumed."""
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "w.pth")
    out = tmp_path / "m.safetensors"
    command = ["import", str(tmp_path / "w.pth"), "--out", str(out), "--source"]
    for source, sentence in (
        ("timm", "which of timm's networks is it? resnetaa50, resnetblur50 and similar ones have the same tensors"),
        ("timm:resnetblur18", "timm's resnetblur18 is not one of the papers' networks; use one of resnet18"),
        ("caffe:resnet50", "caffe's resnet50 is not one of the papers' networks"),
        ("tim", "did you mean 'timm'"),
    ):
        assert run_command([*command, source]) == 2 and sentence in capsys.readouterr().err and not out.exists()
    assert run_command([*command, "timm:resnet18.a1_in1k"]) == 0
    err = capsys.readouterr().err
    for sentence in (
        "mean 0.485,0.456,0.406 and std 0.229,0.224,0.225",
        "ASSUMED images: shorter side 256, bilinear, centre 224x224", "ASSUMED from source timm: ImageNet's"):  # fmt: skip
        assert sentence in err
        assert any(sentence in note for note in load_trained_model(out).recipe["notes"])
    given = ["--mean", "0.5", "--std", "0.5", "--interpolation", "bicubic", "--image-size", "224", "--eval-resize", "235",
             "--classes", "imagenet"]  # fmt: skip
    assert run_command([*command, "timm:resnet18", *given]) == 0
    assert "ASSUMED" not in capsys.readouterr().err


def use_offline_weights(monkeypatch: pytest.MonkeyPatch) -> Any:
    other = torchvision.models.resnet18().eval()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, **_: other.state_dict())
    return other


def test_given_options_override_the_publishers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_offline_weights(monkeypatch)
    names = tmp_path / "names"
    names.write_text("\n".join(f"class {i}" for i in range(1000)))
    name = "torchvision:resnet18.IMAGENET1K_V1"
    out = tmp_path / "m.safetensors"
    given = ["--classes", str(names), "--mean", "0.1,0.2,0.3", "--image-size", "288", "--set", "maxpool=ceil"]
    assert run_command(["import", name, *given, "--out", str(out)]) == 0
    made = load_trained_model(out)
    assert made.classes[:2] == ("class 0", "class 1") and made.preprocessing.mean.tolist() == pytest.approx(
        [0.1, 0.2, 0.3]
    )
    assert (made.preprocessing.size, made.preprocessing.resize, made.spec.maxpool) == ((288, 288), 329, "ceil")
    assert "published" not in made.metrics and made.preprocessing.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    for wrong in ({"channel_order": "bgr"}, {"key": "model"}, {"source": "timm"}):
        with pytest.raises(UsageError, match=f"leave out --{next(iter(wrong)).replace('_', '-')}"):
            download_model(name, ImportOptions(**wrong))


def test_a_publishers_name_works_wherever_a_model_file_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_offline_weights(monkeypatch)
    monkeypatch.chdir(tmp_path)
    name = "torchvision:resnet18.IMAGENET1K_V1"
    root = folder(tmp_path / "imagenet", {"train": 1, "val": 1}, tuple(imagenet.imagenet_class_names())[:3])
    image = str(next((root / "val").rglob("*.jpg")))
    assert run_command(["inspect", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 11_689_512
    assert run_command(["predict", name, image, "--json", "--top", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"][0]["top"][0]["class"] in dataset_class_names("imagenet")
    assert run_command(["export", name, "--to", "torchvision"]) == 0
    assert (tmp_path / "resnet18.IMAGENET1K_V1.pth").is_file()
    capsys.readouterr()
    assert run_command(["evaluate", name, "--data", str(root)]) == 0
    assert "scores are over all 1,000 outputs, of which the data have 3 classes" in capsys.readouterr().out
    monkeypatch.setattr("resnetlab.data.labels.imagenet.imagenet_class_names", dict)
    assert run_command(["evaluate", name, "--data", str(root), "--save-temperature", "--fit-temperature", "1"]) == 2
    assert "import published weights first" in capsys.readouterr().err


def test_a_publishers_model_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole of `resnetlab evaluate`."""
    other = torchvision.models.resnet18(num_classes=3).eval()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda self, **_: other.state_dict())
    monkeypatch.setattr(imagenet, "imagenet_class_names", lambda: {f"n{i}": f"name {i}" for i in range(3)})
    root = folder(tmp_path / "d", {"train": 1, "val": 2}, ("n0", "n1", "n2"))
    name = "torchvision:resnet18.IMAGENET1K_V1"
    assert run_command(["evaluate", name, "--data", str(root), "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    document = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert document["n"] == 6 and document["model"] == name and document["published"] is None


def test_imagenet_has_one_name_for_each_class(tmp_path: Path) -> None:
    """A folder by numbers in WordNet, and weights from torchvision or timm, name the same classes the same."""
    table = imagenet.imagenet_class_names()
    assert len(set(table.values())) == len(table) == 1000 and dataset_class_names("imagenet") == tuple(table.values())
    published = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    assert sum(a == b for a, b in zip(table.values(), published, strict=True)) >= 998
    assert list(table) == timm.data.ImageNetInfo().label_names()
    root = folder(tmp_path / "d", {"train": 2, "val": 1}, ("n01440764", "n02012849", "n03126707"))
    expected = tuple(sorted(table[number] for number in ("n01440764", "n02012849", "n03126707")))
    assert load_folder(root, ReadOptions()).classes == expected
    (root / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca\nn02012849 crane\nn03126707 crane\n")
    assert load_folder(root, ReadOptions()).classes == expected  # ImageNet's own file does not change them
    (root / "classes.txt").write_text("n01440764 fish\nn02012849 bird\nn03126707 machine\n")
    assert load_folder(root, ReadOptions()).classes == ("bird", "fish", "machine")  # a user's does


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda s: s | {"layer1.0.conv1.weight": torch.tensor(1.0)}, "layer1.0.conv1.weight is a single number; a conv"),
    (lambda s: s | {"layer2.0.conv2.weight": torch.tensor(1.0)}, "layer2.0.conv2.weight is a single number"),
    (lambda s: s | {"conv1.weight": s["conv1.weight"].to(torch.int32)}, "conv1.weight cannot be weights (strided int32)"),
    (lambda s: s | {"fc.weight": s["fc.weight"].to_sparse()}, "fc.weight cannot be weights (sparse_coo float32)"),
    (lambda s: s | {"fc.weight": s["fc.weight"].to(torch.complex64)}, "fc.weight cannot be weights (strided complex64)"),
    (lambda s: s | {"fc.bias": s["fc.bias"] * float("nan")}, "some of its weights are not finite, such as fc.bias"),
    (lambda s: {k: v for k, v in s.items() if k != "layer1.0.conv1.weight"}, "layer1.0.conv1.weight is missing"),
    (lambda s: {k: v for k, v in s.items() if k != "layer3.0.conv2.weight"}, "layer3.0.conv2.weight is missing"),
    (lambda s: {k.replace("3.0.conv2.w", "3.0.konv2.w"): v for k, v in s.items()}, "konv2.weight is the closest"),
    (lambda s: {k: v for k, v in s.items() if not k.endswith("conv2.weight")}, "layer1.0.conv2.weight is missing"),
    (lambda s: s | {"layer2.0.bn9.weight": torch.zeros(3)}, "not expected layer2.0.bn9.weight (nearest expected: layer2.0.bn"),
    (lambda s: s | {"layer1.0.conv1.weight": torch.zeros(4, 16, 1, 1)}, "layer1.0.conv3.weight is missing"),
    (lambda s: {k.replace("conv1", "conv0") if "lay" in k else k: v for k, v in s.items()}, "conv0.weight is the closest"),
], ids=range(13))  # fmt: skip
def test_tensors_that_cannot_be_weights(
    spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    torch.save(spoil(state()), tmp_path / "w.pth")
    assert run_command(["import", str(tmp_path / "w.pth"), *ON_COMMAND, "--out", str(tmp_path / "m")]) == 1
    err = capsys.readouterr().err
    assert sentence in err and err.count("resnetlab: ") == 1 and "Traceback" not in err
    assert not (tmp_path / "m").exists()


def exported() -> dict[str, Any]:
    bundle = TrainedModel(build("resnet8", seed=0), dataset_class_names("cifar10"),
                    Preprocessing(3, (32, 32), 32, torch.zeros(3), torch.ones(3)))  # fmt: skip
    prepared = bundle.preprocessing.to_json()
    return {"specification": bundle.spec.to_json(), "classes": list(bundle.classes), "preprocessing": prepared,
            "temperature": 1.0, "calibration": {}, "data": {}, "fingerprints": {}}  # fmt: skip


@pytest.mark.parametrize("about", [
    "{", "3", "[]", json.dumps({"specification": 5}),
    *(json.dumps(exported() | change) for change in (
        {"specification": {"block": "basic"}}, {"classes": 5}, {"classes": ["a"]}, {"preprocessing": {}},
        {"temperature": "hot"},
        {"temperature": -1.0}, {"temperature": None}, {"preprocessing": exported()["preprocessing"] | {"size": [20_000, 2]}},
        {"classes": [1] * 10}, {"data": []}, {"fingerprints": []},
        {"fingerprints": {"seen": "0"}}, {"fingerprints": {"seen": 5}})),
], ids=range(17))  # fmt: skip
def test_foreign_metadata(about: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The metadata that `resnetlab export` writes may be damaged, or another program's."""
    save_file(state(), tmp_path / "w.safetensors", {"resnetlab-export": about})
    torch_state: Any = build("resnet8", seed=0).state_dict()
    torch_state._metadata["resnetlab"] = about
    torch.save(torch_state, tmp_path / "w.pth")
    for name in ("w.safetensors", "w.pth"):
        assert run_command(["import", str(tmp_path / name), "--out", str(tmp_path / "m")]) == 1
        err = capsys.readouterr().err
        assert err.count("resnetlab: ") == 1 and "Traceback" not in err and not (tmp_path / "m").exists()


def test_valid_metadata(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors", {"resnetlab-export": json.dumps(exported())})
    assert import_weights(tmp_path / "w.safetensors", ImportOptions())[0].classes == dataset_class_names("cifar10")


@pytest.mark.parametrize(("changes", "given", "sentence"), [
    ({"channels": 4}, [], "images have 1 channel or 3, not 4"),
    ({}, ["--image-size", "20000"], "must be between 1 and 16,384 pixels"),
    ({}, ["--image-size", "0"], "must be at least --image-size 0, which is cropped from it, and that at least 1"),
    ({}, ["--eval-resize", "20000"], "must be between 1 and 16,384 pixels"),
])  # fmt: skip
def test_imports_that_would_make_a_useless_model_are_refused(
    changes: dict[str, Any], given: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state(**changes), tmp_path / "w.pth")
    assert run_command(["import", str(tmp_path / "w.pth"), *ON_COMMAND, *given, "--out", str(tmp_path / "m")]) in (1, 2)
    assert sentence in capsys.readouterr().err and not (tmp_path / "m").exists()


def test_means_are_in_the_channel_order_of_the_input(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pth")
    given = {"classes": "cifar10", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    made = {
        order: import_weights(tmp_path / "w.pth", ImportOptions(channel_order=order, **given))[0]
        for order in ("rgb", "bgr")
    }  # type: ignore[arg-type]
    bgr = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # the network on BGR as it was trained, and the imported one on the same images as RGB
        expected = made["rgb"].net(made["rgb"].preprocessing.normalise(bgr))
        found = made["bgr"].net(made["bgr"].preprocessing.normalise(bgr.flip(3)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_labels_of_a_repository_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in timm's own description or beside it, may contain commas, and may be ImageNet's synset numbers."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: str(tmp_path / name))
    save_file(timm.create_model("resnet18", num_classes=3).state_dict(), tmp_path / "model.safetensors")
    about = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_size": [3, 224, 224]}
    for labels, expected in (
        (["tench, Tinca tinca", "b", "c"], ("tench, Tinca tinca", "b", "c")),
        (["n01440764", "n02012849", "mine"], ("tench", "crane bird", "mine")),
    ):
        config = {"architecture": "resnet18", "pretrained_cfg": about, "label_names": labels}
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert resnetlab.load("hf:somebody/net", device="cpu").classes == expected
    for config, sentence in (
        ({"architecture": "resnetaa50", "pretrained_cfg": about}, "not one of the papers' networks"),
        ({"architecture": "resnet18"}, "has no config.json of timm's"),
        ({"architecture": "resnet18", "pretrained_cfg": {"mean": [0.5]}}, "is not timm's"),
        ([], "has no config.json of timm's"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ResNetLabError, match=sentence):
            resnetlab.load("hf:somebody/net", device="cpu")


def test_our_own_errors_are_not_reported_as_failed_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    use_offline_weights(monkeypatch)

    def wrong(*_: Any) -> Any:
        raise AssertionError("a bug")

    monkeypatch.setattr("resnetlab.inference.download.import_state_dict", wrong)
    with pytest.raises(AssertionError, match="a bug"):
        download_model("torchvision:resnet18.IMAGENET1K_V1")
