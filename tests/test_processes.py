"""Evaluation under several processes: every image counts once, and the figures are bit-identical."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from images import NAMES, folder
from resnetlab.cli.main import run_command
from resnetlab.data import sources
from resnetlab.data.dataset import Dataset
from resnetlab.distributed import World
from resnetlab.errors import UsageError
from resnetlab.evaluation.evaluate import evaluate
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing
from resnetlab.process_place import read_process_place
from resnetlab.progress import ProgressBar
from resnetlab.training.recipes import quick
from resnetlab.training.train import RunOptions, build_task

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    net: Any = build("resnet8", classes=10, seed=0)
    net.fc.weight.data.mul_(5)
    TrainedModel(net, CLASSES, Preprocessing(3, (32, 32), 32, torch.full((3,), 0.5), torch.full((3,), 0.25))).save(path)
    return path


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def take_part(rank: int, size: int, port: int, model: Path, data: str, data_dir: Path, out: Path) -> None:
    """Evaluates as one of torchrun's processes, all on one machine."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    asked: list[int] = []
    found = evaluate(
        model,
        data,
        data_dir=data_dir,
        on_bad_image="skip",
        device="cpu",
        precision="fp32",
        progress=lambda n, _: asked.append(n),
    )
    out.write_text(json.dumps(found.to_json() | {"batches": len(asked)}))


def figures(size: int, model: Path, data_dir: Path, place: Path, data: str = "cifar10") -> list[dict[str, Any]]:
    """The figures of each of `size` processes."""
    context, port = multiprocessing.get_context("fork"), free_port()
    outs = [place / f"{rank}-of-{size}.json" for rank in range(size)]
    workers = [
        context.Process(target=take_part, args=(rank, size, port, model, data, data_dir, out))
        for rank, out in enumerate(outs)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.slow
def test_one_two_and_three_processes_find_the_same(model: Path, cifar10_dir: Path, tmp_path: Path) -> None:
    """All 10,000 test images of CIFAR-10, none twice, though 10,000 is no multiple of 3."""
    ((alone,), *others) = (figures(size, model, cifar10_dir, tmp_path) for size in (1, 2, 3))
    assert alone["n"] == 10_000 and sum(map(sum, alone["confusion"])) == 10_000
    assert [sum(row) for row in alone["confusion"]] == [1000] * 10
    batches = alone.pop("batches")
    for group in others:
        assert sum(found.pop("batches") for found in group) == batches  # the work is shared, not repeated
        assert all(found == alone for found in group)


def test_processes_know_why_each_image_was_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of those that another process could not read; and they count none twice. One of them lists the images."""
    listed, load = tmp_path / "listed", sources.load_dataset

    def load_and_note(*arguments: Any) -> Dataset:
        with listed.open("a") as file:
            file.write(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}\n")
        return load(*arguments)

    monkeypatch.setattr(sources, "load_dataset", load_and_note)
    monkeypatch.setattr("resnetlab.evaluation.scores.BATCH", 4)  # so that every process has some
    root = folder(tmp_path / "d", {"train": 1, "val": 7})
    for i, name in enumerate(NAMES):
        (root / "val" / name / f"bad {i}.jpg").write_bytes(b"" if i else b"no image")
    net: Any = build("resnet8", classes=3, seed=0)
    model = tmp_path / "m.safetensors"
    prepared = Preprocessing(3, (16, 16), 16, torch.full((3,), 0.5), torch.ones(3))
    TrainedModel(net, tuple(sorted(NAMES)), prepared).save(model)
    ((alone,), *others) = (figures(size, model, tmp_path, tmp_path, str(root)) for size in (1, 2, 3))
    assert alone["n"] == 21 and len(alone["skipped"]) == 3
    assert "could not be read" not in alone["skipped"].values()
    batches = alone.pop("batches")
    for group in others:
        assert sum(found.pop("batches") for found in group) == batches == 6
        assert all(found == alone for found in group)
    assert listed.read_text().splitlines() == ["0 of 1", "0 of 2", "0 of 3"]


@pytest.mark.slow
def test_a_trained_cifar_net_goes_out_and_comes_back_with_the_same_errors(cifar10_dir: Path, tmp_path: Path) -> None:
    """100 steps of the paper's recipe, then through torchvision's names and back, on the command line with nothing given."""
    cifar, again = ["--data-dir", str(cifar10_dir)], tmp_path / "again.safetensors"
    assert run_command(["train", "cifar10", "--recipe", "paper-cifar", "--steps", "100", *cifar, "--out", str(tmp_path / "run"),
                "--set", "val_images=1000"]) == 0  # fmt: skip
    model = tmp_path / "run" / "model.safetensors"
    found = []
    assert run_command(["export", str(model), "--to", "torchvision", "--out", str(tmp_path / "w.pth")]) == 0
    assert run_command(["import", str(tmp_path / "w.pth"), "--out", str(again)]) == 0
    for path, out in ((model, tmp_path / "one"), (again, tmp_path / "two")):
        assert run_command(["evaluate", str(path), "--data", "cifar10", *cifar, "--out", str(out)]) == 0
        found.append(json.loads((out / "evaluation.json").read_text()))
        assert found[-1].pop("model") == str(path)
        printed = found[-1].pop("published")  # the weights alone do not say after how many steps they are
        assert printed["top1_error"] == 0.0875 and printed["source"].endswith("; this model 100") == (path == model)
    assert found[0] == found[1] and found[0]["n"] == 10_000 and found[0]["top1_error"] < 0.75
    assert found[0]["calibration"][0]["n"] == 1000
    assert load_trained_model(again).preprocessing.mean.shape == (32, 32, 3)


def test_processes_do_not_share_one_device() -> None:
    with pytest.raises(UsageError, match="take one device each; give its kind, not 'cpu:0': --device cpu"):
        build_task(quick(), RunOptions(device="cpu:0"), World(1, 2))


@pytest.mark.slow
def test_torchrun(model: Path, cifar10_dir: Path) -> None:
    """The same through the command line: one JSON document, from the first process."""
    command = ["evaluate", str(model), "--data", "cifar10", "--data-dir", str(cifar10_dir), "--device", "cpu", "--json"]
    found = []
    for launcher in (["-m"], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m"]):
        done = subprocess.run([sys.executable, *launcher, "resnetlab", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] and found[0]["n"] == 10_000


def test_a_shell_inside_a_job_has_one_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without WORLD_SIZE, what a batch system left of the others divides nothing, and silences nothing."""
    for name, value in {"RANK": "3", "WORLD_SIZE": "", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert read_process_place() == (0, 1, 0, 1)
    with ProgressBar("steps") as bar:
        bar.update(1, 1, "three of four")
        bar.update(1.0, 1, "a share")
    err = capsys.readouterr().err
    assert "steps 1/1  three of four" in err and "steps 100.0 %  a share" in err
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert read_process_place() == (3, 8, 1, 4)
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert run_command(["train", "--out", str(tmp_path / "run")]) == 2
    assert "the environment variable WORLD_SIZE is 'two', not a number" in capsys.readouterr().err
