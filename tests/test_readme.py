"""The README's commands run; those that install or test are the ones that .ci/run and scripts/check use."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from documents import FIRST, README, REPOSITORY, SECOND, UV, blocks, commands, run_document, runnable


@pytest.mark.timeout(900)
def test_the_readme_runs(
    tmp_path: Path,
    subtests: pytest.Subtests,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every `resnetlab` command in order, then the Python, in one folder: what one writes the next may read.

    They run in this process, since starting one for each would take longer than most commands do.
    """
    run_document(README, tmp_path, subtests, request, monkeypatch)


def test_every_command_is_known() -> None:
    """No command is skipped silently: it is run, it installs or tests, or it is a script of the repository."""
    assert FIRST in "".join(blocks("sh"))
    assert SECOND in commands()
    for command in commands():
        if runnable(command) or re.match(
            rf"{UV}(pytest|(\S+ -m )?pip install|(\.tools/bin/)?uv (add|sync)|git clone|cd)\b", command
        ):
            continue
        assert os.access(REPOSITORY / command.split()[0], os.X_OK), f"how is this to be tested? {command}"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A bare checkout in which python3 and uv only record how they were called; the tool named by $BROKEN fails."""
    for script in (".ci/run", "scripts/check"):
        (tmp_path / script).parent.mkdir(parents=True)
        shutil.copy(REPOSITORY / script, tmp_path / script)
    uv = 'echo "$0 $*" >> calls; [ "$2" != "$BROKEN" ]'
    python3 = (
        f"echo python3 $* >> calls; mkdir -p .tools/bin; printf '%s' '{uv}' > .tools/bin/uv; chmod +x .tools/bin/uv"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").write_text(f"#!/bin/sh\n{python3}\n")
    (tmp_path / "bin" / "python3").chmod(0o755)
    return tmp_path


def call(clone: Path, *script: str, **environment: str) -> tuple[int, list[str]]:
    """Runs a script from another folder, without input; its exit code, and what it called."""
    environment = {"PATH": f"{clone / 'bin'}:/usr/bin:/bin", "CI": "true", **environment}
    (clone / "calls").unlink(missing_ok=True)
    arguments = ["bash", str(clone / script[0]), *script[1:]]
    done = subprocess.run(
        arguments, env=environment, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    return done.returncode, (clone / "calls").read_text().splitlines() if (clone / "calls").exists() else []


def test_ci_installs_and_tests_as_the_readme_says(clone: Path) -> None:
    install = " ".join(shlex.split(FIRST.split(" && ")[0]))
    code, calls = call(clone, ".ci/run")
    assert code == 0
    assert (calls[0], calls[-1]) == (install, SECOND)
    checks = [".tools/bin/uv run ruff format --check", ".tools/bin/uv run ruff check", ".tools/bin/uv run mypy", SECOND]
    assert calls[1:] == checks
    assert call(clone, ".ci/run") == (0, checks)  # uv is there now


@pytest.mark.parametrize("tool", ["ruff", "mypy", "pytest"])
def test_failures_are_not_swallowed(tool: str, clone: Path) -> None:
    code, calls = call(clone, ".ci/run", BROKEN=tool)
    assert code != 0
    assert f"run {tool}" in calls[-1]


def test_check_fixes_only_when_asked(clone: Path) -> None:
    assert call(clone, "scripts/check") == (1, [])  # there is no uv
    call(clone, ".ci/run")
    code, calls = call(clone, "scripts/check", "--fix")
    assert code == 0
    assert calls[:2] == [".tools/bin/uv run ruff check --fix --exit-zero", ".tools/bin/uv run ruff format"]
    assert call(clone, "scripts/check", "--fast") == (2, [])
