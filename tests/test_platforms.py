"""What Windows and some file systems lack: the commands work without it."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import resnetlab
from resnetlab.errors import RunError
from resnetlab.run_folder import RunFolder, hold_lock

WITHOUT_POSIX = """
import errno, os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
del os.sched_getaffinity, os.fork, signal.SIGKILL, errno.EDQUOT
from resnetlab.cli.main import run_command
from resnetlab.studies import cost
from resnetlab.studies.workers import worker_devices
cost.NETS = ["resnet34", "resnet152"]  # not the deepest too
assert worker_devices("cpu", 10**6) == ["cpu"] * os.cpu_count()
commands = (
    ["train", "--steps", "2", "--out", "run", "--batch", "auto", "--device", "cpu"],
    ["train", "--resume", "run"],
    ["evaluate", "run/model.safetensors", "--data", "digits", "--device", "cpu", "--out", "evaluated"],
    ["predict", "run/model.safetensors", "image.png", "--device", "cpu"],
    ["study", "cost"],
)
for command in commands:
    if command[0] == "study":  # which loads torchvision, and with it torch's compiler
        unneeded = {"sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)
        assert not unneeded, f"commands that compile nothing waited seconds for these imports: {unneeded}"
    code = run_command(command)
    assert code == 0, (command, code)
"""


def test_no_command_needs_what_only_posix_has(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (8, 8), 100).save(tmp_path / "image.png")
    done = subprocess.run([sys.executable, "-c", WITHOUT_POSIX], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "run is finished; nothing to do." in done.stderr
    assert "Traceback" not in done.stderr


def test_texts_are_read_and_written_in_utf_8() -> None:
    """Windows has another encoding of its own, in which a recipe that names a folder of images called "für" is another."""
    root = Path(resnetlab.__file__).parent
    call = re.compile(r"\.(read|write)_text\((?!.*utf-8)|\bopen\([^)]*\"[rwax]\+?\"\)")
    # what the kernel gives, and the metadata of a distribution
    allowed = re.compile(r"/proc/|/sys/|\bown\.read|in files\)|package\.read_text")
    lines = [line for file in root.rglob("*.py") for line in file.read_text("utf-8").split("\n")]
    assert len(lines) > 10_000 and not [text for text in filter(call.search, lines) if not allowed.search(text)]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_goes_on_where_the_file_system_has_no_locks(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", _raise(number))
    run = RunFolder(tmp_path)
    with run.lock(), run.lock():
        pass
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b""] * len(
        os.listdir(tmp_path)
    )  # no mark of a holder


def test_other_errors_of_a_lock_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _raise(errno.EIO))
    with pytest.raises(RunError, match="cannot write"), hold_lock(tmp_path / "lock"):
        pass


def _raise(number: int) -> object:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock
