"""The Dockerfile as far as it can be tested without an engine: what it copies is there, and what it runs is known."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from documents import FIRST
from resnetlab.cli.main import app

REPOSITORY = Path(__file__).resolve().parents[1]
LINES = (REPOSITORY / "Dockerfile").read_text().splitlines()


def instructions(name: str) -> list[str]:
    return [line.removeprefix(name).strip() for line in LINES if line.startswith(name + " ")]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    allowed = {line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [source for line in instructions("COPY") if "--from" not in line for source in line.split()[:-1]]
    assert set(copied) == allowed and len(copied) == 5
    for source in copied:
        assert (REPOSITORY / source).exists()


def test_it_installs_as_the_readme_does() -> None:
    steps = instructions("RUN")
    assert steps[0] == FIRST.split(" && ")[0]
    assert steps[1].split() == [".tools/bin/uv", "sync", "--locked", "--no-dev", "--no-editable", "--extra", "serve"]
    assert "serve = [" in (REPOSITORY / "pyproject.toml").read_text()


def test_the_command_is_serve_and_its_options_are_known() -> None:
    (entry,), (command,) = instructions("ENTRYPOINT"), instructions("CMD")
    pytest.importorskip("fastapi")
    arguments = [*json.loads(entry), *json.loads(command)]
    assert arguments.pop(0) == "resnetlab"
    _, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
    assert bound.arguments["host"] == "0.0.0.0" and str(bound.arguments["port"]) == instructions("EXPOSE")[0]


def test_it_runs_as_nobody_in_particular_and_stops_gracefully() -> None:
    user = instructions("USER")[0]
    assert any(re.search(rf"useradd .* {user}$", step) for step in instructions("RUN"))
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    (health,) = instructions("HEALTHCHECK")
    assert json.loads(health[health.index("[") :])[0] == "python" and "/healthz" in health
