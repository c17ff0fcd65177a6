"""`import resnetlab` and `resnetlab --help` are light: what is heavy is imported where it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

HEAVY = ("matplotlib", "scipy", "torch", "torchvision")

MAIN = """
import runpy
import sys
sys.argv[1:] = {arguments}
try:
    runpy.run_module("resnetlab", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
"""


def loaded_by(code: str) -> tuple[list[str], str]:
    """The heavy packages that a fresh process has loaded after running `code`, and what it wrote to standard output."""
    code += f"\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1].split(), done.stdout


def test_importing_the_package_is_light() -> None:
    assert loaded_by("import resnetlab") == ([], "")


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_is_light(arguments: list[str]) -> None:
    heavy, output = loaded_by(MAIN.format(arguments=arguments))
    assert heavy == []
    assert "train" in output


def test_listing_runs_is_light(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("steps = 20\n")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000012.safetensors").touch()
    heavy, output = loaded_by(MAIN.format(arguments=["runs", str(tmp_path), "--json"]))
    assert heavy == [] and json.loads(output)["runs"][0]["step"] == 12


def test_help_lists_every_command_with_its_description() -> None:
    from resnetlab.cli.main import app

    described = []
    for group in (app, app["data"], app["detect"], app["segment"], app["runs"]):
        for name in group:
            if not name.startswith(("-", "_")):
                described.append(name)
                assert group[name].help.strip().splitlines()[0], f"{name} has no description"
    assert len(described) == 21 + 3 + 5 + 4 + 1  # of the top level, data, detect, segment, runs
    heavy, output = loaded_by(MAIN.format(arguments=["--help"]))
    lines = [line.strip("│").split() for line in output.splitlines() if line.startswith("│ ") and line[2] != " "]
    assert not heavy and len(lines) == 21 + 3 and all(len(line) > 2 for line in lines)  # and --help, …


def test_what_is_heavy_would_be_seen() -> None:
    assert loaded_by("import scipy")[0] == ["scipy"]


def test_the_command_is_the_package_run_as_a_module() -> None:
    (command,) = entry_points(group="console_scripts", name="resnetlab")
    assert command.value == "resnetlab.__main__:main"
