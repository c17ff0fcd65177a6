"""The README's commands run; those that install or test are the ones that .ci/run and scripts/check use."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

import images
from readme import FIRST, REPOSITORY, SECOND, UV, blocks, commands
from resnetlab.cli.main import run_command


def runnable(command: str) -> str | None:
    """The arguments of a `resnetlab` command, training cut to 20 steps, studies to 3; None for any other command."""
    ours, n = re.subn(rf"^{UV}resnetlab(?!\S)", "", command)
    if not n:
        return None
    if " study " in ours:  # the smallest runs, of the smallest networks
        return re.sub(r" --(steps|seeds|depths)[ =]\S+", "", ours) + " --steps 3 --seeds 1 --depths 8"
    if " train" not in ours or re.search("--(resume|show-recipe|help)", ours):
        return ours
    steps = "2 --set batch=4" if re.search(" (photos|shards)", ours) else "20"
    return re.sub(r"(?<= )train(?!\S)", f"train --steps {steps}", re.sub(r" --steps[ =]\S+", "", ours), count=1)


def add_images(text: str, folder: Path) -> None:
    """Adds the images that commands read: the repository's, or generated ones. Images after an option are outputs."""
    for option, name in re.findall(r"(--\S+ )?([\w./-]+\.(?:png|jpe?g))\b", text):
        if option or (folder / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / name).is_file():
            shutil.copy(REPOSITORY / name, folder / name)
        else:
            Image.linear_gradient("L").resize((32, 32)).convert("RGB").save(folder / name)


def add_photos(folder: Path) -> None:
    """A folder of class folders, like a reader's own."""
    if not (folder / "photos").exists():
        images.folder(folder / "photos", {"": 10}, ("daisy", "tulips"))


def add_cifar10(command: str, folder: Path, cifar10: Path) -> None:
    """Puts CIFAR-10 where the command will look for it."""
    place = re.search(r"--data-dir[ =](\S+)", command)
    link = folder / (place[1] if place else "data")
    if not link.exists():
        link.symlink_to(cifar10, target_is_directory=True)


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
    monkeypatch.chdir(tmp_path)
    for command in commands():
        if (ours := runnable(command)) is None:
            continue
        with subtests.test(command):
            if "cifar10" in command:
                add_cifar10(command, tmp_path, request.getfixturevalue("cifar10_dir"))
            if "photos" in command:
                add_photos(tmp_path)
            add_images(command, tmp_path)
            assert run_command(shlex.split(ours)) == 0
    with subtests.test("the Python"):
        program = "\n".join(blocks("python"))
        add_images(program, tmp_path)
        exec(compile(program, "README.md", "exec"), {})


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
