"""Weight files as people have them: other libraries' names, heads, averages, shards, checkpoints with more than tensors."""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import resnetlab
from resnetlab.cli.main import run_command
from resnetlab.errors import ModelFileError, ResNetLabError, UsageError
from resnetlab.inference.download import import_folder
from resnetlab.inference.import_model import ImportOptions, import_weights
from resnetlab.inference.start import load_start
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import build
from resnetlab.models.state_dicts import parse_state_dict, read_state_dict
from resnetlab.preprocessing import Preprocessing

State = dict[str, Tensor]
ABC: dict[str, Any] = {"classes": "a,b,c", "mean": (0.5,), "std": (0.25,)}
NET = build("resnet50v1.5", widths=(4, 4, 4, 4), depths=(1, 2, 1, 1), classes=3, seed=0)
STATE: State = {name: value.clone() for name, value in NET.state_dict().items()}
OTHER: State = {name: value + 1 if value.is_floating_point() else value.clone() for name, value in STATE.items()}
TRUNK: State = {name: value for name, value in STATE.items() if not name.startswith("fc.")}


def head(name: str) -> State:
    return {**TRUNK, f"{name}.weight": STATE["fc.weight"], f"{name}.bias": STATE["fc.bias"]}


def prefixed(prefix: str, state: Mapping[str, Tensor] = STATE) -> State:
    return {prefix + name: value for name, value in state.items()}


def name_like_transformers(name: str) -> str:
    if name.startswith("fc."):
        return name.replace("fc.", "classifier.1.")
    if name.startswith(("conv1.", "bn1.")):
        part = name.replace("conv1", "convolution").replace("bn1", "normalization")
        return f"resnet.embedder.embedder.{part}"
    stage, unit, rest = name.split(".", 2)
    rest = rest.replace("downsample.0", "shortcut.convolution").replace("downsample.1", "shortcut.normalization")
    rest = re.sub(r"^conv(\d)", lambda m: f"layer.{int(m[1]) - 1}.convolution", rest)
    rest = re.sub(r"^bn(\d)", lambda m: f"layer.{int(m[1]) - 1}.normalization", rest)
    return f"resnet.encoder.stages.{int(stage[5:]) - 1}.layers.{unit}.{rest}"


FC = {name: STATE[name] for name in ("fc.weight", "fc.bias")}
BARE_FC = {name.removeprefix("fc."): value for name, value in FC.items()}
LAYOUTS: dict[str, tuple[Any, str]] = {
    "mmpretrain": ({"meta": {}, "state_dict": prefixed("backbone.", TRUNK) | prefixed("head.", FC)}, "head.fc is fc"),
    "transformers": ({name_like_transformers(k): v for k, v in STATE.items()}, "transformers' layer names"),
    "fc.1": (head("fc.1"), "fc.1 is fc"),
    "fc.0": (head("fc.0"), "fc.0 is fc"),
    "classifier.1": (head("classifier.1"), "classifier.1 is fc"),
    "a tutorial": (
        {"model_state_dict": STATE, "epoch": 3, "optimizer_state_dict": {"state": {}}},
        "nested under model_state_dict",
    ),
    "Lightning": (
        {"state_dict": prefixed("model.") | {"criterion.weight": torch.ones(3), "train_acc.tp": torch.ones(3)}},
        "ignored, beside the network: criterion.weight, train_acc.tp",
    ),
    "Lightning, a trunk and a head": (prefixed("encoder.", TRUNK) | prefixed("head.", BARE_FC), "head is fc"),
    "thop": (STATE | {"total_ops": torch.ones(1), "layer1.0.total_params": torch.ones(1)}, "total_ops"),
    "an average alone": ({"state_dict_ema": STATE}, "the moving average of the weights"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_other_libraries(layout: str) -> None:
    arranged, note = LAYOUTS[layout]
    state = parse_state_dict(arranged, "w.pth")
    assert state.tensors.keys() == STATE.keys() and all(torch.equal(v, STATE[k]) for k, v in state.tensors.items())
    assert any(note in each for each in state.notes), state.notes


def test_known_values_of_other_libraries(tmp_path: Path) -> None:
    """mmpretrain's and transformers' stride and normalisation are known, and the stride already from the latter's names."""
    torch.save(LAYOUTS["mmpretrain"][0], tmp_path / "mm.pth")
    model, _ = import_weights(tmp_path / "mm.pth", ImportOptions(source="mmpretrain", classes="a,b,c"))
    assert model.spec == NET.spec and model.preprocessing.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    torch.save(LAYOUTS["transformers"][0], tmp_path / "hf.pth")
    assert import_weights(tmp_path / "hf.pth", ImportOptions(**ABC))[0].spec == NET.spec


def test_transformers_repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of microsoft/resnet-50: weights, config.json, preprocessor_config.json."""
    import huggingface_hub

    save_file(LAYOUTS["transformers"][0], tmp_path / "model.safetensors", {"format": "pt"})
    config = {"model_type": "resnet", "embedding_size": 64, "hidden_act": "relu", "downsample_in_bottleneck": False,
              "downsample_in_first_stage": False, "id2label": {"0": "tench, Tinca", "1": "b", "2": "c"}}  # fmt: skip
    processor = {
        "crop_pct": 0.875,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
        "resample": 3,
        "size": 224,
    }
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, name: str(tmp_path / name))

    def load(**changes: Any) -> TrainedModel:
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        return resnetlab.load("hf:microsoft/resnet-50", device="cpu")

    model = load()
    assert model.spec == NET.spec and torch.equal(model.net.fc.weight, STATE["fc.weight"])
    preprocessing = model.preprocessing
    assert (preprocessing.resize, preprocessing.size, preprocessing.interpolation) == (256, (224, 224), "bicubic")
    assert preprocessing.std.tolist() == pytest.approx([0.2, 0.3, 0.4]) and model.classes[0] == "tench, Tinca"
    assert load(downsample_in_bottleneck=True).spec.stride_in == "first"
    with pytest.raises(ModelFileError, match="another stem or activation"):
        load(hidden_act="gelu")


def test_a_folder_that_transformers_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its classes and preprocessing are those of the folder's files, and its scores those of transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_sizes": [256] * 4, "depths": [1, 1, 1, 1], "embedding_size": 64}
    config = transformers.ResNetConfig(**sizes, id2label={0: "ant", 1: "bee", 2: "cow"})  # type: ignore[arg-type]
    theirs = transformers.ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.05)
    theirs.save_pretrained(tmp_path / "saved")
    values = {
        "size": {"shortest_edge": 112},
        "crop_pct": 0.875,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    transformers.ConvNextImageProcessor(**values).save_pretrained(tmp_path / "saved")
    assert run_command(["import", str(tmp_path / "saved"), "--out", str(tmp_path / "m.safetensors"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["classes"] == ["ant", "bee", "cow"]
    model = resnetlab.load(tmp_path / "m.safetensors", device="cpu")
    assert model.preprocessing.size == (112, 112) and model.preprocessing.resize == 128
    assert model.preprocessing.mean.tolist() == pytest.approx([0.4, 0.5, 0.6])
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        torch.testing.assert_close(model.net(images), theirs(images).logits, rtol=1e-4, atol=1e-4)
    start = load_start(str(tmp_path / "saved"))  # not ImageNet's values, which are assumed where nothing is known
    start_mean = start.model.preprocessing.mean.tolist()
    assert start_mean == model.preprocessing.mean.tolist()
    assert start.model.classes == model.classes and not any("ASSUMED" in note for note in start.notes)
    torch.save(theirs.state_dict(), tmp_path / "saved" / "pytorch_model.bin")  # as older versions save
    (tmp_path / "saved" / "model.safetensors").rename(tmp_path / "weights.safetensors")
    old = load_start(str(tmp_path / "saved"))
    assert old.model.classes == model.classes and old.model.preprocessing.mean.tolist() == start_mean
    theirs.resnet.save_pretrained(tmp_path / "saved")  # a backbone has no head
    assert load_start(str(tmp_path / "saved")).model.classes == ("no head",)
    (tmp_path / "weights.safetensors").rename(tmp_path / "saved" / "model.safetensors")
    (tmp_path / "saved" / "preprocessor_config.json").unlink()  # which a trainer's checkpoint lacks
    start = load_start(str(tmp_path / "saved"))
    assert len(start.model.classes) == 3 and "has no preprocessor_config.json" in start.notes[-1]
    with pytest.raises(ModelFileError, match=r"has no preprocessor_config\.json; name the file of weights"):
        import_folder(tmp_path / "saved", ImportOptions())
    with pytest.raises(ModelFileError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        import_folder(tmp_path, ImportOptions())


@pytest.mark.parametrize(("content", "key", "error", "sentence"), [
    (TRUNK, None, ModelFileError, "network without a head .* can be a start: resnetlab train DATA --start-from"),
    ({**head("fc.0"), "fc.3.weight": torch.ones(3, 3)}, None, ModelFileError, "not one fully connected layer but fc.0.weight"),
    ({"state_dict": STATE, "state_dict_ema": OTHER}, None, UsageError,
     "several sets of weights: state_dict, state_dict_ema; choose one with --key .*state_dict_ema: the moving average"),
    ({"model": STATE, "averaged_model": OTHER}, None, UsageError, "averaged_model: the moving average"),
    ({"weights": STATE, "teacher": OTHER}, None, UsageError, "several sets of weights: weights, teacher"),
    ({**prefixed("student."), **prefixed("teacher.")}, None, UsageError, "networks: student, teacher; choose one with --key"),
    ({**prefixed("student."), **prefixed("teacher.")}, "pupil", UsageError, "--key pupil: .* has no weights under it"),
])  # fmt: skip
def test_what_cannot_be_decided_is_asked(
    content: Any, key: str | None, error: type[Exception], sentence: str, tmp_path: Path
) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(error, match=sentence):
        import_weights(tmp_path / "w.pth", ImportOptions(source="torchvision", key=key, **ABC))


@pytest.mark.parametrize(("content", "key"), [
    ({"state_dict": STATE, "state_dict_ema": OTHER}, "state_dict_ema"),
    ({"state_dict": {**prefixed("module.student."), **prefixed("module.teacher.", OTHER)}}, "teacher"),
])  # fmt: skip
def test_a_key_chooses(content: Any, key: str) -> None:
    assert torch.equal(parse_state_dict(content, "w.pth", key).tensors["fc.weight"], OTHER["fc.weight"])


class Options:
    """A class that importing the test file's module would be needed for."""

    def __init__(self) -> None:
        self.values = {"lr": 0.1}


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_with_more_than_tensors(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of NumPy, argparse's options, paths and unknown classes are passed over, and no class of theirs is built."""
    extras = {
        "best": np.float64(91.2),
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace()),
        "folder": pathlib.PurePosixPath("/x"),
        "own": Options(),
        "array": np.arange(3),
    }
    torch.save({"state_dict": STATE} | extras, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(Options, "__setstate__", lambda *_: pytest.fail("was built"), raising=False)
    state = read_state_dict(tmp_path / "w.pth")
    assert state.tensors.keys() == STATE.keys() and torch.equal(state.tensors["conv1.weight"], STATE["conv1.weight"])
    assert not any("Inert" in str(each) for each in torch.serialization.get_safe_globals())
    torch.save(NET, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelFileError, match="not weights" if zipped else "more than tensors"):
        read_state_dict(tmp_path / "w.pth")


def save_shards(folder: Path) -> Path:
    names, files = list(STATE), {}
    for i, part in enumerate((names[:20], names[20:]), 1):
        file = f"model-{i:05}-of-00002.safetensors"
        save_file({name: STATE[name] for name in part}, folder / file)
        files |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder / "model.safetensors.index.json"


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    index = save_shards(tmp_path)
    for file in (index, tmp_path / "model-00002-of-00002.safetensors"):
        found = read_state_dict(file)
        assert found.tensors.keys() == STATE.keys() and "index.json lists" in found.notes[0]
    listed = json.loads(index.read_text())
    for changed, sentence in (
        ({"weight_map": {"a": "../secret.safetensors"}}, "is not the name of a file beside it"),
        ({"weight_map": {"a": "gone.safetensors"}}, "lists gone.safetensors, which is not beside it"),
        (
            {"weight_map": listed["weight_map"] | {"more": "model-00001-of-00002.safetensors"}},
            "lists more, which its shards",
        ),
        ([], "is not an index of sharded weights"),
    ):
        index.write_text(json.dumps(changed))
        with pytest.raises(ModelFileError, match=sentence):
            read_state_dict(index)
    index.unlink()
    with pytest.raises(ModelFileError, match=r"is part 2 of 2 of the weights, and model.safetensors.index.json"):
        read_state_dict(tmp_path / "model-00002-of-00002.safetensors")


def test_our_own_files_need_no_import(tmp_path: Path) -> None:
    model = TrainedModel(NET, tuple("abc"), Preprocessing(3, (32, 32), 32, torch.zeros(3), torch.ones(3)))
    model.save(tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="is a file of resnetlab already, which needs no import"):
        import_weights(tmp_path / "m.safetensors", ImportOptions())


def test_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deflated records, views larger than their data, and mappings that contain themselves: refused, not unpacked."""
    monkeypatch.setattr("resnetlab.models.weight_files.MAX_UNPACKED", 2**20)
    torch.save({"state_dict": STATE | {"conv9.weight": torch.zeros(2_000_000)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, plain.read(entry))
    (tmp_path / "bomb.npz").write_bytes((tmp_path / "bomb.pth").read_bytes())
    for suffix in (".pth", ".npz"):
        with pytest.raises(ModelFileError, match=r"unpacks to 8,.*, which weights do not; it is refused"):
            read_state_dict((tmp_path / "bomb").with_suffix(suffix))
    with pytest.raises(ModelFileError, match=r"fc.weight cannot be weights"):
        parse_state_dict(STATE | {"fc.weight": torch.zeros(1).expand(10**6, 10**6)}, "w.pth")
    loop: dict[str, Any] = {"epoch": 3}
    loop["state_dict"] = loop
    torch.save(loop, tmp_path / "loop.pth")
    with pytest.raises(ModelFileError, match="has no state_dict"):
        read_state_dict(tmp_path / "loop.pth")


@pytest.mark.parametrize("name", ["resnet8", "preresnet8", "resnet50v1.5"])
def test_biases_before_bn_are_folded(name: str, tmp_path: Path) -> None:
    """A network whose convolutions before BN have biases computes the same logits as the imported one without them."""
    widths = {"widths": (4, 4, 4, 4), "depths": (1, 1, 1, 1)} if "50" in name else {}
    net = build(name, classes=3, shortcut="B", seed=0, **widths).double().eval()
    biased = 0
    for each, block in net.blocks():
        names = [f"conv{i}" for i in range(1, block.num_convs + (0 if "pre" in name else 1))]
        for conv in names + (["downsample.0"] if block.downsample and "pre" not in name else []):
            module = block.get_submodule(conv)
            assert isinstance(module, nn.Conv2d), each
            module.bias = nn.Parameter(
                torch.randn(module.out_channels, generator=torch.Generator().manual_seed(1)).double()
            )
            biased += 1
    torch.save(net.state_dict(), tmp_path / "w.pth")
    model, notes = import_weights(tmp_path / "w.pth", ImportOptions(source="torchvision", **ABC))
    assert any(note.startswith(f"{biased} biases of convolutions before BN") for note in notes)
    x = torch.randn(2, 3, 70, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(model.net.double()(x), net(x), rtol=1e-4, atol=1e-5)  # the file is read in float32


def encode_blob(mean: np.ndarray, packed_shape: bool) -> bytes:
    """A BlobProto by hand: (C, h, w) with num, channels, height and width, or with a shape."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    data = mean.astype("<f4").tobytes()
    sides = (1, *mean.shape)
    dims = b"".join(map(varint, sides))
    old = b"".join(varint(field << 3) + varint(side) for field, side in enumerate(sides, 1))
    shape = b"\x3a" + varint(len(dims) + 2) + b"\x0a" + varint(len(dims)) + dims
    return (shape if packed_shape else old) + b"\x2a" + varint(len(data)) + data


def test_a_mean_for_every_pixel(tmp_path: Path) -> None:
    """The same mean from .npy in both layouts and units, and from Caffe's file in both forms, BGR."""
    mean = np.random.default_rng(0).uniform(0, 255, (32, 36, 3)).astype(np.float32)[:, :32]  # (h, w, C), RGB
    expected = torch.from_numpy(mean / 255)
    np.save(tmp_path / "last.npy", mean / 255)
    np.save(tmp_path / "first.npy", mean.transpose(2, 0, 1))
    for packed in (True, False):
        (tmp_path / f"{packed}.binaryproto").write_bytes(encode_blob(mean[:, :, ::-1].transpose(2, 0, 1), packed))
    state = {name: v.clone() for name, v in build("resnet8", classes=3, seed=0).state_dict().items()}
    torch.save(state, tmp_path / "w.pth")

    def load(file: str, **given: Any) -> Preprocessing:
        options = ImportOptions(classes="a,b,c", mean_file=tmp_path / file, **given)
        return import_weights(tmp_path / "w.pth", options)[0].preprocessing

    for file in ("last.npy", "first.npy", "True.binaryproto", "False.binaryproto"):
        found = load(file, std=(1.0,))
        torch.testing.assert_close(found.mean, expected)
    assert load("True.binaryproto").std.tolist() == pytest.approx([1 / 255] * 3)
    cropped = load("last.npy", std=(1.0,), image_size=28, eval_resize=32)
    torch.testing.assert_close(cropped.mean, expected[2:30, 2:30])
    for file, given, sentence in (
        ("last.npy", {"std": (1.0,), "image_size": 24}, "a mean of 32x32 pixels for images of 24x24"),
        ("last.npy", {"std": (1.0,), "mean": (0.5,)}, "--mean or --mean-file, not both"),
        ("last.npy", {}, "give --std"),
        ("w.pth", {"std": (1.0,)}, "ends in .npy or .binaryproto"),
    ):
        with pytest.raises(ResNetLabError, match=sentence):
            load(file, **given)
    (tmp_path / "True.binaryproto").write_bytes(b"\x2a\xff\x7f" + bytes(8))
    with pytest.raises(ModelFileError, match=r"is not a mean of images .it is truncated"):
        load("True.binaryproto")
    header = (
        np.lib.format.magic(1, 0) + b"v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 99999, 3), }"
    )
    (tmp_path / "last.npy").write_bytes(header.ljust(128, b" ")[:127] + b"\n")  # no array of this size is made
    with pytest.raises(ModelFileError, match=r"is not a mean of images .is damaged: it is cut short"):
        load("last.npy")
