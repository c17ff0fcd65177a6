"""More ways to stop a run: at the very end, twice, with a folder that vanishes; each with the real signal."""

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

import resnetlab
from images import folder
from resnetlab.cli.main import run_command as cli
from resnetlab.errors import RunError, UsageError
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.resnet import build
from resnetlab.preprocessing import Preprocessing
from resnetlab.stopping import StopSignal, check_stop
from resnetlab.training import recorder, report
from resnetlab.training import train as training
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import RECIPES, find_classification_recipe, quick
from resnetlab.training.result import Progress
from resnetlab.training.train import RunOptions, resume
from runs import assert_same, figures

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def tiny(**values: Any) -> Recipe:
    small = {
        "net": "resnet8",
        "image_size": 8,
        "batch": 32,
        "bn_batch": 16,
        "log_every": 1,
        "eval_every": 5,
        "threads": 1,
    }
    return replace(quick().rescale(20), checkpoint_minutes=0.0, ema_decay=0.9, **small | values)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    resnetlab.train(tiny(), out=out, device="cpu")
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
    killed(resnetlab.train, tiny(), out=out, device="cpu", progress=kill_at(6))
    killed(resume, out, RunOptions(on_progress=kill_at(13)))
    resume(out)
    assert_same(out, undisturbed)


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])  # lamb has the state of adamw, lars that of sgd
def test_adamw_and_lamb_resume_bit_identically(optimizer: str, tmp_path: Path) -> None:
    recipe = tiny(optimizer=optimizer, lr=0.003)
    resnetlab.train(recipe, out=tmp_path / "straight", device="cpu")
    killed(resnetlab.train, recipe, out=tmp_path / "run", device="cpu", progress=kill_at(9))
    resume(tmp_path / "run")
    assert_same(tmp_path / "run", tmp_path / "straight")
    text = (tmp_path / "run" / "recipe.toml").read_text()
    assert f'optimizer = "{optimizer}"' in text and "beta2 = 0.999" in text and "eps = 1e-08" in text


def test_a_kill_between_model_and_report(tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(report, "render_report", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        killed(resnetlab.train, tiny(), out=out, device="cpu")
    assert (out / "model.safetensors").exists() and not (out / "report.html").exists()
    resume(out)
    assert (out / "report.html").exists()
    assert_same(out, undisturbed)


def test_a_signal_in_the_last_evaluation_says_how_to_go_on(
    tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(report, "render_report", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(
            StopSignal, match=r"stopped while evaluating, .* resume with: resnetlab train --resume"
        ) as stop:
            resnetlab.train(tiny(), out=out, device="cpu")
    assert stop.value.exit_code == 143
    resume(out)
    assert_same(out, undisturbed)


def test_a_signal_while_the_first_step_compiles_waits_for_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiling takes minutes, and nothing is lost: the run is as it was saved."""

    def compile_for_minutes(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        check_stop()

    monkeypatch.setattr(training, "train_step", compile_for_minutes)
    with pytest.raises(StopSignal, match=r"stopped while compiling, at step 0; resume with: resnetlab train --resume"):
        resnetlab.train(tiny(compile="on"), out=tmp_path / "run", device="cpu")
    monkeypatch.setattr(
        training, "train_step", lambda *_: compile_for_minutes() or pytest.fail("the signal is deferred")
    )
    with pytest.raises(pytest.fail.Exception):
        resnetlab.train(tiny(compile="off"), out=tmp_path / "other", device="cpu")


def test_two_threads(tmp_path: Path) -> None:
    """The run records its number of threads, and a resume uses as many."""

    def stop(p: Progress) -> None:
        if p.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    straight, out = tmp_path / "straight", tmp_path / "run"
    resnetlab.train(tiny(threads=2), out=straight, device="cpu")
    with pytest.raises(StopSignal, match="stopped at step 8"):
        resnetlab.train(tiny(threads=2), out=out, device="cpu", progress=stop)
    resume(out)
    assert_same(out, straight)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # of TensorBoard's thread, which writes there
def test_a_vanished_run_folder_is_one_sentence(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def vanish(p: Progress) -> None:
        if p.step == 5:
            shutil.rmtree(out)

    with pytest.raises(RunError, match=r"cannot write .*checkpoints: No such file or directory"):
        resnetlab.train(tiny(), out=out, device="cpu", progress=vanish)


def test_verify_resume_proves_it_and_notices_a_difference(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from resnetlab.run_folder import RunFolder
    from resnetlab.tensor_file import read_tensor_file, write_tensor_file
    from resnetlab.training import verify

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "STEPS", 6)

    def in_a_fork(setup: dict[str, Any], out: Path, *, stop_at: int, kill_at: int, expect: int) -> None:
        import json

        values = json.dumps({**setup, "out": str(out), "stop_at": stop_at, "kill_at": kill_at})
        process = multiprocessing.get_context("fork").Process(target=verify._train, args=(values,))
        process.start()
        process.join(100)
        assert process.exitcode == expect

    monkeypatch.setattr(verify, "_run_child", in_a_fork)
    values = ["--set", "image_size=8", "--set", "early_stop=1", "--set", "lr=1e-9"]  # which would end it after 4 steps
    assert cli(["train", "--net", "resnet8", *values, "--device", "cpu", "--verify-resume"]) == 0
    assert "exact: killed at step 3 and resumed, bit-identical at step 6 in " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    folders = []
    for name in ("a", "b"):
        folders.append(RunFolder(tmp_path / name))
        (folders[-1].path / "checkpoints").mkdir(parents=True)
        tensors = {"x": __import__("torch").tensor([1.0, 2.0 if name == "a" else 3.0])}
        write_tensor_file(folders[-1].checkpoints / "step-00000006.safetensors", tensors, {"step": 6})
    assert read_tensor_file(folders[0].checkpoints / "step-00000006.safetensors", "checkpoint")[1]["step"] == 6
    with pytest.raises(RunError, match="not exact: 1 of 1 tensors differ after a resume, such as x"):
        verify._compare_runs(*folders)


@pytest.mark.slow
def test_verify_resume_in_processes_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["train", "--device", "cpu", "--verify-resume"]) == 0
    assert "exact: killed at step 12 and resumed, bit-identical at step 24" in capsys.readouterr().out


def test_the_report_is_there_while_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "run", []
    monkeypatch.setattr(recorder.Throttle, "PAUSE", 0.0)

    def look(p: Progress) -> None:
        if p.step == 12:
            seen.append((out / "report.html").read_text())

    resnetlab.train(tiny(), out=out, device="cpu", progress=look)
    assert "an unfinished run" in seen[0] and "<svg" in seen[0] and 'http-equiv="refresh"' in seen[0]
    assert "an unfinished run" not in (out / "report.html").read_text()


def test_tensorboard_events(tmp_path: Path) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard"
    )
    resnetlab.train(tiny(), out=tmp_path / "run", device="cpu")
    found = events.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [line["loss"] for line in figures(tmp_path / "run") if line["kind"] == "train"]
    assert [e.value for e in found.Scalars("train/loss")] == pytest.approx(losses)


def test_waiting_and_gradients_are_recorded(undisturbed: Path) -> None:
    import json

    lines = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == 20
    assert all(0 < line["share_waiting"] < 1 and 0 < line["gradient_norm"] < 1e3 for line in train)


def test_a_plateau_needs_held_out_images(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="schedule=plateau watches the held-out error, but nothing is held out"):
        resnetlab.train(tiny(val_images=0, schedule="plateau"), out=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_other_data_under_a_run_is_one_sentence(tmp_path: Path) -> None:
    import images

    def stop(p: Progress) -> None:
        if p.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    photos = tmp_path / "photos"
    images.folder(photos, {"": 6}, ("a", "b"))
    recipe = replace(tiny(), data=str(photos), val_images=0, batch=4, bn_batch=0)
    with pytest.raises(StopSignal):
        resnetlab.train(recipe, out=tmp_path / "run", device="cpu", progress=stop)
    next((photos / "a").iterdir()).unlink()
    with pytest.raises(RunError, match="was made with another recipe or other data; start a new run, or put back"):
        resume(tmp_path / "run")


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
def test_every_recipe_resumes_bit_identically(name: str, tmp_path: Path, photographs: Path) -> None:
    """Each with all its features, on small images, killed half-way."""
    named = find_classification_recipe(name)
    small = {
        "data": str(photographs),
        "net": "preresnet20" if "pre" in name else "resnet8",
        "image_size": 16,
        "batch": 8,
    }
    small |= {
        "bn_batch": 4,
        "eval_resize": 20 if named.eval_resize else 0,
        "val_images": min(named.val_images, 6),
        "threads": 1,
    }
    often = {"log_every": 1, "eval_every": 2, "checkpoint_minutes": 0.0, "precise_bn": min(named.precise_bn, 2)}
    values: dict[str, Any] = small | often | {"ema_decay": 0.9 if named.ema_decay else 0.0}
    if name == "finetune":
        model = tmp_path / "model.safetensors"
        seen = Preprocessing(3, (16, 16), 20, torch.full((3,), 0.5), torch.full((3,), 0.25))
        TrainedModel(build("resnet8", classes=2, seed=1), ("a", "b"), seen).save(model)
        values |= {"net": "", "start_from": str(model), "frozen_bn": True, "bn_batch": 0}
    short = replace(named.rescale(6), **values)
    straight, out = tmp_path / "straight", tmp_path / "run"
    resnetlab.train(short, out=straight, device="cpu")
    killed(resnetlab.train, short, out=out, device="cpu", progress=kill_at(3))
    resume(out)
    assert_same(out, straight)
