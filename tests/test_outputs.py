"""Commands write no file that they read, nor what is no file, nor half of a result, nor over what a person wrote."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import resnetlab
from resnetlab.cli import predict, prediction_output
from resnetlab.cli.main import run_command
from resnetlab.data.disk_split import FileSource
from resnetlab.errors import DataError, RunError
from resnetlab.inference import export, formats, hub
from resnetlab.inference.predict import ClassScore, Prediction
from resnetlab.run_folder import MetricsLog, RunFolder, write_atomically, write_together
from service import write_classifier


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_classifier(tmp_path / "model.safetensors")


def digests(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "model.safetensors", "--to", "torchvision", "--out", "model.safetensors"],
        ["export", "model.safetensors", "--to", "torchvision", "--out", "link.safetensors"],
        ["import", "model.safetensors", "--out", "./model.safetensors"],
        ["push", "model.safetensors", "."],
        ["evaluate", "model.safetensors", "--data", "table.csv", "--predictions", "table.csv"],
        ["data", "check", "table.csv", "--quarantine", "table.csv"],
        ["data", "pack", "photos", "photos/shards"],
        ["data", "check", "photos", "--quarantine", "photos/a/1.png"],
        ["runs", "compare", "photos", "photos/a", "--out", "photos/a/result.json"],
    ],
    ids=" ".join,
)
def test_nothing_is_written_over_what_is_read(
    arguments: list[str], model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(model.parent)
    os.link("model.safetensors", "link.safetensors")
    Path("table.csv").write_text("path,label\n")
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (4, 4)).save(Path("photos", name, f"{i}.png"))
    Path("photos/a/result.json").write_text("{}")
    before = digests(model.parent)
    assert run_command(arguments) == 2
    err = capsys.readouterr().err
    assert re.search(r"itself, which is read|is inside photos|is an image in photos, which is read", err)
    assert digests(model.parent) == before


def test_a_heat_map_does_not_replace_an_image_that_is_explained(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [model.parent / "a.png", model.parent / "a.heat.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(name)
    before = names[1].read_bytes()
    assert run_command(["explain", str(model), *map(str, names), "--out", str(model.parent)]) == 2
    assert "itself, which is read" in capsys.readouterr().err and names[1].read_bytes() == before


def test_pipes_and_folders_are_no_files_to_write(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe, folder = model.parent / "pipe.pth", model.parent / "folder.pth"
    os.mkfifo(pipe)
    folder.mkdir()
    for out, words in ((pipe, "is a pipe or a device"), (folder, "is a folder")):
        assert run_command(["export", str(model), "--to", "torchvision", "--out", str(out)]) == 2
        assert words in capsys.readouterr().err
        with pytest.raises(RunError, match=words):
            write_atomically(out, b"")
    assert pipe.is_fifo()


def test_a_link_to_a_pipe_is_named_and_the_other_images_are_predicted(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = model.parent / "images"
    images.mkdir()
    os.mkfifo(model.parent / "pipe")
    (images / "b.png").symlink_to("../pipe")
    Image.new("RGB", (8, 8)).save(images / "a.png")
    with pytest.raises(DataError, match="is a pipe or a device"):
        FileSource(images, ["b.png"], torch.zeros(1).long().numpy()).read(0)
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(run_command(["predict", str(model), str(images), "--format", "csv"])), daemon=True
    )
    thread.start()
    thread.join(60)
    out = capsys.readouterr().out
    assert codes == [1] and "a.png,1," in out and "b.png is a pipe or a device, not an image" in out


class Export:
    """An export whose files are written here, in place of OpenVINO's pair."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def write(graphs: Any, precision: str, file: Path) -> None:
            file.write_text("new")
            file.with_suffix(".bin").write_text("new weights")

        scores = resnetlab.load(model).predict_scores
        entry = formats.ExportFormat(suffixes=(".xml",), write=write, read=lambda _: lambda x: scores(_prepare(x)))
        monkeypatch.setitem(formats.FORMATS, "pair", entry)
        self.model, self.out = resnetlab.load(model), model.parent / "m.xml"

    def __call__(self) -> None:
        export.export_model(self.model, "pair", "fp32", self.out, [torch.zeros(32, 32, 3, dtype=torch.uint8)], None)


def _prepare(x: torch.Tensor) -> torch.Tensor:
    from resnetlab.preprocessing import Preprocessing, tensor_to_pil

    crop = Preprocessing(3, (32, 32), 36, torch.zeros(3), torch.ones(3))
    return torch.stack([crop(tensor_to_pil(each)) for each in x])


def test_an_export_that_fails_leaves_no_half_of_a_pair(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Export(model, monkeypatch)
    weights = job.out.with_suffix(".bin")
    weights.mkdir()
    with pytest.raises(RunError, match=r"cannot write .*m\.bin"):
        job()
    assert not job.out.exists() and weights.is_dir()
    weights.rmdir()
    job()
    moved: list[str] = []

    def replace(source: Path, target: Path, right: Any = os.replace) -> None:
        moved.append(target.name)
        assert target.suffix == ".xml" or not job.out.exists()  # a kill here leaves no .xml beside other weights
        if target.suffix == ".xml":
            raise OSError(28, "No space left on device")
        right(source, target)

    monkeypatch.setattr("resnetlab.run_folder.os.replace", replace)
    with pytest.raises(RunError, match="no space left to write"):
        job()
    assert moved[-1] == "m.xml" and sorted(p.name for p in model.parent.iterdir()) == ["model.safetensors"]


def test_a_page_is_not_left_beside_other_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"figures.json": "1", "page.html": "1"}
    write_together(tmp_path, files)
    monkeypatch.setattr("resnetlab.run_folder.os.replace", _fail)
    with pytest.raises(RunError):
        write_together(tmp_path, files)
    assert [p.name for p in tmp_path.iterdir()] == ["figures.json"]


def _fail(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_readme_of_another_hand_is_kept(model: Path) -> None:
    trained = resnetlab.load(model)
    folder = model.parent / "project"
    hub.save_pretrained(trained, folder)
    hub.save_pretrained(trained, folder, "me/other")  # a card of ours is replaced
    readme = folder / "README.md"
    assert "hf:me/other" in readme.read_text()
    for text in ("# Our project\n", readme.read_text().replace("# resnet8", "# Not for medical use\n")):
        readme.write_text(text)
        with pytest.warns(UserWarning, match="was not written by resnetlab and is kept"):
            hub.save_pretrained(trained, folder)
        assert readme.read_text() == text
    (folder / "recipe.toml").write_text("")
    with pytest.raises(RunError, match="is a run folder"):
        hub.save_pretrained(trained, folder)


@pytest.mark.parametrize(
    ("arguments", "doing"),
    [
        (["export", "model.safetensors", "--to", "torchvision"], "export: "),
        (["strip", "model.safetensors"], "strip: "),
        (["import", "w.pth", "--classes", "a,b", "--mean", "0.5", "--std", "0.25"], "import: "),
        (["evaluate", "model.safetensors", "--data", "table.csv", "--classes", "all", "--out", "out"], "evaluate: "),
        (["predict", "model.safetensors", "photos", "--out", "rows.csv", "--backend", "torch"], "predict: "),
        (["embed", "model.safetensors", "photos", "--out", "features.npz"], "embed: "),
        (["data", "check", "photos", "--quarantine", "list.txt", "--no-timing", "--workers", "0"], "data check: "),
        (["data", "pack", "photos", "shards"], "data pack: "),
        (["push", "model.safetensors", "folder"], "push: "),
        (
            ["train", "digits", "--steps", "1", "--out", "run", "--device", "cpu"],
            "resume with: resnetlab train --resume run",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_full_disk_is_said_with_what_was_being_done(
    arguments: list[str],
    doing: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(model.parent)
    for name in ("a", "b"):
        Path("photos", name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (4, 4), (i, 0, 0)).save(Path("photos", name, f"{i}.png"))
    torch.save(dict(resnetlab.build("resnet8", classes=2).state_dict()), "w.pth")
    rows = [f"photos/{name}/{i}.png,{label}\n" for name, label in (("a", "alpha"), ("b", "e")) for i in range(4)]
    Path("table.csv").write_text("path,label\n" + "".join(rows))

    def full(file: int, right: Any = os.fsync) -> None:
        target = os.readlink(f"/proc/self/fd/{file}")
        if not os.path.isdir(target) and (arguments[0] != "train" or "checkpoints" in target):
            raise OSError(28, "No space left on device")
        right(file)

    monkeypatch.setattr("resnetlab.run_folder.os.fsync", full)
    assert run_command(arguments) == 1
    err = capsys.readouterr().err
    assert "no space left to write" in err and doing in err and "Traceback" not in err
    assert doing.startswith("resume") or ("run the same command again" in err and "--resume" not in err)


def test_a_run_folder_removed_while_training_is_a_sentence(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    log = MetricsLog(run, 0)
    log.write("train", 1, loss=1.0)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match="was removed while the run was training"):
        log.write("train", 2, loss=1.0)
    log.close()


def test_names_cannot_change_the_terminal_in_any_row(capsys: pytest.CaptureFixture[str]) -> None:
    write, end = prediction_output._table_writer()
    for i in range(103):  # the first hundred rows decide the widths of the columns, the others come one by one
        write(Prediction(f"\x1b[31m{i}.png", (("a\x07", 0.5),)))
    end()
    out = capsys.readouterr().out
    assert "102.png" in out and "\x1b" not in out and "\x07" not in out


def test_what_is_copied_or_drawn_appears_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill while it was written left half an image, and the next start wrote another one beside it."""
    for text in (b"one", b"one", b"two", b"one"):
        predict._write_copy(text, tmp_path / "a", "x", ".png")
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == {"x.png": b"one", "x-2.png": b"two"}
    source = tmp_path / "photo.jpg"
    source.write_bytes(b"content")
    monkeypatch.setattr(
        "resnetlab.run_folder.os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )  # a kill
    for write in (
        lambda: predict._sort_image(Prediction(str(source), (ClassScore("a", 0.9),)), tmp_path / "sorted", 0.5),
        lambda: predict.save_overlay(Image.new("RGB", (4, 4)), tmp_path / "drawn", "x", "boxes"),
    ):
        with pytest.raises(KeyboardInterrupt):
            write()
    for folder in ("sorted/a", "drawn"):
        assert all(file.name.startswith(".") for file in (tmp_path / folder).iterdir())
