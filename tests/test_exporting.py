"""Exported files, read back with the programs that they are for."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from PIL import Image
from torch import Tensor

import resnetlab
import zygote
from images import photo
from resnetlab.cli.main import run_command
from resnetlab.data import digits
from resnetlab.errors import ModelFileError, UsageError, missing_package
from resnetlab.inference import export, formats
from resnetlab.inference.export_graphs import ExportGraphs
from resnetlab.inference.outputs import PARITY_BOUNDS
from resnetlab.inference.resizing import Resize
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.reference_images import ReferenceImages
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing, pil_to_tensor, tensor_to_pil

CLASSES = ("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun")
DIGITS = digits.load_digits()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network with a per-pixel mean and a temperature, whose scores differ from image to image."""
    torch.manual_seed(0)
    net: Any = build("resnet8", classes=10, channels=1, seed=0)
    train, test = DIGITS.train.images, DIGITS.test.images
    prepared = Preprocessing(1, (8, 8), 8, train.float().mean(0) / 255, torch.ones(1))
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for i in range(60):
        chosen = torch.arange(64 * i, 64 * (i + 1)) % len(train)
        optimizer.zero_grad()
        x = prepared.normalise(train[chosen])
        torch.nn.functional.cross_entropy(net(x), DIGITS.train.labels[chosen]).backward()
        optimizer.step()
    samples = ReferenceImages(test[:16], DIGITS.test.labels[:16], train[:64])
    file = tmp_path_factory.mktemp("model") / "m.safetensors"
    TrainedModel(net.eval(), CLASSES, prepared, 1.7, reference_images=samples).save(file)
    return file


def test_torch_has_no_warning_of_a_mean_per_pixel_in_colour(tmp_path: Path) -> None:
    prepared = Preprocessing(3, (8, 8), 8, torch.rand(8, 8, 3), torch.ones(3))
    module = formats.InferenceModule(TrainedModel(build("resnet8", classes=10, seed=0).eval(), CLASSES, prepared))
    program = torch.export.export(module, (torch.zeros(1, 8, 8, 3, dtype=torch.uint8),))
    torch.export.save(program, tmp_path / "m.pt2")  # warnings are errors
    assert torch.equal(module.shift.permute(1, 2, 0), prepared.mean)
    assert "mean per pixel 0.5, " in re.sub(r"0\.\d+", "0.5", repr(prepared)) and len(repr(prepared)) < 200


def by_hand(model: Path, pixels: Tensor) -> np.ndarray:
    """(x / 255 - mean) / std, the network, / temperature, softmax: in fp64 and with BN not folded."""
    loaded = load_trained_model(model)
    x = (pixels.double() / 255 - loaded.preprocessing.mean) / loaded.preprocessing.std
    with torch.no_grad():
        logits = loaded.net.double()(x.permute(0, 3, 1, 2))
    return torch.softmax(logits / 1.7, 1).numpy()


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any, str]:
    capsys.readouterr()
    code = run_command([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, json.loads(out) if out else None, err


FRESH = DIGITS.test.images[20:25]


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Any, Path]:
    """The exit code and the output of an export to ONNX, and its file, alone in a folder but for what belongs to it."""
    out = tmp_path_factory.mktemp("exported") / "m.onnx"
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        code = run_command(["export", str(model), "--to", "onnx", "--out", str(out), "--json"])
    return code, json.loads(stream.getvalue()), out


def test_onnx(model: Path, exported: tuple[int, Any, Path]) -> None:
    code, parity, out = exported
    assert code == 0 and parity["top1_agreement"] == 1.0 and parity["largest_difference"] < 1e-5 and parity["n"] == 16
    assert sorted(p.name for p in out.parent.iterdir()) == ["m.onnx", "m.onnx.json", "m.onnx.parity.json"]
    graph = onnx.load(out)
    dims = [
        [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*graph.graph.input, *graph.graph.output)
    ]
    assert dims[0][0] == dims[1][0] == "batch" and len(graph.opset_import) == 1
    turned = [list(n.attribute[0].ints) for n in onnx.load(out).graph.node if n.op_type == "Transpose"]
    assert [1, 0] not in turned  # in float64, before a product: ONNX Runtime 1.24 and 1.25 refuse such a file
    beside = json.loads(out.with_name("m.onnx.parity.json").read_text())
    assert beside.items() <= parity.items() and [b["batch"] for b in beside["batches"]] == [1, 7]
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for n in (1, 2, 5):
        (scores,) = session.run(["scores"], {"pixels": FRESH[:n].numpy()})
        assert np.abs(scores - by_hand(model, FRESH[:n])).max() < 1e-5
    assert parity["sizes"] == 5
    prepared = load_trained_model(model).preprocessing
    for size in ((13, 20), (31, 9), (5, 5)):  # any size, resized as Pillow does
        large = pil_to_tensor(tensor_to_pil(FRESH[0]).resize(size))
        (scores,) = session.run(["scores"], {"pixels": large[None].numpy()})
        assert np.abs(scores - by_hand(model, prepared(tensor_to_pil(large))[None])).max() < 1e-5
    properties = {p.key: p.value for p in onnx.load(str(out)).metadata_props}
    assert tuple(json.loads(properties["classes"])) == CLASSES
    described = json.loads(out.with_name("m.onnx.json").read_text())
    assert described["classes"] == list(CLASSES) and described["input"]["shape"] == ["batch", "height", "width", 1]


@pytest.mark.parametrize(
    ("size", "resize", "interpolation"),
    [((32, 32), 32, "bilinear"), ((24, 40), 48, "bilinear"), ((32, 32), 36, "bicubic"), ((32, 32), 20, "bilinear")],
)
def test_tensor_resize_equals_pillows(size: tuple[int, int], resize: int, interpolation: str) -> None:
    """Bit-identical except for tall images, whose rows some versions of Pillow resize first."""
    prepared = Preprocessing(3, size, resize, torch.zeros(3), torch.ones(3), interpolation)
    resized = Resize(prepared)
    for i, (w, h) in enumerate(((60, 45), (45, 60), (200, 133), (32, 32), (9, 7), (1, 1), (700, 12), (17, 39))):
        pixels = pil_to_tensor(photo(i, w, h).convert("RGB"))
        apart = (resized(pixels[None])[0].int() - prepared(tensor_to_pil(pixels)).int()).abs()
        assert apart.max() <= (3 if h > 2 * w else 0), (w, h)


def test_onnx_has_settings_for_gpus_and_is_checked_where_they_are(
    model: Path, exported: tuple[int, Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider that is there, one that is there and fails, and one that is not."""
    session, asked = onnxruntime.InferenceSession, []

    def start(source: Any, options: Any, providers: list[Any]) -> Any:
        asked.append(providers[0])
        started = session(source, options, providers=["CPUExecutionProvider"])
        if not isinstance(providers[0], str):
            monkeypatch.setattr(type(started), "get_providers", lambda _: [providers[0][0]])
        return started

    available = ["CPUExecutionProvider", "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    trained = load_trained_model(model)
    images = list(trained.reference_images.check)  # type: ignore[union-attr]
    format, file = formats.get_format("onnx"), exported[2]
    cuda, tensorrt = export.check_providers(trained, format, file, images, "fp32")["providers"]
    assert asked == [("CUDAExecutionProvider", {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"})]
    assert cuda["checked"]["top1_agreement"] == 1.0 and cuda["checked"]["n"] == 16
    assert tensorrt == {
        "name": "TensorrtExecutionProvider",
        "settings": {"trt_fp16_enable": "0", "trt_int8_enable": "0"},
        "checked": None,
    }
    monkeypatch.setattr(session, "get_providers", lambda _: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: session(str(file)))
    messages: list[str] = []
    monkeypatch.setattr(export, "log", messages.append)
    assert export.check_providers(trained, format, file, images, "fp32")["providers"][0]["checked"] is None
    (message,) = messages
    assert message.startswith(
        "CUDAExecutionProvider does not run m.onnx here: ONNX Runtime has CUDAExecutionProvider but"
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
def test_aotinductor(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.pt2"
    assert run_command(["export", str(model), "--to", "aotinductor", "--out", str(out)]) == 0
    package: Any = torch._inductor.aoti_load_package(str(out))
    assert tuple(json.loads(package.get_metadata()["classes"])) == CLASSES
    for n in (1, 5):
        assert np.abs(package(FRESH[:n]).numpy() - by_hand(model, FRESH[:n])).max() < 1e-5


def test_a_network_that_cannot_be_packaged_is_a_sentence(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    code, _, err = run_json(capsys, "export", model, "--to", "aotinductor", "--out", tmp_path / "m.pt2", "--json")
    assert code == 2 and "cannot compile the network here (No working C++ compiler found); use --to torch" in err


def test_the_library_for_a_gpu_is_compiled_from_the_moved_graph(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def move(program: torch.export.ExportedProgram, place: str) -> torch.export.ExportedProgram:
        for node in program.graph.nodes:  # torch 2.11's changes the nodes alone
            if "device" in node.kwargs:
                node.kwargs = node.kwargs | {"device": place}
        return program

    compiled: list[torch.export.ExportedProgram] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("torch.export.passes.move_to_device_pass", move)
    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", lambda program, **_: compiled.append(program))
    graphs = ExportGraphs(load_trained_model(model), None)
    formats.get_format("aotinductor").write(graphs, "fp32", tmp_path / "m.pt2")
    code = compiled[0].graph_module.code
    assert "cuda:0" in code and "type='cpu'" not in code


def test_torch(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "m.pt2"
    assert run_command(["export", str(model), "--to", "torch", "--out", str(out)]) == 0
    files = {"classes": ""}
    module: Any = torch.export.load(str(out), extra_files=files).module()
    for n in (1, 5):
        assert np.abs(module(FRESH[:n]).detach().numpy() - by_hand(model, FRESH[:n])).max() < 1e-5
    large = pil_to_tensor(tensor_to_pil(FRESH[0]).resize((30, 19)))
    expected = by_hand(model, load_trained_model(model).preprocessing(tensor_to_pil(large))[None])
    assert np.abs(module(large[None]).detach().numpy() - expected).max() < 1e-5
    assert tuple(json.loads(files["classes"])) == CLASSES


def test_openvino_in_int8(model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "m.xml"
    for i in range(40):
        Image.fromarray(DIGITS.test.images[i, :, :, 0].numpy()).save(tmp_path / f"{i:02}.png")
    arguments = (
        *("export", model, "--to", "openvino", "--precision", "int8"),
        *("--images", tmp_path, "--out", out, "--json"),
    )
    code, parity, err = run_json(capsys, *arguments)
    assert code == 0, err
    assert parity["precision"] == "int8" and parity["bound"] == {"top1_agreement": 0.9, "largest_difference": 0.3}
    read = openvino.Core().read_model(out)
    assert "FakeQuantize" in {op.get_type_name() for op in read.get_ops()}
    assert tuple(json.loads(read.get_rt_info(["resnetlab", "classes"]).astype(str))) == CLASSES
    settings = json.loads(Path(f"{out}.json").read_text())["settings"]
    assert settings == {"INFERENCE_PRECISION_HINT": "f32"}  # by default bf16 where the processor has it
    compiled = openvino.compile_model(read, "CPU", settings)
    for size in ((8, 8), (20, 15)):
        pixels = torch.stack([pil_to_tensor(tensor_to_pil(one).resize(size)) for one in FRESH])
        ours = torch.stack([load_trained_model(model).preprocessing(tensor_to_pil(one)) for one in pixels])
        assert (compiled([pixels.numpy()])[0].argmax(1) == by_hand(model, ours).argmax(1)).mean() >= 0.8


@pytest.mark.slow
def test_onnx_int8_is_calibrated_on_other_images_than_it_is_checked_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(40):
        Image.fromarray(DIGITS.test.images[i, :, :, 0].numpy()).save(tmp_path / f"{i:02}.png")
    (tmp_path / "bad.png").write_text("no image")
    seen = {}
    original = export.export_model

    def record(model: TrainedModel, to: str, precision: str, out: Path, check: Tensor, training: Tensor) -> Any:
        seen.update(check=check, training=training)
        return original(model, to, precision, out, check, training)

    monkeypatch.setattr(export, "export_model", record)
    out = tmp_path / "m.onnx"
    arguments = ("export", model, "--to", "onnx", "--precision", "int8", "--images", tmp_path, "--out", out, "--json")
    code, parity, err = run_json(capsys, *arguments)
    assert code == 0, err
    prepared = load_trained_model(model).preprocessing
    checked = {prepared(tensor_to_pil(x)).numpy().tobytes() for x in seen["check"]}
    calibrated = {x.numpy().tobytes() for x in seen["training"]}
    assert parity["n"] == len(seen["check"]) == len(seen["training"]) == 20 and not checked & calibrated
    assert "QuantizeLinear" in {node.op_type for node in onnx.load(str(out)).graph.node}


def test_disagreement_fails_and_leaves_no_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = load_trained_model(model)
    wrong.net.fc.bias.data[3] += 2.0
    right = formats.export_resize
    monkeypatch.setattr(formats, "export_resize", lambda _, __: right(wrong, formats.InferenceModule(wrong)))
    out = tmp_path / "m.pt2"
    out.write_text("an older one")
    code, document, err = run_json(capsys, "export", model, "--to", "torch", "--out", out, "--json")
    assert code == 1 and document is None and "was not written: top-1 agrees on" in err and "within 0.001" in err
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"] and out.read_text() == "an older one"
    assert PARITY_BOUNDS["fp32"] == (1.0, 1e-3)


def test_a_new_format_is_one_entry(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(graphs: ExportGraphs, precision: str, file: Path) -> None:
        torch.save(formats.InferenceModule(graphs.model), file)

    def read(file: Path) -> formats.PredictFn:
        module, prepare = torch.load(file, weights_only=False), load_trained_model(model).preprocessing
        return lambda pixels: module(torch.stack([prepare(tensor_to_pil(image)) for image in pixels])).detach()

    monkeypatch.setitem(formats.FORMATS, "eager", formats.ExportFormat(suffixes=(".eager",), write=write, read=read))
    code, parity, err = run_json(capsys, "export", model, "--to", "eager", "--out", tmp_path / "m.eager", "--json")
    assert code == 0 and parity["top1_agreement"] == 1.0 and parity["to"] == "eager", err
    assert (tmp_path / "m.eager").exists() and (tmp_path / "m.eager.parity.json").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["--to", "onx"], 2, "unknown target 'onx'; did you mean 'onnx'?"),
        (["--to", "torchscript"], 2, "--to torch writes its successor, a torch.export program"),
        (["--to", "TensorRT"], 2, "TensorRT reads ONNX (--to onnx)."),
        (["--out", "m.ts"], 2, "no format has files that end in '.ts'; torch has deprecated TorchScript"),
        (["--to", "torch", "--precision", "int8"], 2, "--to torch writes fp32, not int8"),
        (["--to", "onnx", "--precision", "int9"], 2, "unknown precision 'int9'"),
        (["--to", "onnx", "--out", "m.txt"], 2, "a file for onnx ends in .onnx"),
        (["--to", "torchvision", "--json"], 2, "--to torchvision takes only --out"),
        (["--to", "onnx", "--data", "digits", "--images", "."], 2, "give --data or --images, not both"),
        (["--to", "onnx", "--images", "nowhere"], 1, "nowhere is not a folder"),
        (["--to", "torch", "--out", "nowhere/m.pt2"], 2, "there is no folder nowhere; make it first"),
    ],
)
def test_wrong_requests(
    arguments: list[str], code: int, sentence: str, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given, _, err = run_json(capsys, "export", model, *arguments)
    assert given == code and sentence in err and not list(tmp_path.iterdir())


def test_a_model_without_images(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = tmp_path / "bare.safetensors"
    replace(load_trained_model(model), reference_images=None).save(bare)
    code, _, err = run_json(capsys, "export", bare, "--to", "torch")
    assert code == 2 and "has no images to check the export on" in err and "--images FOLDER" in err
    (tmp_path / "none").mkdir()
    code, _, err = run_json(capsys, "export", bare, "--to", "torch", "--images", tmp_path / "none")
    assert code == 1 and "has no readable image" in err
    with pytest.raises(UsageError, match="calibrated on other images than those of the parity check"):
        export.export_model(load_trained_model(model), "onnx", "int8", tmp_path / "m.onnx", FRESH, FRESH[:0])
    with pytest.raises(ModelFileError, match="does not exist"):
        load_trained_model(tmp_path / "m.onnx")


def test_a_missing_package_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "find_spec", lambda name: None if name == "onnxscript" else name)
    with pytest.raises(UsageError, match=re.escape(str(missing_package("--to onnx", "onnxscript", "onnx")))):
        export.check_export_request("onnx", "fp32", Path("m.onnx"))


def test_models_of_openvino_let_go_in_any_order_leave_no_stack_for_signals(model: Path) -> None:
    """OpenVINO's plugins left a freed alternate stack, on which the next handled signal ended the process."""
    resnetlab.load(model, device="cpu").select_backend("openvino")  # here, where it is quick, for the cache
    code = (
        "import os, signal, sys, resnetlab\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('handled'))\n"
        "first, second = (resnetlab.load(sys.argv[1], device='cpu') for _ in range(2))\n"
        "first.select_backend('openvino')\n"
        "second.select_backend('openvino')\n"
        "del first\n"
        "del second\n"
        "import gc; gc.collect()\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run([zygote.python(), "-c", code, model], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
