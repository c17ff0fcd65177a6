"""More ways to stop: at the very end, twice, with a folder that vanishes; each with the real signal, and nothing is lost."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import residuum
from pictures import folder
from residuum.cli.main import run as cli
from residuum.errors import RunError, UsageError
from residuum.models.bundle import Bundle
from residuum.models.resnet import build
from residuum.preprocessing import Preprocessing
from residuum.training import classifying, loop, steps
from residuum.training.recipe import Recipe
from residuum.training.recipes import RECIPES, quick, recipe
from residuum.training.result import Progress
from residuum.training.stopping import Stopped
from runs import assert_same, figures

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def tiny(**values: Any) -> Recipe:
    small = {
        "net": "resnet8",
        "size": 8,
        "batch": 32,
        "bn_batch": 16,
        "record_every": 1,
        "judge_every": 5,
        "threads": 1,
    }
    return replace(quick().shrunk(20), checkpoint_minutes=0.0, ema=0.9, **small | values)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    residuum.train(tiny(), out=out, device="cpu")
    return out


def kill_at(step: int) -> Callable[[Progress], None]:
    def progress(p: Progress) -> None:
        if p.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def killed(function: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """Calls a function in a process of its own, which must end by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, kwargs=named)
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


def test_two_kills_in_a_row(tmp_path: Path, undisturbed: Path) -> None:
    out = tmp_path / "run"
    killed(residuum.train, tiny(), out=out, device="cpu", progress=kill_at(6))
    killed(loop.resume, out, progress=kill_at(13))
    loop.resume(out)
    assert_same(out, undisturbed)


def test_a_kill_between_model_and_report(tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(classifying.report, "render", lambda **_: os.kill(os.getpid(), signal.SIGKILL))
        killed(residuum.train, tiny(), out=out, device="cpu")
    assert (out / "model.safetensors").exists() and not (out / "report.html").exists()
    loop.resume(out)
    assert (out / "report.html").exists()
    assert_same(out, undisturbed)


def test_a_signal_in_the_last_judgement_says_how_to_go_on(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(classifying.report, "render", lambda **_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Stopped, match=r"stopped while judging, .* go on with: residuum train --resume") as stop:
            residuum.train(tiny(), out=out, device="cpu")
    assert stop.value.exit_code == 143
    loop.resume(out)
    assert_same(out, undisturbed)


def test_two_threads(tmp_path: Path) -> None:
    """The record says how many, and a resume takes as many."""

    def stop(p: Progress) -> None:
        if p.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    straight, out = tmp_path / "straight", tmp_path / "run"
    residuum.train(tiny(threads=2), out=straight, device="cpu")
    with pytest.raises(Stopped, match="stopped at step 8"):
        residuum.train(tiny(threads=2), out=out, device="cpu", progress=stop)
    loop.resume(out)
    assert_same(out, straight)


def test_a_vanished_run_folder_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def vanish(p: Progress) -> None:
        if p.step == 5:
            shutil.rmtree(out)

    with pytest.raises(RunError, match=r"cannot write .*checkpoints: No such file or directory"):
        residuum.train(tiny(), out=out, device="cpu", progress=vanish)


def test_verify_resume_proves_it_and_notices_a_difference(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from residuum.models.bundle import read_safetensors, write_safetensors
    from residuum.records import Run
    from residuum.training import verify

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "STEPS", 6)

    def in_a_fork(recipe: Recipe, out: Path, *rest: Any, stop_at: int, kill_at: int, expect: int) -> None:
        import json

        data_dir, device, workers = rest
        values = json.dumps([recipe.to_json(), str(out), str(data_dir), device, workers, stop_at, kill_at])
        process = multiprocessing.get_context("fork").Process(target=verify._train, args=(values,))
        process.start()
        process.join(100)
        assert process.exitcode == expect

    monkeypatch.setattr(verify, "_child", in_a_fork)
    assert cli(["train", "--net", "resnet8", "--set", "size=8", "--device", "cpu", "--verify-resume"]) == 0
    assert "exact: killed at step 3, at step 6 the same bits in " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    folders = []
    for name in ("a", "b"):
        folders.append(Run(tmp_path / name))
        (folders[-1].path / "checkpoints").mkdir(parents=True)
        tensors = {"x": __import__("torch").tensor([1.0, 2.0 if name == "a" else 3.0])}
        write_safetensors(folders[-1].checkpoints / "step-00000006.safetensors", tensors, {"step": 6})
    assert read_safetensors(folders[0].checkpoints / "step-00000006.safetensors", "checkpoint")[1]["step"] == 6
    with pytest.raises(RunError, match="not exact: 1 of 1 tensors differ after a resume, such as x"):
        verify._compare(*folders)


@pytest.mark.slow
def test_verify_resume_in_processes_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "--device", "cpu", "--verify-resume"]) == 0
    assert "exact: killed at step 12, at step 24" in capsys.readouterr().out


def test_the_report_is_there_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "run", []
    rarely = steps.Rarely.__init__
    monkeypatch.setattr(steps.Rarely, "__init__", lambda self, function, pause=0.0: rarely(self, function, 0.0))

    def look(p: Progress) -> None:
        if p.step == 12:
            seen.append((out / "report.html").read_text())

    residuum.train(tiny(), out=out, device="cpu", progress=look)
    assert "a run that goes on" in seen[0] and "<svg" in seen[0] and 'http-equiv="refresh"' in seen[0]
    assert "a run that goes on" not in (out / "report.html").read_text()


def test_tensorboard_events(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard"
    )
    residuum.train(tiny(), out=tmp_path / "run", device="cpu")
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [line["loss"] for line in figures(tmp_path / "run") if line["kind"] == "train"]
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx(losses)


def test_waiting_and_gradients_are_recorded(undisturbed: Path) -> None:
    import json

    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == 20
    assert all(0 < line["share_waiting"] < 1 and 0 < line["gradient_norm"] < 1e3 for line in train)


def test_a_plateau_needs_held_out_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="schedule=plateau watches the held-out error, but nothing is held out"):
        residuum.train(tiny(held_out=0, schedule="plateau"), out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_other_data_under_a_run_is_one_sentence(tmp_path: Path) -> None:
    import pictures

    def stop(p: Progress) -> None:
        if p.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    photos = tmp_path / "photos"
    pictures.folder(photos, {"": 6}, ("a", "b"))
    recipe = replace(tiny(), data=str(photos), held_out=0, batch=4, bn_batch=0)
    with pytest.raises(Stopped):
        residuum.train(recipe, out=tmp_path / "run", device="cpu", progress=stop)
    next((photos / "a").iterdir()).unlink()
    with pytest.raises(RunError, match="was made with another recipe or other data; start a new run, or put back"):
        loop.resume(tmp_path / "run")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("photographs") / "folder")


AT_ONCE = ("paper-imagenet", "modern-long", "finetune")  # between them what the others have too; seconds each


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in AT_ONCE else pytest.mark.slow)
        for name, make in RECIPES.items()
        if make().task == "classify"
    ],
)
def test_every_recipe_resumes_to_the_same_bits(name: str, tmp_path: Path, photographs: Path) -> None:
    """Each with all that it has, on small pictures, and killed half-way."""
    named = recipe(name)
    small = {"data": str(photographs), "net": "preresnet20" if "pre" in name else "resnet8", "size": 16, "batch": 8}
    small |= {"bn_batch": 4, "resize": 20 if named.resize else 0, "held_out": min(named.held_out, 6), "threads": 1}
    often = {"record_every": 1, "judge_every": 2, "checkpoint_minutes": 0.0, "precise_bn": min(named.precise_bn, 2)}
    values: dict[str, Any] = small | often | {"ema": 0.9 if named.ema else 0.0}
    if name == "finetune":
        model = tmp_path / "model.safetensors"
        seen = Preprocessing(3, (16, 16), 20, torch.full((3,), 0.5), torch.full((3,), 0.25))
        Bundle(build("resnet8", classes=2, seed=1), ("a", "b"), seen).save(model)
        values |= {"net": "", "start_from": str(model), "frozen_bn": True, "bn_batch": 0}
    short = replace(named.shrunk(6), **values)
    straight, out = tmp_path / "straight", tmp_path / "run"
    residuum.train(short, out=straight, device="cpu")
    killed(residuum.train, short, out=out, device="cpu", progress=kill_at(3))
    loop.resume(out)
    assert_same(out, straight)
