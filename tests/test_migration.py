"""Files that version 0.1 wrote under its old name are read: predictions, figures and resumed runs are what they were there."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import resnetlab
from resnetlab.cli.main import run_command
from resnetlab.data.digits import load_digits
from resnetlab.errors import ModelFileError, RunError
from resnetlab.inference.import_model import ImportOptions, import_weights
from resnetlab.models.annotated_model import load_annotated, read_task
from resnetlab.models.model_file import load_trained_model
from resnetlab.tensor_file import read_tensor_file, write_tensor_file

REPOSITORY = Path(__file__).resolve().parents[1]
OLD = REPOSITORY / "tests" / "data" / "v0.1"
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
EXPECTED_MODELS = (
    "classifier/model.safetensors",
    "photos.safetensors",
    "detector.safetensors",
    "segmenter.safetensors",
)
UNPROTECTED = "was written by version 0.1: its digest protects its tensors, but not its classes"
pytestmark = pytest.mark.filterwarnings("ignore:.*was written by version 0.1")


def weights_digest(file: Path) -> str:
    """The digest of scripts/bits."""
    loader = importlib.machinery.SourceFileLoader("bits", str(REPOSITORY / "scripts" / "bits"))
    spec = importlib.util.spec_from_loader("bits", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return str(module.weights_digest(file))


def same_machine() -> bool:
    """Bits and last digits depend on the processor and on torch."""
    environment = EXPECTED["environment"]
    return (environment["torch"], environment["capability"]) == (
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
    )


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert run_command([*map(str, arguments), "--device", "cpu", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_classifiers_predict_what_they_did(capsys: pytest.CaptureFixture[str]) -> None:
    for name, model, image in (
        ("classifier", "classifier/model.safetensors", REPOSITORY / "docs" / "three.png"),
        ("photos", "photos.safetensors", OLD / "photo.png"),
    ):
        (found,) = printed(capsys, "predict", OLD / model, image, "--top", 10)["predictions"]
        (expected,) = EXPECTED["predict"][name]["predictions"]
        assert [row["class"] for row in found["top"]] == [row["class"] for row in expected["top"]]
        assert [row["score"] for row in found["top"]] == pytest.approx(
            [row["score"] for row in expected["top"]], abs=1e-6
        )


def test_a_classifier_is_evaluated_as_it_was(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = OLD / "classifier" / "model.safetensors"
    found = printed(capsys, "evaluate", model, "--data", "digits", "--precision", "fp32", "--out", tmp_path)
    expected = EXPECTED["evaluate"]
    for key in ("n", "split", "top1_error", "top5_error", "confusion", "temperature", "calibration"):
        assert found[key] == expected[key], key
    for row, old in zip(found["per_class"], expected["per_class"], strict=True):
        assert {key: row[key] for key in old} == old
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("task", "model", "options"), [("detect", "detector", ["--score", "0.2"]), ("segment", "segmenter", [])]
)
def test_detectors_and_segmenters_predict_what_they_did(
    task: str, model: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = OLD / f"{model}.safetensors"
    assert read_task(file) == task
    assert run_command([task, "predict", str(file), str(OLD / "scene.png"), "--device", "cpu", *options]) == 0
    (found,) = json.loads(capsys.readouterr().out)["predictions"]
    (expected,) = EXPECTED[task]["predict"]["predictions"]
    for key, rows in expected.items():
        if key != "image" and key != "drawn":
            assert len(found[key]) == len(rows)
            for a, b in zip(found[key], rows, strict=True):
                assert a["class"] == b["class"]
                for value in b.keys() - {"class"}:
                    assert a[value] == pytest.approx(b[value], abs=1e-3 if value != "box" else 0.11)


def test_a_model_keeps_everything_and_is_written_in_the_new_format(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=UNPROTECTED):
        model = load_trained_model(OLD / "photos.safetensors")
    assert (model.spec.activation_order, model.spec.stride_in, model.spec.preact_transition) == ("preact", "3x3", "raw")
    recipe = model.recipe
    assert (recipe["image_size"], recipe["eval_resize"], recipe["val_images"], recipe["ema_decay"]) == (24, 28, 9, 0.9)
    assert recipe["backbone_lr_scale"] == 0.5 and recipe["specification"]["activation_order"] == "preact"
    assert model.versions["resnetlab"] == "0.1.0" and model.reference_images is not None
    assert model.data.keys() == {"name", "fingerprint"} and model.fingerprints["seen"].shape == (72, 2)
    model.save(tmp_path / "new.safetensors")
    again = load_trained_model(tmp_path / "new.safetensors")  # which warns of nothing
    assert again.fingerprints["seen"].equal(model.fingerprints["seen"]) and again.recipe == model.recipe
    assert weights_digest(tmp_path / "new.safetensors") == EXPECTED["weights"]["photos.safetensors"]
    detector = load_annotated(OLD / "detector.safetensors", "detect")
    assert detector.head_spec.image_size == 64 and detector.recipe["image_size"] == 64
    detector.save(tmp_path / "detector.safetensors")
    assert load_annotated(tmp_path / "detector.safetensors", "detect").head_spec == detector.head_spec


def test_values_that_no_digest_protects_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    with safe_open(OLD / "photos.safetensors", framework="pt") as opened:
        values = json.loads(opened.metadata()["residuum"])
    for seen in ("abc", "AAAA", 5):  # not base64, not pairs of 32-bit numbers, not text
        values["data"]["seen"] = seen
        save_file(load_file(OLD / "photos.safetensors"), file, {"residuum": json.dumps(values)})
        with pytest.raises(ModelFileError, match="is damaged"):
            load_trained_model(file)
    write_tensor_file(file, {}, {"task": ["detect"]})
    assert read_task(file) == "classify"
    with pytest.raises(ModelFileError, match="is something else, and a detector is needed"):
        load_annotated(file, "detect")


def test_their_tensors_are_still_checked(tmp_path: Path) -> None:
    for name in EXPECTED_MODELS:
        raw = bytearray((OLD / name).read_bytes())
        raw[-5] ^= 1
        (tmp_path / "m.safetensors").write_bytes(raw)
        with pytest.raises(ModelFileError, match="is damaged"):
            (load_annotated if "er.s" in name else load_trained_model)(  # type: ignore[operator]
                tmp_path / "m.safetensors", **({"task": read_task(OLD / name)} if "er.s" in name else {})
            )


def test_an_unfinished_run_is_resumed_bit_identically(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped at once and resumed again: the first start rewrites its files, the second finds a run of today."""
    run = tmp_path / "run"
    shutil.copytree(OLD / "unfinished", run)
    expected = EXPECTED["unfinished"]
    result = printed(capsys, "train", "--resume", run)
    assert (result["steps"], result["n"]) == (400, 360)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0] == json.loads((OLD / "unfinished" / "metrics.jsonl").read_text().splitlines()[0])  # continued
    assert (run / "holdout.json").read_text() == (OLD / "unfinished" / "drawn.json").read_text()
    assert "eval_every" in (run / "recipe.toml").read_text() and "judge_every" not in (run / "recipe.toml").read_text()
    if same_machine():
        assert weights_digest(run / "model.safetensors") == expected["weights"]
        assert [line["loss"] for line in lines if line["kind"] == "train"][-1] == expected["last_loss"]
        assert result["top1_error"] == expected["result"]["top1_error"]
    assert printed(capsys, "train", "--resume", run)["steps"] == 400  # finished


def test_a_run_of_another_recipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "unfinished", run)
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("seed = 3", "seed = 4"))
    assert run_command(["train", "--resume", str(run)]) == RunError.exit_code
    assert "was made with another recipe or other data" in capsys.readouterr().err


def test_a_finished_run_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(OLD / "classifier", run)
    (run / "report.html").write_text("the report, which the fixtures leave out")
    assert printed(capsys, "train", "--resume", run)["top1_error"] == 0.15
    assert "judge_every" in (run / "recipe.toml").read_text()  # nothing was rewritten


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_exported_weights_are_imported(suffix: str) -> None:
    model, _ = import_weights(OLD / "exports" / f"classifier{suffix}", ImportOptions())
    original = load_trained_model(OLD / "classifier" / "model.safetensors")
    assert (
        model.spec == original.spec and model.classes == original.classes and model.temperature == original.temperature
    )
    assert model.calibration == original.calibration and model.data == original.data
    assert all(value.equal(original.net.state_dict()[name]) for name, value in model.net.state_dict().items())


def test_exported_graphs_compute_what_they_did() -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = resnetlab.load(OLD / "classifier" / "model.safetensors", device="cpu")
    pixels = load_digits().test.images[:7]
    session = onnxruntime.InferenceSession(OLD / "exports" / "classifier.onnx")
    (scores,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})
    prepared = torch.stack([model.preprocessing(_pil(image)) for image in pixels])
    torch.testing.assert_close(torch.from_numpy(scores), model.predict_scores(prepared), atol=1e-3, rtol=0)


def _pil(pixels: torch.Tensor) -> Any:
    from resnetlab.preprocessing import tensor_to_pil

    return tensor_to_pil(pixels)


def flipped(file: Path, position: int, bit: int, to: Path) -> Path:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 1 << bit
    to.write_bytes(raw)
    return to


def test_one_flipped_bit_anywhere_is_refused(tmp_path: Path) -> None:
    """In every fifth byte of a header with a model's metadata, and in every byte of some tensors."""
    _, metadata = read_tensor_file(OLD / "classifier" / "model.safetensors", "model file")
    tensors = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.uint8)}
    file = tmp_path / "new.safetensors"
    write_tensor_file(file, tensors, metadata | {"format": 2})
    size = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for position in [*range(32), *range(32, size, 5), *range(size, file.stat().st_size)]:
        bit = int(torch.randint(8, (), generator=generator))
        with pytest.raises(ModelFileError):
            read_tensor_file(flipped(file, position, bit, tmp_path / "m.safetensors"), "model file")


def test_nothing_passes_for_an_older_file(tmp_path: Path) -> None:
    file = tmp_path / "new.safetensors"
    load_trained_model(OLD / "classifier" / "model.safetensors").save(file)
    with safe_open(file, framework="pt") as opened:
        entries = opened.metadata()
    text = entries["resnetlab"]
    for metadata in (
        {"resnetlab": text},
        {"resnetlab": text.replace('"format": 2', '"format": 1'), "digest": entries["digest"]},
        {"resnetlab": text.replace('"format": 2', '"format": 3'), "digest": entries["digest"]},
        {"residuum": text, "digest": entries["digest"]},
    ):
        save_file(load_file(file), tmp_path / "m.safetensors", metadata)
        with pytest.raises(ModelFileError, match=r"is damaged|has format [13], this version reads 2"):
            load_trained_model(tmp_path / "m.safetensors")
    save_file(load_file(file), tmp_path / "m.safetensors", entries)  # rewritten by another program, and still the same
    assert load_trained_model(tmp_path / "m.safetensors").classes == tuple("0123456789")


def test_images_and_fingerprints_can_be_left_out(tmp_path: Path) -> None:
    model = load_trained_model(OLD / "photos.safetensors")
    model.reference_images, model.fingerprints = None, {}
    model.save(tmp_path / "m.safetensors")
    again = load_trained_model(tmp_path / "m.safetensors")
    assert again.reference_images is None and not again.fingerprints
    assert not [
        name for name in load_file(tmp_path / "m.safetensors") if name.startswith(("reference.", "fingerprints."))
    ]
