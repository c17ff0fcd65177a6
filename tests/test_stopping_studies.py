"""A study that is stopped, in whatever way, is resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ARGUMENTS = ["study", "degradation", "--depths", "8", "--seeds", "1", "--steps", "60", "--device", "cpu"]


def start(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "resnetlab", *ARGUMENTS],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not runs_with_steps(folder):
        time.sleep(0.1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_stopped_study_is_resumed(signum: signal.Signals, tmp_path: Path) -> None:
    process = start(tmp_path)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signum)
    _, err = process.communicate()
    if signum == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        while any(alive(pid) for pid in workers):  # they notice, save and exit by themselves
            time.sleep(0.1)
    else:
        assert process.returncode == 128 + signum
        assert "stopped; every run is saved" in err and "Traceback" not in err
    begun = runs_with_steps(tmp_path)
    saved = {path.parents[1].name for path in tmp_path.glob("runs/studies/*/checkpoints/*.safetensors")}
    assert begun and begun <= saved
    again = subprocess.run(
        [sys.executable, "-m", "resnetlab", *ARGUMENTS, "--json"], cwd=tmp_path, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    assert len(json.loads(again.stdout)["rows"]) == 4
    assert {path.parent.name for path in tmp_path.glob("runs/studies/*/result.json")} >= begun


def runs_with_steps(folder: Path) -> set[str]:
    """The runs that have made some steps."""
    return {path.parent.name for path in folder.glob("runs/studies/*/metrics.jsonl") if path.stat().st_size}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
