"""Commands in this process and in processes of their own, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import zygote
from resnetlab.cli.main import run_command

CLOCK = ("seconds", "images_per_second", "share_waiting")  # what the clock decides


def figures(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without its timing fields."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    assert figures(run) == figures(other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def start_command(*arguments: str, task: str = "detect") -> subprocess.Popen[str]:
    code = f"from resnetlab.cli.main import main\nmain({[task, *arguments]!r})"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [zygote.python(), "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def error_output(capsys: pytest.CaptureFixture[str], *command: str, code: int = 2) -> str:
    """Standard error of a command that ends with an exit code."""
    capsys.readouterr()
    assert run_command(list(command)) == code
    return capsys.readouterr().err
