"""Backends agree with torch in fp32 or are not selected; predictions stream through the selected one."""

from __future__ import annotations

import csv
import io
import json
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from resnetlab.cli.main import run_command
from resnetlab.data import digits
from resnetlab.data.decode import decode, list_images
from resnetlab.device import DeviceConfig
from resnetlab.errors import DataError, UsageError, install_hint
from resnetlab.inference import backends, formats, outputs, parity_check
from resnetlab.inference.backends import BackendRequest, LoadedBackend
from resnetlab.inference.export_graphs import ExportGraphs
from resnetlab.inference.formats import Backend, ExportFormat
from resnetlab.inference.inference_module import compute_reference
from resnetlab.inference.outputs import Agreement, FeatureAgreement
from resnetlab.inference.predict import BATCH, PREFETCH, load
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.reference_images import ReferenceImages
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing

DIGITS = digits.load_digits()
CHECK, TRAINING = DIGITS.test.images[:16], DIGITS.train.images[:64]


@pytest.fixture(scope="module")
def trained() -> TrainedModel:
    net: Any = build("resnet8", classes=10, channels=1, seed=0)
    prepared = Preprocessing(1, (8, 8), 8, torch.tensor([0.3]), torch.tensor([0.38]))
    return TrainedModel(
        net.eval(),
        tuple("0123456789"),
        prepared,
        2.0,
        reference_images=ReferenceImages(CHECK, DIGITS.test.labels[:16], TRAINING),
    )


@pytest.fixture(scope="module")
def file(trained: TrainedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("backends") / "m.safetensors"
    trained.save(path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seventy images, one of them broken: more than are predicted in torch without a selection."""
    for i in range(70):
        Image.fromarray(DIGITS.test.images[i, :, :, 0].numpy()).save(tmp_path / f"{i:03}.png")
    (tmp_path / "011.png").write_bytes(b"broken")
    return tmp_path


def select_backend(
    model: TrainedModel, backend: str = "auto", precision: str = "auto", **options: Any
) -> LoadedBackend:
    return backends.select_backend(model, BackendRequest(backend=backend, precision=precision, **options))


def by_hand(trained: TrainedModel, pixels: Tensor) -> Tensor:
    x = (pixels.float() / 255 - 0.3) / 0.38
    with torch.no_grad():
        return torch.softmax(trained.net(x.permute(0, 3, 1, 2)) / 2.0, 1)


@pytest.mark.parametrize(
    ("name", "precision", "bound"),
    [
        ("torch", "fp32", 1e-5),
        ("torch", "bf16", 0.03),
        ("onnxruntime", "fp32", 1e-5),
        ("openvino", "fp32", 1e-5),
        ("openvino", "int8", 0.2),
    ],
)
def test_each_backend_agrees_with_the_network(trained: TrainedModel, name: str, precision: str, bound: float) -> None:
    fresh = DIGITS.test.images[100:107]
    choice = select_backend(trained, name, precision)
    for pixels in (fresh, fresh[:1], fresh[:4]):  # batches of any size, also from another thread, as in a service
        with ThreadPoolExecutor(1) as thread:
            scores = thread.submit(choice.predict, pixels).result()
        assert torch.equal(scores, choice.predict(pixels))
        assert scores.dtype == torch.float32 and scores.shape == (len(pixels), 10)
        assert float((scores - by_hand(trained, pixels)).abs().max()) < bound
    assert "on 16 reference images" in choice.reason
    assert torch.allclose(compute_reference(trained, fresh), by_hand(trained, fresh), atol=1e-6)


def test_batches_of_several_threads_are_computed_beside_each_other(trained: TrainedModel) -> None:
    """OpenVINO's: in parts of all sizes, and after an error too."""
    predict = select_backend(trained, "openvino", "fp32").predict
    batches = [DIGITS.test.images[i : i + n] for i, n in enumerate([1, 2, 3, 5, 16, 17, 64, 16])]
    alone = [predict(batch) for batch in batches]
    with ThreadPoolExecutor(4) as threads:
        assert all(map(torch.equal, threads.map(predict, batches * 4), alone * 4))
        with pytest.raises(RuntimeError):
            threads.submit(predict, torch.zeros(16, 8, 8, 3, dtype=torch.uint8)).result()
        assert all(map(torch.equal, threads.map(predict, batches), alone))


@pytest.mark.parametrize(
    ("name", "precision"),
    [("torch", "fp32"), ("torch", "bf16"), ("onnxruntime", "fp32"), ("onnxruntime", "int8")]
    + [("openvino", precision) for precision in ("fp32", "bf16", "int8")],
)
def test_each_backend_computes_features(trained: TrainedModel, name: str, precision: str) -> None:
    """Those of the network, within the bounds; fp32 nearly exactly; on images that nothing was calibrated on."""
    fresh = DIGITS.test.images[100:107]
    choice = select_backend(trained, name, precision, output="features")
    assert re.search(
        r"as requested; features agree to a cosine of \S+, relative error \S+ with torch fp32 on 16", str(choice)
    )
    x = (fresh.float() / 255 - 0.3) / 0.38
    with torch.no_grad():
        expected = trained.net.forward_features(x.permute(0, 3, 1, 2)).mean((2, 3))
    features = choice.predict(fresh)
    assert features.dtype == torch.float32 and features.shape == (7, 64)
    assert torch.allclose(choice.predict(fresh[:1]), features[:1], rtol=0.1, atol=0.1)
    error = (features - expected).norm(dim=1) / expected.norm(dim=1)
    cosine = torch.cosine_similarity(features, expected).min()
    least, largest = {"fp32": (0.9999, 1e-5), "bf16": (0.999, 0.05), "int8": (0.95, 0.3)}[precision]
    assert float(cosine) > least and float(error.max()) < largest
    if precision == "fp32":  # whose head on them gives the scores
        with torch.no_grad():
            scores = torch.softmax(trained.net.fc(features) / 2.0, 1)  # type: ignore[operator]
        assert torch.allclose(scores, by_hand(trained, fresh), atol=1e-5)


def test_features_that_do_not_agree_are_not_taken(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own bounds: a backend whose features all point elsewhere, though its network is right."""

    def start(program: bytes, graphs: ExportGraphs, precision: str) -> Any:
        return lambda pixels: compute_reference(graphs.model, pixels, graphs.output).roll(1, 1)

    wrong = Backend(name="wrong", precisions=("fp32",), build=lambda graphs, precision: b"", start=start)
    table = {"wrong": (wrong, ExportFormat(suffixes=(), write=lambda *_: None, read=None, backend=wrong))}
    monkeypatch.setattr(backends, "BACKENDS", table | {"torch": backends.BACKENDS["torch"]})
    choice = select_backend(trained, precision="fp32", output="features")
    assert choice.name == "torch" and "wrong fp32 does not agree (features agree to a cosine of 0." in choice.reason
    with pytest.raises(UsageError, match="unknown output 'feature'; did you mean 'features'"):
        select_backend(trained, output="feature")


def fake(name: str, shift: float, seconds: float, times: dict[int, float]) -> tuple[Backend, ExportFormat]:
    """A backend whose first score is off by `shift`, and that is listed in `times` as taking so many seconds."""

    def start(program: bytes, graphs: ExportGraphs, precision: str) -> Any:
        def predict(pixels: Tensor) -> Tensor:
            return compute_reference(graphs.model, pixels) + shift * torch.eye(10)[0]

        times[id(predict)] = seconds
        return predict

    backend = Backend(name=name, precisions=("fp32",), build=lambda graphs, precision: b"program", start=start)
    return backend, ExportFormat(suffixes=(), write=lambda *_: None, read=None, backend=backend)


def test_auto_selects_the_fastest_that_agrees(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times: dict[int, float] = {}
    table = {
        "slow": fake("slow", 0.0, 8.0, times),
        "wrong": fake("wrong", 0.2, 1.0, times),
        "right": fake("right", 1e-4, 2.0, times),
    }
    monkeypatch.setattr(backends, "BACKENDS", table)
    # no clock: a busy machine would decide the test
    monkeypatch.setattr(backends, "measure_seconds", lambda functions, pixels: [times[id(f)] for f in functions])
    choice = select_backend(trained)
    assert (choice.name, choice.precision) == ("right", "fp32")
    assert "comparing slow, wrong, right, once" in capsys.readouterr().err  # a minute where other programs work
    assert "slow fp32 takes 4.00 times as long" in choice.reason and "wrong fp32 does not agree" in choice.reason
    table = {"wrong": table["wrong"], "torch": fake("torch", float("nan"), 1.0, times)}
    monkeypatch.setattr(backends, "BACKENDS", table)
    choice = select_backend(trained)
    assert choice.name == "torch" and "wrong fp32 does not agree" in choice.reason


def test_agreement() -> None:
    a = torch.tensor([[0.6, 0.4], [0.3, 0.7]])
    assert Agreement.between(a, a) == Agreement(1.0, 0.0)
    half = Agreement.between(torch.tensor([[0.4, 0.6], [0.3, 0.7]]), a)
    assert half.rate == 0.5 and half.largest_difference == pytest.approx(0.2) and not half.within(0.99, 0.3)
    assert not Agreement.between(a * float("nan"), a).within(0.0, 0.99)
    torn = torch.tensor([[0.502, 0.498], [0.51, 0.49]])  # undecided, and barely decided
    assert Agreement.between(torn.flip(1), torn).rate == 0.5
    right, turned = FeatureAgreement.between(a, a), FeatureAgreement.between(a[:, [1, 0]], a)
    assert right.within(0.9999, 0.0) and not right.within(0.9999, -1.0)
    assert turned.rate == pytest.approx(0.42 / 0.58) and turned.largest_difference == pytest.approx(
        0.4 * 2**0.5 / 0.58**0.5
    )
    assert not FeatureAgreement.between(a * float("nan"), a).within(0.1, 0.5)


@pytest.mark.parametrize(
    ("backend", "precision", "sentence"),
    [
        ("tensorrt", "auto", "unknown backend 'tensorrt'"),
        ("torch", "int8", "torch computes in bf16 or fp32 here, not in int8"),
        ("onnxruntime", "bf16", "onnxruntime computes in fp32 or int8 here, not in bf16"),
        ("auto", "fp16", "unknown precision 'fp16'; did you mean"),
    ],
)
def test_wrong_requests(trained: TrainedModel, backend: str, precision: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        select_backend(trained, backend, precision)


def test_missing_packages_and_images(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(trained, reference_images=None)
    assert select_backend(bare).name == "torch" and "no reference images" in select_backend(bare).reason
    with pytest.raises(UsageError, match="--calibrate FOLDER"):
        select_backend(bare, "openvino", "int8")
    with pytest.raises(UsageError, match="other images than it is evaluated on"):
        select_backend(bare, "openvino", "int8", check_images=CHECK, calibration_images=CHECK)
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=re.escape(install_hint("openvino"))):
        select_backend(trained, "openvino")
    with pytest.raises(UsageError, match="no backend installed here computes in int8"):
        select_backend(trained, "auto", "int8")
    assert select_backend(trained).name == "torch"


def run_predict(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = run_command(["predict", *arguments])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


def test_the_command_reports_the_backend(
    file: str, folder: Path, trained: TrainedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_predict(capsys, file, str(folder / "000.png"), "--json")
    assert code == 0 and "backend: torch fp32 (for 64 images or fewer" in err
    code, out, err = run_predict(
        capsys, file, str(folder), "--format", "jsonl", "--backend", "openvino", "--precision", "fp32"
    )
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and "backend: openvino fp32 (as requested; top-1 agrees on 100.0%" in err
    assert "1 of 70 images could not be read. The first: " in err
    assert [Path(row["image"]).name for row in rows] == [f"{i:03}.png" for i in range(70)]
    assert "error" in rows[11] and sum("error" in row for row in rows) == 1
    expected = by_hand(trained, DIGITS.test.images[:70])
    for i in (0, 12, 69):
        best = rows[i]["top"][0]
        assert best["class"] == str(int(expected[i].argmax())) and best["score"] == pytest.approx(
            float(expected[i].max()), abs=1e-4
        )


def test_all_formats_agree(file: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in range(70, 130):  # beyond the rows that determine the column widths
        Image.fromarray(DIGITS.test.images[more, :, :, 0].numpy()).save(folder / f"{more:03}.png")
    common = (file, str(folder), "--backend", "torch", "--precision", "fp32", "--top", "1")
    whole = json.loads(run_predict(capsys, *common, "--json")[1])["predictions"]
    lines = [json.loads(line) for line in run_predict(capsys, *common, "--format", "jsonl")[1].splitlines()]
    rows = list(csv.DictReader(io.StringIO(run_predict(capsys, *common, "--format", "csv")[1])))
    table = run_predict(capsys, *common)[1].splitlines()
    assert whole == lines and len(rows) == 130
    assert [row["class"] for row in rows if not row["error"]] == [p["top"][0]["class"] for p in whole if "top" in p]
    shown = [line for line in table if ".png" in line]
    assert len(shown) == 130 and len({line.index(".png") for line in shown}) == 1


def test_common_mistakes(file: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    (folder / "empty").mkdir()
    one = str(folder / "000.png")
    code, out, err = run_predict(capsys, file, one, str(folder / "empty"), "--json")
    good, bad = json.loads(out)["predictions"]
    assert code == 1 and "top" in good and bad["image"].endswith("empty") and "holds no image" in bad["error"]
    code, out, _ = run_predict(capsys, file, str(folder / "empty"), "--json")
    assert code == 1 and len(json.loads(out)["predictions"]) == 1

    class Stdin:
        buffer = io.BytesIO(Path(one).read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    code, out, _ = run_predict(capsys, file, "-", one, "--json")
    first, second = json.loads(out)["predictions"]
    assert code == 0 and first["image"] == "-" and first["top"] == second["top"]
    for wrong, sentence in (
        (("",), "the name of an image is empty"),
        (("-", "-"), "give it once"),
        ((one, "--format", "csv", "--json"), "--json and --format csv contradict each other"),
        ((one, "--backend", "opnvino"), "unknown backend 'opnvino'; did you mean 'openvino'?"),
    ):
        code, out, err = run_predict(capsys, file, *wrong)
        assert (code, out) == (2, "") and sentence in err
    code, out, err = run_predict(capsys, file, one, "--precision", "int8", "--calibrate", "nowhere")
    assert (code, out) == (1, "") and "nowhere is not a folder; --calibrate takes a folder of images." in err
    assert run_predict(capsys, file, one, "--format", "json", "--json")[0] == 0


def test_a_large_folder_streams(file: str, tmp_path: Path) -> None:
    """Few of thousands of images are read before the first prediction, and few are in memory at once."""
    model = load(file, device="cpu")
    content = io.BytesIO()
    Image.fromarray(DIGITS.test.images[0, :, :, 0].numpy()).save(content, "png")
    asked = 0

    def endless() -> Any:
        nonlocal asked
        while True:
            asked += 1
            yield f"{asked}", content.getvalue()

    predictions = model.named_predictions(endless(), top=1)
    for n in range(1, 2001):
        assert next(predictions).name == str(n)
        assert asked <= n + PREFETCH + BATCH
    before = threading.active_count()
    predictions.close()
    assert threading.active_count() < before  # nothing more is decoded


def test_folders_are_listed_lazily_in_path_order(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.jpg", "a.png", "c.PNG", "b.png", "b/c/x.png", "notes.txt", "b/none.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    wanted = sorted(p for p in tmp_path.rglob("*") if p.suffix.lower() in (".png", ".jpg"))
    assert list(list_images(tmp_path)) == wanted
    (tmp_path / "gone.png").symlink_to("nowhere")
    assert tmp_path / "gone.png" in list(list_images(tmp_path))
    (tmp_path / "ring").symlink_to(tmp_path, target_is_directory=True)
    assert len(list(list_images(tmp_path))) == len(wanted) + 1
    for name in ("._a.png", ".cache/a.png", "__MACOSX/a.png"):  # ignored as in training
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert len(list(list_images(tmp_path))) == len(wanted) + 1
    (tmp_path / "b" / "link").symlink_to(elsewhere := tmp_path / ".elsewhere", target_is_directory=True)
    elsewhere.mkdir()
    (elsewhere / "y.png").touch()
    assert tmp_path / "b" / "link" / "y.png" in list(list_images(tmp_path))  # followed, as in training
    assert list(list_images(tmp_path / "b" / "link")) == [tmp_path / "b" / "link" / "y.png"]


def test_decoding_threads_do_not_change_warning_filters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    Image.fromarray(np.zeros((60, 60), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 1500
    )  # 3,600 pixels are an error; up to twice the limit they would be worth a warning
    filters, wrong = list(warnings.filters), []

    def decode_often() -> None:
        for _ in range(50):
            try:
                decode(tmp_path / "large.png")
                wrong.append("decoded")
            except DataError as error:
                if "claims more than 3,000 pixels" not in str(error):
                    wrong.append(str(error))

    threads = [threading.Thread(target=decode_often) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and warnings.filters == filters


def test_a_backend_is_timed_after_the_previous_one_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The threads of a runtime hold the cores for a while after its work is done."""
    monkeypatch.setattr(parity_check, "PAUSE", 0.05)
    ended = [0.0]

    def blocks_cores(x: torch.Tensor) -> torch.Tensor:
        ended[0] = time.perf_counter()
        return x

    def is_slowed_down(x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02 if time.perf_counter() - ended[0] < 0.03 else 0.0)
        return x

    for order in ([blocks_cores, is_slowed_down], [is_slowed_down, blocks_cores]):
        assert max(parity_check.measure_seconds(order, torch.zeros(1))) < 0.02


@pytest.mark.parametrize(
    ("precision", "bound", "expected"),
    [("auto", 1.0, "bf16"), ("auto", 0.0, "fp32"), ("bf16", 0.0, "bf16"), ("fp32", 0.0, "fp32")],
)
def test_bf16_on_a_gpu_is_compared_with_fp32(
    precision: str, bound: float, expected: str, trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is not needed: the same code on a CPU. `bound` is the largest difference of a score that is allowed."""
    config = DeviceConfig(torch.device("cpu"), "fp32" if precision == "fp32" else "bf16", 1, "for the test")
    monkeypatch.setattr(backends, "select_device", lambda *_: config)
    monkeypatch.setitem(outputs.PARITY_BOUNDS, "bf16", (0.5, bound))  # type: ignore[arg-type]
    loaded = backends.select_backend(trained, BackendRequest(precision=precision), torch.device("cuda"))
    assert (loaded.name, loaded.precision) == ("torch", expected)
    assert ("top-1 agrees" in loaded.reason) is (precision != "fp32")
    scores = compute_reference(trained, CHECK)
    assert (loaded.predict(CHECK) - scores).abs().max() <= (1e-5 if expected == "fp32" else 0.05)
    with monkeypatch.context() as patch:  # BN is folded: none of the network's is called
        patch.setattr(torch.nn.BatchNorm2d, "forward", None)
        loaded.predict(CHECK)


def test_bf16_on_a_gpu_needs_images_to_compare(trained: TrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    config, blank = (
        DeviceConfig(torch.device("cpu"), "bf16", 1, "for the test"),
        replace(trained, reference_images=None),
    )
    monkeypatch.setattr(backends, "select_device", lambda *_: config)
    for precision, expected in (("auto", "fp32"), ("bf16", "bf16")):
        loaded = backends.select_backend(blank, BackendRequest(precision=precision), torch.device("cuda"))
        assert loaded.precision == expected and "no reference images" in loaded.reason
