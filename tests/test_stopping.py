"""Ctrl-C and SIGTERM: no signal is lost, what waits notices it, and a second one ends the process at once."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple

import pytest
import torch

from resnetlab import __main__
from resnetlab.cli import launch, main, predict
from resnetlab.data import prefetch
from resnetlab.data.download import download_file
from resnetlab.errors import DataError
from resnetlab.run_folder import RunFolder
from resnetlab.stopping import StopSignal, catch_stop_signals, check_stop, end_on_stop_signals
from resnetlab.training.train import RunOptions


class Node:
    """An object that only the collector frees."""


def signal_in_callback() -> None:
    """Sends SIGTERM in a callback of the collector, where an exception would be swallowed."""
    node = Node()
    node.__dict__["cycle"] = node
    reference = weakref.ref(node, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    del node
    gc.collect()
    assert reference() is None


def test_a_signal_inside_the_garbage_collector_is_not_lost() -> None:
    with end_on_stop_signals():
        signal_in_callback()
        with pytest.raises(StopSignal, match="stopped") as stop:
            check_stop()
    assert stop.value.exit_code == 143


@pytest.mark.parametrize("command", ["train", "predict", "serve"])
def test_a_signal_at_the_start_of_a_command_is_not_lost(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(main, "understand", lambda *_: signal_in_callback())
    with pytest.raises(SystemExit) as end:
        main.main([command])
    assert end.value.code == 143 and capsys.readouterr().err == "resnetlab: stopped.\n"


def test_a_signal_while_the_command_is_imported_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        signal_in_callback()
        main.main(["models"])

    imported = ModuleType("main")
    imported.__dict__["main"] = run  # as if it came in the last import
    monkeypatch.setitem(sys.modules, "resnetlab.cli.main", imported)
    with pytest.raises(SystemExit) as end:
        __main__.main()
    assert end.value.code == 143 and capsys.readouterr() == ("", "resnetlab: stopped.\n")


def test_deferred_work_ends_by_itself_and_a_library_gets_the_second_signal(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with catch_stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        check_stop()  # deferred
        assert stop.signum == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with catch_stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(StopSignal, match="saved"):
            stop.stop_immediately("all is saved")
    check_stop()  # nothing is left of it


SCRIPT = """
import sys, time
from resnetlab import stopping
stopping.PATIENCE = float(sys.argv[2])
with stopping.end_on_stop_signals() as request:
    request.deferred, request.message = sys.argv[1] == "deferred", "all is saved."
    print("ready", flush=True)
    if sys.argv[1] == "library":  # in C, without a look at Python's handlers
        import hashlib
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    time.sleep(60)
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("work", ["deferred", "sleeping", "library"])
def test_a_second_signal_ends_at_once(work: str) -> None:
    process = start(work, "60")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130 and err == "resnetlab: all is saved.\n"


def test_work_that_does_not_look_ends_after_a_while_deferred_work_does_not() -> None:
    processes = [start(work, "0.3") for work in ("sleeping", "library", "deferred")]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes[:2]:
        _, err = process.communicate(timeout=20)
        assert process.returncode == 143 and err == "resnetlab: all is saved.\n"
    assert processes[2].poll() is None
    processes[2].kill()
    processes[2].communicate()


class Input(NamedTuple):
    """A standard input that nothing arrives at."""

    buffer: BinaryIO


@pytest.mark.parametrize("wait", ["standard input", "a download", "a batch"])
def test_what_waits_looks_at_the_signal(wait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resnetlab.data.download.PAUSES", (60.0,))
    read, write = os.pipe()
    waits: dict[str, Callable[[], object]] = {
        "standard input": predict._read_stdin,
        "a download": lambda: download_file("http://127.0.0.1:9/x", tmp_path / "x"),
        "a batch": lambda: list(prefetch.prefetch(time.sleep, [60], 1)),  # type: ignore[arg-type]
    }
    with os.fdopen(read, "rb") as file, catch_stop_signals() as request:
        request.deferred = False
        if wait == "standard input":
            monkeypatch.setattr(predict.sys, "stdin", Input(file))
        timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        try:
            with pytest.raises(StopSignal):
                waits[wait]()
        finally:
            timer.join()
    os.close(write)


def double(key: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return torch.full((3,), 2 * key), {"of": torch.tensor(key)}


def test_batches_travel_through_pipes_where_shared_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 10: torch's worker would lose the batch, and the main process would wait for it for ever."""

    def full(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.warns(UserWarning, match="shared memory is short.*--shm-size"):
        results = list(prefetch.prefetch(double, range(4), 2))
    assert [(x.tolist(), int(more["of"])) for x, more in results] == [([2 * i] * 3, i) for i in range(4)]


def test_a_worker_ends_with_the_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, codes = iter([7, 7, 1]), list[int]()
    monkeypatch.setattr(prefetch, "PARENT_POLL", 0)
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", codes.append)
    prefetch._end_with(7)
    assert codes == [1]


ORPHANS = """
import os, time
from multiprocessing import active_children
import torch
from resnetlab.data import prefetch
def fail(self): raise RuntimeError("no shared memory")
def job(key): return torch.zeros(3_000_000)
torch.Tensor.share_memory_, prefetch.PARENT_POLL = fail, 0.2
results = prefetch.prefetch(job, range(100), 2)
next(results)
print(*(child.pid for child in active_children()), flush=True)
time.sleep(1)
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the states of processes are read from /proc")
def test_workers_of_a_killed_process_end() -> None:
    """They waited for ever for a reader of the pipe in which a batch was; case 10 left them behind."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ORPHANS], capture_output=True, text=True, check=False)
    workers = [Path("/proc", pid, "stat") for pid in done.stdout.split()]
    assert len(workers) == 2
    end = time.monotonic() + 30
    while any(file.exists() and file.read_text().split()[2] != "Z" for file in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not [file for file in workers if file.exists() and file.read_text().split()[2] != "Z"]


def test_no_shared_memory_at_all_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("_multiprocessing.SemLock", refuse)
    with pytest.raises(DataError, match=r"cannot be started .*Permission denied.*--shm-size"):
        list(prefetch.prefetch(double, range(4), 2))


UNGUARDED = """
import multiprocessing, sys
from resnetlab.data.prefetch import prefetch
from resnetlab.distributed import leave_if_imported_again
def job(i): return i
multiprocessing.set_start_method("spawn", force=True)
leave_if_imported_again()
try:
    list(prefetch(job, range(4), 1))
except Exception as error:
    print(error)
"""


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert 'put the call under if __name__ == "__main__":' in done.stdout and "memory" not in done.stdout
    assert "Traceback" not in done.stderr


def test_a_signal_inside_the_garbage_collector_ends_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """torchrun's own handlers raise, which the collector's callbacks swallow; the job would go on."""
    python, sent = tmp_path / "python", []
    python.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 30\n")
    python.chmod(0o755)
    monkeypatch.setattr(launch.sys, "executable", str(python))

    def callback(*_: object) -> None:
        if not sent and (tmp_path / "started").exists():
            sent.append(os.kill(os.getpid(), signal.SIGTERM))

    gc.callbacks.append(callback)
    threshold = gc.get_threshold()
    gc.set_threshold(50)
    try:
        with end_on_stop_signals(), pytest.raises(SystemExit) as end:
            launch.Job("classify", RunOptions(device="cpu"), 1, 3)._launch(RunFolder(tmp_path / "run"))
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*threshold)
    assert end.value.code == 143 and sent and capfd.readouterr().err == ""  # torchrun logged the signal


def test_a_process_of_a_job_stops_with_its_launcher() -> None:
    """Those of a launcher that was killed while they started waited half an hour for it."""
    with end_on_stop_signals():
        launch._stop_with(os.getppid() + 1)
        with pytest.raises(StopSignal):
            check_stop()


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "start-up"])
def test_processes_of_a_job_stop_saved_on_a_signal_to_the_command(moment: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = "train digits --net resnet8 --steps 100000 --procs 2 --device cpu --set batch=32 --set checkpoint_minutes=0"
    command = [sys.executable, "-m", "resnetlab", *line.split(), "--out", str(run)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 200
        while not (run / ("metrics.jsonl" if moment == "training" else "recipe.toml")).exists():
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        time.sleep(2.0 if moment == "training" else 0.5)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 143 and "Traceback" not in err, err
    if moment == "training":
        assert "which is saved; resume with: resnetlab train --resume" in err and list((run / "checkpoints").iterdir())
