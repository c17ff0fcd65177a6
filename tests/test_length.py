"""The length of a run: epochs, extension of a finished run, a run stopped by its caller; recipes in files; time left."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import resnetlab
from resnetlab.cli.main import run_command
from resnetlab.errors import RunError, UsageError
from resnetlab.formatting import format_duration
from resnetlab.progress import fit_parts
from resnetlab.run_folder import RunFolder, list_checkpoints, read_metrics
from resnetlab.tensor_file import read_tensor_file
from resnetlab.training.recipe import Epochs, Overrides, Recipe
from resnetlab.training.recipes import choose_recipe, quick
from resnetlab.training.recorder import RunStopped, StepTimer
from resnetlab.training.result import Progress
from resnetlab.training.run_state import RunState
from runs import assert_same, figures
from tiny_runs import TINY

QUIET: dict[str, Any] = {**TINY, "device": "cpu", "progress": False}
N = 1437 - 144  # training images of the digits, without those held out


def toml(run: Path) -> dict[str, Any]:
    return tomllib.loads((run / "recipe.toml").read_text())


def test_epochs_become_steps_of_the_images_to_train_on(tmp_path: Path) -> None:
    result = resnetlab.train("digits", epochs=0.5, out=tmp_path / "run", **QUIET, milestones=[9, 12], data_dir=tmp_path)
    recipe = toml(tmp_path / "run")
    assert result.steps == recipe["steps"] == round(0.5 * N / 32) == 20
    assert recipe["milestones"] == [9, 12]  # given, so not rescaled
    assert recipe["eval_every"] == round(50 * 20 / 600)
    assert result.budget == "20 of the 600 steps of quick (3.3%)"
    with pytest.raises(UsageError, match="steps and epochs are both the length"):
        resnetlab.train("digits", epochs=1, steps=20, progress=False)
    with pytest.raises(UsageError, match="epochs must be above 0"):
        resnetlab.train("digits", epochs=0, out=tmp_path / "none", **QUIET)
    assert not (tmp_path / "none").exists()


def test_epochs_leave_what_was_given() -> None:
    recipe = Epochs(2, {"log_every": "7", "lr": "3"}).apply(quick(), 640)
    assert (recipe.steps, recipe.log_every, recipe.lr, recipe.milestones) == (20, 7, 0.1, (12, 17))
    theirs = Epochs(2, {"print_freq": "7", "warmup_iters": "3", "model_ema_decay": "0.5"}).apply(quick(), 640)
    assert (theirs.log_every, theirs.warmup_steps, theirs.ema_decay) == (7, 3, 0.5)
    assert Overrides(epochs=2, values={"lr": "3"}).length == Epochs(2, {"lr": "3"})


def test_lr_and_batch_are_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--net", "resnet8", "--device", "cpu", "--set", "image_size=8"]
    out = str(tmp_path / "run")
    assert (
        run_command(["train", *tiny, "--epochs", "0.1", "--lr", "0.05", "--batch", "16", "--out", out, "--json"]) == 0
    )
    recipe = toml(tmp_path / "run")
    assert (recipe["lr"], recipe["batch"], recipe["steps"]) == (0.05, 16, round(0.1 * N / 16))
    assert json.loads(capsys.readouterr().out)["steps"] == recipe["steps"]
    assert run_command(["train", "--lr", "0.1", "--set", "lr=0.2"]) == 2
    assert "lr is given twice, by --lr and by --set" in capsys.readouterr().err


def test_a_runs_recipe_file_runs_again_identically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    resnetlab.train("digits", steps=6, out=one, **QUIET)
    assert run_command(["train", "--recipe", str(one / "recipe.toml"), "--device", "cpu", "--out", str(two)]) == 0
    assert_same(one, two)
    assert (one / "recipe.toml").read_text() == (two / "recipe.toml").read_text()
    one.rename(tmp_path / "quick")
    monkeypatch.chdir(tmp_path)
    assert choose_recipe("./quick", task="classify", data=None) == choose_recipe(
        two / "recipe.toml", task="classify", data=None
    )
    assert choose_recipe("quick", task="classify", data=None) == quick()  # a folder's name does not change it


def test_a_recipe_file_may_name_the_recipe_that_has_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "paper-cifar"\nlr = 0.2\n[specification]\nshortcut = "C"\n')
    recipe = choose_recipe(file, task="classify", data=None)
    assert (recipe.name, recipe.lr, recipe.data, recipe.batch) == ("paper-cifar", 0.2, "cifar10", 128)
    assert recipe.specification == {"shortcut": "C"}
    file.write_text('name = "photos"\nbatch = 24\nimage_size = 112\n')  # with what follows from them, as --set
    recipe = choose_recipe(file, task="classify", data=None)
    assert isinstance(recipe, Recipe) and (recipe.bn_batch, recipe.eval_resize) == (12, 128)
    for text, sentence in {
        "learning_rate = 1": "unknown key 'learning_rate'; did you mean 'lr'?",
        "lr = 'x'": "lr must be a number, not 'x'",
        "batch = 'x'": "batch must be a whole number, not 'x'",
        "lr = ": "cannot be read as TOML",
        "task = 'detect'": "is a recipe of another task: detect",
        "name = 'boxes'": "is a recipe of another task: detect",
        "specification = 3": "specification must be a table",
    }.items():
        file.write_text(text)
        assert run_command(["train", "--recipe", str(file)]) == 2
        err = capsys.readouterr().err
        assert sentence in err and str(file) in err and err.count("\n") == 1
    assert run_command(["train", "--recipe", str(tmp_path / "no.toml")]) == 2
    assert "no.toml is not there" in capsys.readouterr().err


def test_a_finished_run_keeps_no_optimizer_state_and_can_be_extended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    resnetlab.train("digits", steps=10, out=out, **QUIET)
    (checkpoint,) = list_checkpoints(RunFolder(out))
    assert {name.partition(".")[0] for name in read_tensor_file(checkpoint, "checkpoint")[0]} == {"net"}
    before = figures(out)
    assert run_command(["train", "--resume", str(out), "--epochs", "0.5", "--json"]) == 0
    captured = capsys.readouterr()
    assert "is extended from 10 to 20 steps: its schedule is that of the longer run" in captured.err
    result = json.loads(captured.out)
    assert result["steps"] == toml(out)["steps"] == 20
    assert result["budget"].endswith("extended after 10 steps without the optimizer's momentum")
    assert result["budget"] in (out / "report.html").read_text().replace("&#39;", "'")
    assert figures(out)[: len(before)] == before
    assert read_metrics(RunFolder(out))[-1]["step"] == 20
    message: list[str] = []
    again = resnetlab.train(resume=out, report=message.append, progress=False)
    assert again.steps == 20 and "is finished; nothing to do" in message[-1]
    with pytest.raises(RunError, match=r"is extended with its own recipe, but you ask for lr = 0\.5"):
        resnetlab.train(resume=out, steps=30, lr=0.5, progress=False)
    with pytest.raises(RunError, match="another recipe: you ask for steps = 8"):
        resnetlab.train(resume=out, steps=8, progress=False)


def test_an_interrupted_extension_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, straight = tmp_path / "run", tmp_path / "straight"
    for folder in (out, straight):
        resnetlab.train("digits", steps=6, out=folder, **QUIET)
    resnetlab.train(resume=straight, steps=12, progress=False)
    from resnetlab.training import train as training

    def crash(*values: Any) -> None:
        function(*values)
        raise MemoryError

    for name in ("change_identity", "write_atomically"):  # a crash after each
        function = getattr(training, name)
        with monkeypatch.context() as patch:
            patch.setattr(training, name, crash)
            with pytest.raises(MemoryError):
                resnetlab.train(resume=out, steps=12, progress=False)
    resnetlab.train(resume=out, steps=12, progress=False)
    assert_same(out, straight)
    assert json.loads((out / "environment.json").read_text())["extended_after"] == [6]


def test_the_caller_stops_a_run_that_resumes_bit_identically(tmp_path: Path) -> None:
    out, straight, seen = tmp_path / "run", tmp_path / "straight", []
    settings: dict[str, Any] = {**QUIET, "steps": 20, "eval_every": 5}

    def stop(figures: Mapping[str, float]) -> bool:
        seen.append(dict(figures))
        return figures["step"] == 10

    with pytest.raises(RunStopped, match=r"on_evaluate stopped the run at step 10, .* train\(resume=") as stopped:
        resnetlab.train("digits", out=out, on_evaluate=stop, **settings)
    assert [figures["step"] for figures in seen] == [5, 10] and set(seen[0]) == {"step", "steps", "top1_error", "loss"}
    assert stopped.value.step == 10 and stopped.value.run == out
    resnetlab.train(resume=out, on_evaluate=stop, progress=False)
    assert [figures["step"] for figures in seen] == [5, 10, 15, 20]
    resnetlab.train("digits", out=straight, **settings)
    assert_same(out, straight)
    with pytest.raises(UsageError, match="none are held out; add val_images=100"):
        resnetlab.train("digits", out=tmp_path / "none", on_evaluate=stop, **settings, val_images=0)


def test_train_shows_progress_unless_told_not_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {key: value for key, value in QUIET.items() if key != "progress"}
    resnetlab.train("digits", steps=2, out=tmp_path / "a", **settings)
    err = capsys.readouterr().err
    assert "device: cpu" in err and "step 2/2  0 s left  loss" in err
    resnetlab.train("digits", steps=2, out=tmp_path / "b", **QUIET)
    assert capsys.readouterr() == ("", "")


def test_a_folder_or_array_given_first_is_data(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown data set 'nosuch'"):
        resnetlab.train("nosuch", progress=False)
    with pytest.raises(UsageError, match="resume continues a run with its own recipe"):
        resnetlab.train("quick", resume=tmp_path, progress=False)


def test_the_time_left_is_the_first_thing_beside_the_bar_and_fits() -> None:
    parts = Progress(10, 600, 0.1, 2.3, 0.9, {"top1_error": 0.5}, 1234.0, 200.0).describe()
    for width in (10, 47, 200):
        line = fit_parts(parts, width)
        assert line.startswith("3 min 20 s left") and (len(line) <= width or line == parts[0])
    assert fit_parts(parts, 200) == (
        "3 min 20 s left  loss 2.3000  held-out error 50.00 %  training error 90.00 %  1,234 images/s  lr 0.1"
    )
    assert "0.2 images/s" in Progress(1, 6, 0.1, 2.3, 0.9, {}, 0.2, 200.0).describe()


def test_the_time_left_is_not_that_of_the_first_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    timer = StepTimer(RunState())
    for i in range(10):  # the first step compiles, the second allocates
        timer.start()
        clock[0] += (10.0, 2.0, 0.5)[i] if i < 3 else 0.05
        timer.stop()
    assert timer.seconds_per_step() == pytest.approx(0.05)


def test_the_time_left_counts_the_test_and_not_a_step_that_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepTimer, "seconds_per_step", lambda _: 8.0)  # of 8 images
    seen: list[Progress] = []
    values = {"progress": seen.append, "batch": 8, "log_every": 1, "val_images": 0}
    resnetlab.train("digits", steps=2, out=tmp_path / "a", **QUIET | values)
    assert [round(p.seconds_left) for p in seen] == [8 + 360 // 3, 360 // 3]  # 360 test images, nothing held out
    seen.clear()
    monkeypatch.setattr(torch, "compile", lambda net, **_: net)  # quick
    resnetlab.train("digits", steps=3, out=tmp_path / "b", compile="on", **QUIET | values)
    first, second, _ = (p.describe()[0] for p in seen)
    assert first == "compiled, time left not known yet" and second == f"{format_duration(8 + 360 // 3)} left"
