"""Resume: runs really killed at several moments continue bit-identically, also after full disks and signals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import zygote
from resnetlab.cli.main import run_command
from resnetlab.errors import RunError
from resnetlab.run_folder import RunFolder, read_metrics
from resnetlab.training import train as training
from resnetlab.training.checkpoint import TrainState, change_identity
from resnetlab.training.recipe import Recipe
from runs import assert_same, figures

SETTINGS = (
    "--steps", "30", "--net", "resnet8", "--set", "image_size=8", "--set", "batch=32", "--set", "log_every=3",
    "--set", "eval_every=10", "--set", "checkpoint_minutes=0", "--set", "shortcut=dropout", "--device", "cpu",
)  # fmt: skip


def command(*arguments: str, driver: str = "") -> list[str]:
    """The command line in a process of its own; `driver` is code that runs in it first."""
    code = f"{driver}\nfrom resnetlab.cli.main import main\nmain({list(arguments)!r})"
    return [zygote.python(), "-c", code]


def train(out: Path, driver: str = "", settings: tuple[str, ...] = SETTINGS) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    arguments = command("train", "digits", *settings, "--out", str(out), driver=driver)
    return subprocess.Popen(arguments, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


Resumed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def resumed(capsys: pytest.CaptureFixture[str]) -> Resumed:
    """Resumes in this process, where nothing is killed: starting another takes longer than the run."""

    def call(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = run_command(["train", "--resume", str(out), *more])
        return subprocess.CompletedProcess(more, code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        # a finished run keeps its last checkpoint alone; here others are taken for those of a run before its end
        patch.setattr(training, "drop_optimizer_state", lambda run: None)
        assert run_command(["train", "digits", *SETTINGS, "--out", str(out)]) == 0
    return out


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def lines_written(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.parametrize("lines", [pytest.param(1, marks=pytest.mark.slow), 7])
def test_killed_at_any_moment_is_bit_identical(lines: int, tmp_path: Path, undisturbed: Path, resumed: Resumed) -> None:
    out = tmp_path / "run"
    with train(out) as process:
        wait_until(lambda: lines_written(out) >= lines, process)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (out / "model.safetensors").exists()
    done = resumed(out)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert_same(out, undisturbed)


KILL_INSIDE_CHECKPOINT = """
import os, signal
real_fsync, count = os.fsync, 0
def fsync(descriptor):  # the half-written file is on the disk, its name is not yet
    global count
    target = os.readlink(f"/proc/self/fd/{descriptor}")
    if "step-00000012" in target:
        os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    real_fsync(descriptor)
os.fsync = fsync
"""


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="finds the file being written through /proc")
def test_killed_inside_a_checkpoints_writing(tmp_path: Path, undisturbed: Path, resumed: Resumed) -> None:
    out = tmp_path / "run"
    with train(out, KILL_INSIDE_CHECKPOINT) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert left[-2:] == ["step-00000010.safetensors", "step-00000011.safetensors"]
    assert any(name.endswith(".tmp") for name in left), "the process was not killed inside the writing"
    done = resumed(out)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 11" in done.stderr
    assert_same(out, undisturbed)
    assert not [p for p in (out / "checkpoints").iterdir() if p.name.endswith(".tmp")]


def test_signals_save_first(tmp_path: Path) -> None:
    """Nothing else would save for an hour, so the step resumed from was saved because of the signal."""
    out = tmp_path / "run"
    settings = tuple("checkpoint_minutes=60" if s == "checkpoint_minutes=0" else s for s in SETTINGS)
    settings = tuple("3000" if s == "30" else s for s in settings)
    with train(out, settings=settings) as process:
        wait_until(lambda: lines_written(out) >= 1, process)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    first = stopped_at(out, stderr)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    again = command("train", "--resume", str(out))
    with subprocess.Popen(again, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        wait_until(
            lambda: any(line["step"] > first + 30 for line in read_metrics(RunFolder(out))), process
        )  # a line may be half written
        process.terminate()
        _, stderr = process.communicate()
    assert process.returncode == 143
    assert f"resuming from step {first:,}" in stderr
    assert stopped_at(out, stderr) > first
    steps = [line["step"] for line in figures(out) if line["kind"] == "train"]
    assert steps == sorted(set(steps)), "a step was recorded twice"


def stopped_at(run: Path, stderr: str) -> int:
    """The step that the message names; asserts that its checkpoint exists."""
    assert "which is saved; resume with: resnetlab train --resume" in stderr
    assert "Traceback" not in stderr
    step = int(stderr.rsplit("stopped at step ", 1)[1].split(", which")[0].replace(",", ""))
    assert (run / "checkpoints" / f"step-{step:08d}.safetensors").is_file()
    return step


def test_a_finished_run_is_left_alone(tmp_path: Path, undisturbed: Path, resumed: Resumed) -> None:
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file() and p.name != ".lock"}
    done = resumed(undisturbed, "--json")
    assert done.returncode == 0 and "is finished; nothing to do" in done.stderr
    assert json.loads(done.stdout) == json.loads((undisturbed / "result.json").read_text())
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*") if p.is_file() and p.name != ".lock"}


def unfinished(tmp_path: Path, undisturbed: Path) -> Path:
    """A copy of the run before its end."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for name in ("model.safetensors", "result.json", "report.html"):
        (run / name).unlink()
    return run


def test_a_checkpoint_cut_in_half_falls_back_to_the_one_before(
    tmp_path: Path, undisturbed: Path, resumed: Resumed
) -> None:
    run = unfinished(tmp_path, undisturbed)
    last = run / "checkpoints" / "step-00000030.safetensors"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    done = resumed(run)
    assert done.returncode == 0, done.stderr
    assert "step-00000030.safetensors is not a complete safetensors file" in done.stderr
    assert "Resuming from the checkpoint before it." in done.stderr and "resuming from step 29" in done.stderr
    assert_same(run, undisturbed)


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path: Path, undisturbed: Path, resumed: Resumed) -> None:
    run = unfinished(tmp_path, undisturbed)
    last = run / "checkpoints" / "step-00000030.safetensors"
    content = bytearray(last.read_bytes())
    content[-100] ^= 1
    last.write_bytes(content)
    done = resumed(run)
    assert done.returncode == 0, done.stderr
    assert "is damaged: its contents do not match its digest" in done.stderr
    assert "resuming from step 29" in done.stderr
    assert_same(run, undisturbed)


def test_a_finished_run_without_all_its_parts_is_finished_again(tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "report.html").unlink()
    (run / "model.safetensors").write_bytes(b"")
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes() + b'{"step": 1}\n5\n\xff\n')
    training.resume(run)
    assert (run / "report.html").stat().st_size > 10_000
    assert_same(run, undisturbed)


def test_stray_files_do_not_cost_a_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    run = unfinished(tmp_path, undisturbed)
    for name in ("step-best.safetensors", "step-final.safetensors"):
        (run / "checkpoints" / name).write_bytes(b"mine")
    (run / "checkpoints" / "step-00000030.safetensors").unlink()
    training.resume(run)
    assert {p.name for p in (run / "checkpoints").iterdir()} == {
        "step-00000030.safetensors", "step-best.safetensors", "step-final.safetensors"}  # fmt: skip


def test_a_run_killed_at_its_very_start_leaves_its_folder_usable(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".recipe.toml.123.tmp").write_text("na")
    RunFolder.create(tmp_path / "run", "digits")


def test_a_resume_with_the_runs_own_values_is_no_other_recipe(
    tmp_path: Path, undisturbed: Path, resumed: Resumed
) -> None:
    run = unfinished(tmp_path, undisturbed)
    values = [argument for argument in SETTINGS if argument not in ("--device", "cpu")]
    done = resumed(run, "digits", *values, "--set", "precision=auto")
    assert done.returncode == 0, done.stderr


def test_a_run_that_began_with_a_cuda_graph_goes_on_without(tmp_path: Path, undisturbed: Path) -> None:
    """A GPU's run keeps compile=auto, where one of a CPU has off."""
    run = unfinished(tmp_path, undisturbed)
    recipe = Recipe.from_values(RunFolder(run).read_recipe())
    assert recipe.compile == "off"
    change_identity(RunFolder(run), recipe, replace(recipe, compile="auto"))
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace('compile = "off"', 'compile = "auto"'))
    training.resume(run)
    assert figures(run) == figures(undisturbed)

    state = TrainState.create(training.build_task(recipe, training.RunOptions(device="cpu")))
    of_a_cpu = state.identity
    for compiled, goes_on in (("auto", True), ("off", True), ("on", False)):
        state.task = replace(state.task, recipe=replace(recipe, compile=compiled))
        assert state.continues(of_a_cpu) is goes_on


def test_only_damaged_checkpoints_are_an_error_and_nothing_is_lost(tmp_path: Path, undisturbed: Path) -> None:
    run = unfinished(tmp_path, undisturbed)
    for file in (run / "checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(RunError, match=r"every checkpoint in .* is damaged; start a new run"):
        training.resume(run)
    assert figures(run) == figures(undisturbed)


def test_a_run_is_not_resumed_with_another_recipe_or_data(tmp_path: Path, undisturbed: Path, resumed: Resumed) -> None:
    run = unfinished(tmp_path, undisturbed)
    done = resumed(run, "--set", "lr=0.5")
    assert done.returncode == 1
    assert "was started with another recipe: you ask for lr = 0.5 (not 0.1)" in done.stderr
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("lr = 0.1", "lr = 0.3", 1))
    with pytest.raises(RunError, match="was made with another recipe or other data"):
        training.resume(run)
    assert figures(run) == figures(undisturbed)


def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, 'mount -t tmpfs none "$1"', "sh", str(disk)]).returncode
    ):
        pytest.skip("this machine lets nobody mount a small disk (unshare, tmpfs)")
    after = "; code=$?; ls -a disk/run disk/run/checkpoints 2>&1; exit $code"
    script = f'mount -t tmpfs -o size=900k none disk && "$@"{after}'
    arguments = [sys.executable, *command("train", "digits", *SETTINGS, "--out", "disk/run")[1:]]  # of the namespace
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*namespace, script, "sh", *arguments], text=True, capture_output=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 1, done.stderr
    assert "resnetlab: no space left to write" in done.stderr and "Traceback" not in done.stderr
    assert "recipe.toml" in done.stdout and "step-00000001.safetensors" in done.stdout and ".tmp" not in done.stdout


def test_no_permission_for_the_run_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", "--out", "/proc/nowhere/run"]) == 1
    messages = capsys.readouterr().err
    assert "cannot write /proc/nowhere/run" in messages or "no permission to write" in messages
