"""The command line: one sentence and an exit code for every error, and the JSON that programs rely on."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import resnetlab
from resnetlab.cli import console, main
from resnetlab.cli.main import run_command
from resnetlab.data import cifar, digits
from resnetlab.models.resnet import SmallImageWarning
from resnetlab.tensor_file import read_tensor_file, write_tensor_file

SHORT = ("--steps", "20", "--net", "resnet8", "--set", "image_size=8", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "run"
    assert run_command(["train", "digits", *SHORT, "--out", str(out)]) == 0
    return out / "model.safetensors"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "drei ü.png"
    Image.fromarray(digits.load_digits().test.images[0, :, :, 0].numpy()).resize((30, 40)).save(file)
    return file


def test_a_command_names_the_report_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "digits", *SHORT, "--out", str(tmp_path / "run")]) == 0
    assert "".join(capsys.readouterr()).count("report.html") == 1


def test_arguments_are_looked_at_before_the_model_is(
    tmp_path: Path, model: Path, image: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resnetlab.models.model_file.read_tensor_file", lambda *_: pytest.fail("the model was loaded"))
    code, _, err = run_cli(capsys, "predict", str(image))
    assert code == 2 and "is an image; the model comes first" in err
    missing = str(tmp_path / "missing")
    for line in (["predict", model, missing], ["explain", model, missing], ["neighbours", model, "digits", missing],
                 ["embed", model, missing], ["evaluate", model, "--data", missing]):  # fmt: skip
        code, _, err = run_cli(capsys, *map(str, line))
        assert code == 1 and "missing is not there" in err, line
    monkeypatch.undo()
    assert resnetlab.evaluate(model.parent, "digits").n == 360  # a run folder is a model


def test_the_time_left_counts_from_the_first_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter(
        [0.0, 100.0, 110.0, 120.0, 130.0]
    )  # a pool of processes starts for 100 s before the first of three images
    monkeypatch.setattr("resnetlab.progress.time.monotonic", lambda: next(times))
    with console.ProgressBar("images") as bar:
        for done in (1, 2, 3, 3):  # the last one twice
            bar.update(done, 3)
    assert capsys.readouterr().err.splitlines() == ["images 1/3", "images 2/3  10 s left", "images 3/3"]


def run_cli(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    capsys.readouterr()
    code = run_command(list(arguments))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tran"], 'Unknown command "tran". Did you mean "train"?'),
        (["train", "--stps", "3"], "train has no option --stps; did you mean --steps?"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--steps", "0"], "--steps must be 1 or more, not 0."),
        (["train", "digts"], "unknown data set 'digts'; did you mean 'digits'?"),
        (["train", "--net", "resnt20"], "unknown network 'resnt20'; did you mean 'resnet20'?"),
        (["train", "--net", "resnet21"], "the nearest depths are 20 and 26"),
        (["train", "--recipe", "quik"], "unknown recipe 'quik'; did you mean 'quick'?"),
        (["train", "--set", "bach=8"], "unknown key 'bach'; did you mean 'batch'?"),
        (["train", "--set", "batch"], "--set takes key=value, not 'batch'; for example --set batch=64"),
        (["train", "--set", "shortcut=D"], "unknown shortcut 'D'"),
        (["train", "--device", "cuda:9"], "device 'cuda:9' is not available"),
        (["train", "--resume", "x", "--out", "y"], "leave out --out and --recipe"),
        (["train", "--verify-resume", "--procs", "2"], "--verify-resume uses one process"),
        (["train", "--verify-resume", "--batch", "auto"], "leave out --procs, --batch auto and --json."),
        (["train", "--verify-resume", "--out", "run"], "it leaves nothing of; leave out --out."),
        (["train", "--verify-resume", "--folds", "2"], "leave out --folds."),
        (["train", "--max-restarts", "2"], "--max-restarts is for processes that --procs starts"),
        (["train", "--recipe", "modern"], "recipe modern needs images: resnetlab train DATA"),
        (["segment", "train"], "recipe masks needs images: resnetlab segment train DATA"),
        (["detect", "train", "boxes", "--max-restarts", "2"], "--max-restarts is for processes that --procs starts"),
        (["train", "--show-recipe", "paper"], "unknown recipe 'paper'; did you mean 'paper-cifar'?"),
        (["inspect", "resnet56", "--set", "shortct=C"], "did you mean 'shortcut'?"),
        (["inspect", "resnet56", "--image-size", "0"], "has no pixel"),
        (["predict", "model.safetensors"], "predict needs images"),
        (["predict", "model.safetensors", "a.png", "--tpo", "3"], "unknown option --tpo"),
        (["train", "digits", "--no-pretrained"], "--pretrained is off unless it is given; leave --no-pretrained out."),
        (["evaluate", "model.safetensors"], "--data"),
        (["train", "resnet18"], "resnet18 is a network, not data; give it as --net resnet18"),
    ],
)
def test_wrong_requests_exit_with_2(
    arguments: list[str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(capsys, *arguments)
    assert (code, out) == (2, ""), err
    assert sentence in err and err.startswith("resnetlab: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_found_exits_with_1(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    cases = [
        (["train", "cifar10", "--data-dir", str(tmp_path)], "CIFAR-10 is not under"),
        (["train", "--resume", str(tmp_path)], "is not a run folder (it has no recipe.toml)"),
        (["train", "--resume", str(tmp_path / "rn")], "rn is not there; "),
        (["train", "--resume", str(model)], "is a file; --resume takes the run's folder"),
        (
            ["evaluate", str(tmp_path / "no.safetensors"), "--data", "digits"],
            "does not exist; `resnetlab train` writes",
        ),
        (["evaluate", str(tmp_path), "--data", "digits"], "is a folder without model.safetensors"),
        (["evaluate", str(model), "--data=~/no photos"], f"{Path.home()}/no photos is not there"),  # as shells leave it
        (["train", "digits", "--out", str(model.parent), *SHORT], "is not empty; choose another --out"),
        (["train", "digits", "--out", str(model), *SHORT], "is a file; --out names a folder."),
    ]
    for arguments, sentence in cases:
        code, out, err = run_cli(capsys, *arguments)
        assert (code, out) == (1, ""), (arguments, err)
        assert sentence in err.splitlines()[-1], err


def rewrite_specification(model: Path, folder: Path, **changes: object) -> bytes:
    """A model file with another specification and the digest of that: whole, but made wrongly."""
    tensors, metadata = read_tensor_file(model, "model file")
    metadata["specification"] |= changes
    write_tensor_file(folder / "changed.safetensors", tensors, metadata)
    return (folder / "changed.safetensors").read_bytes()


def test_damaged_and_foreign_model_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, model: Path) -> None:
    import torch
    from safetensors.torch import save_file

    whole = model.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    contents = {
        "is empty": b"",
        "is not a complete safetensors file": whole[:-1],
        "not a complete safetensors": whole[: header - 5],
        "not a complete safetensors file (": b"PK\x03\x04 a zip file, as torch.save writes",
        "its contents do not match its digest": whole.replace(b'\\"depths\\": [1, 1, 1]', b'\\"depths\\": [1, 1, 2]'),
        "does not match its own specification": rewrite_specification(model, tmp_path, depths=[1, 1, 2]),
        "unknown shortcut 'Z'": rewrite_specification(model, tmp_path, shortcut="Z"),
    }
    file = tmp_path / "m.safetensors"
    for sentence, content in contents.items():
        assert content != whole
        file.write_bytes(content)
        code, _, err = run_cli(capsys, "evaluate", str(file), "--data", "digits")
        assert code == 1 and sentence in err and str(file) in err, err
    save_file({"weight": torch.zeros(3)}, file)
    code, _, err = run_cli(capsys, "predict", str(file), "-")
    assert code == 1 and "contains tensors but no resnetlab model file: it was made by other software" in err


def test_evaluate_json(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    code, out, _ = run_cli(capsys, "evaluate", str(model), "--data", "digits", "--json", "--precision", "fp32")
    figures = json.loads(out)
    assert code == 0 and set(figures) == {
        "model", "data", "split", "protocol", "protocol_options", "top1_error", "top1_interval", "top5_error", "n", "loss",
        "calibration_error", "reliability", "temperature", "calibration", "notes", "published", "per_class",
        "confusion", "classes", "precision", "recall", "f1", "balanced_error"}  # fmt: skip
    assert figures["n"] == 360 and figures["split"] == "test" and figures["protocol"] == "1crop"
    assert figures["top1_interval"][0] < figures["top1_error"] < figures["top1_interval"][1]
    right = sum(row[i] for i, row in enumerate(figures["confusion"]))
    assert figures["top1_error"] == pytest.approx(1 - right / 360)
    code, out, _ = run_cli(capsys, "evaluate", str(model), "--data", "digits", "--split", "train")
    assert code == 0 and "1,437 images" in out
    code, _, err = run_cli(capsys, "evaluate", str(model), "--data", "digits", "--split", "validation")
    assert code == 2 and "unknown split 'validation'; known: test, train." in err


def test_evaluate_on_other_classes_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    monkeypatch.setitem(cifar.RECORDS, "cifar10", (1, 1))
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}.bin").write_bytes(bytes(3073))
    (folder / "test_batch.bin").write_bytes(bytes(3073))
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n")
    code, _, err = run_cli(capsys, "evaluate", str(model), "--data", "cifar10", "--data-dir", str(tmp_path))
    assert code == 1
    assert "only in the data airplane, automobile, only in the model 0, 1, 2, 3, 4, 5, 6, 7 and 2 more" in err


def test_predict_formats(capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
    code, out, _ = run_cli(capsys, "predict", str(model), str(image), "--json", "--top", "3")
    prediction = json.loads(out)["predictions"][0]
    assert code == 0 and prediction["image"] == str(image) and len(prediction["top"]) == 3
    scores = [entry["score"] for entry in prediction["top"]]
    assert scores == sorted(scores, reverse=True) and set(prediction["top"][0]) == {"class", "score"}
    _, out, _ = run_cli(capsys, "predict", str(model), str(image), "--format", "csv", "--top", "2")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["rank"] for row in rows] == ["1", "2"] and rows[0]["class"] == prediction["top"][0]["class"]
    _, out, _ = run_cli(capsys, "predict", str(model), str(image))
    assert image.name in out and "%" in out


def test_predict_folders_and_bad_images(capsys: pytest.CaptureFixture[str], model: Path, image: Path) -> None:
    folder = image.parent / "images"
    (folder / "inside").mkdir(parents=True)
    shutil.copy(image, folder / "b.png")
    shutil.copy(image, folder / "inside" / "a.png")
    (folder / "notes.txt").write_text("no image, and not asked for")
    (folder / "broken.png").write_bytes(image.read_bytes()[:60])
    (folder / "text.jpg").write_text("hello")
    code, out, err = run_cli(capsys, "predict", str(model), str(folder), str(folder.parent / "missing.png"), "--json")
    predictions = {Path(p["image"]).name: p for p in json.loads(out)["predictions"]}
    assert code == 1 and "3 of 5 images could not be read." in err
    assert set(predictions) == {"a.png", "b.png", "broken.png", "text.jpg", "missing.png"}
    assert "top" in predictions["a.png"] and "is damaged" in predictions["broken.png"]["error"]
    assert "is not an image that can be read" in predictions["text.jpg"]["error"]
    assert "is not there" in predictions["missing.png"]["error"]
    (folder / "empty").mkdir()
    code, _, err = run_cli(capsys, "predict", str(model), str(folder / "empty"))
    assert code == 1 and "holds no image" in err


def test_predict_reads_standard_input(
    capsys: pytest.CaptureFixture[str], model: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stdin:
        buffer = io.BytesIO(image.read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    code, out, _ = run_cli(capsys, "predict", str(model), "-", "--json")
    assert code == 0 and len(json.loads(out)["predictions"][0]["top"]) == 5


def test_inspect(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    _, out, _ = run_cli(capsys, "inspect", "resnet50", "--json")
    document = json.loads(out)
    assert document["multiply_adds"] == 3_857_973_248 and document["paper_multiply_adds"] == 3.8e9
    assert document["parameters"] == 25_557_032 and document["depth"] == 50
    _, out, _ = run_cli(capsys, "inspect", "resnet110")
    assert "layer1.0-17.conv1" in out and "1,727,962   (2015 Table 6: 1.7M)" in out
    _, out, _ = run_cli(capsys, "inspect", "resnet20", "--set", "shortcut=C", "--classes", "100", "--json")
    assert json.loads(out)["specification"]["shortcut"] == "C"
    code, out, _ = run_cli(capsys, "inspect", str(model), "--json")
    assert code == 0 and json.loads(out)["image_size"] == [8, 8] and json.loads(out)["specification"]["channels"] == 1


def test_show_recipe_is_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    import tomllib

    code, out, _ = run_cli(capsys, "train", "--show-recipe", "paper-cifar")
    assert code == 0 and "2015 §4.2" in out and tomllib.loads(out)["milestones"] == [32000, 48000]


def test_train_json_and_progress_in_a_pipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run_cli(capsys, "train", "digits", *SHORT, "--out", str(tmp_path / "run"), "--json")
    result = json.loads(out)
    assert code == 0 and result["run"] == str(tmp_path / "run") and result["steps"] == 20
    assert "device: cpu" in err and "budget: 20 of the 600 steps of quick (3.3%)" in err
    assert "step 20/20" in err and "images/s" in err


def test_a_7x7_stem_on_small_images_warns_loudly(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["train", "digits", "--net", "resnet18", "--steps", "2", "--set", "image_size=32", "--set", "batch=16"]
    code, _, err = run_cli(
        capsys,
        *arguments,
        "--set",
        "val_images=0",
        "--set",
        "lr=0.001",
        "--out",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    )
    assert code == 0
    assert err.count("warning: images of 32x32 pixels in a network with ImageNet's 7x7 stem") == 1  # printed once
    assert "resnet20" in err


def test_small_images_of_many_sizes_are_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    printer = console.WarningPrinter()
    for category, message in [
        (SmallImageWarning, "64"),
        (UserWarning, "a"),
        (SmallImageWarning, "60"),
        (UserWarning, "b"),
    ]:
        printer(category(message), category)
    assert [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()] == ["64", "a", "b"]


def test_every_command_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "evaluate", "predict", "inspect"):
        code, out, _ = run_cli(capsys, name, "--help")
        assert code == 0 and f"Example: resnetlab {name} " in " ".join(out.split())


def test_images_of_any_mode_are_read(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    grey = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"):
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) << 8) if mode == "I;16" else grey.convert(mode)
        image.save(tmp_path / f"{mode.replace(';', '')}.{'tif' if mode == 'CMYK' else 'png'}")
    code, out, _ = run_cli(capsys, "predict", str(model), str(tmp_path), "--json")
    assert code == 0 and len(json.loads(out)["predictions"]) == 8


def test_of_many_classes_the_worst_are_printed(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnetlab.cli import console

    evaluate = ("evaluate", str(model), "--data", "digits", "--device", "cpu")
    code, all_of_them, _ = run_cli(capsys, *evaluate)
    errors = {line.split()[0]: float(line.split()[2]) for line in all_of_them.splitlines() if re.match(r"\d +\d", line)}
    assert code == 0 and list(errors) == list("0123456789")
    monkeypatch.setattr(console, "MAX_ROWS", 3)
    _, some, _ = run_cli(capsys, *evaluate)
    shown = re.findall(r"^(\d) +\d", some, re.MULTILINE)
    assert len(shown) == 3 and [errors[name] for name in shown] == sorted(errors.values(), reverse=True)[:3]
    assert "the 3 worst of 10 classes:" in some and "7 more are left out; evaluation.json or --json has all" in some


def test_a_stop_is_heard_before_a_command_listens_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process of a container has no default action for SIGTERM: without a handler it would be ignored."""
    monkeypatch.setattr(main, "understand", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            main.main(["train"])
        assert (
            signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        )  # a second one finds no handler that would raise again
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 143 and capsys.readouterr().err == "resnetlab: stopped.\n"
