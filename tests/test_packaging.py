"""What people install: metadata, wheel and sdist, and the files of a public project."""

import json
import re
import subprocess
import sys
import tarfile
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest

import resnetlab

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_extra_all_contains_every_other_extra() -> None:
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    assert re.fullmatch(r"resnetlab\[(.+)\]", everything)[1].split(",") == [name for name in extras if name != "all"]


def test_every_address_of_the_project_begins_with_the_homepage() -> None:
    urls = PROJECT["urls"]
    assert all(url.startswith(urls["Homepage"]) for url in urls.values())
    assert f"url: {urls['Homepage']}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_supported_pythons_are_those_that_are_tested() -> None:
    prefix = "Programming Language :: Python :: 3."
    classified = [entry.removeprefix(prefix) for entry in PROJECT["classifiers"] if entry.startswith(prefix)]
    workflow = (ROOT / ".github/workflows/checks.yml").read_text()
    tested = re.findall(r'"3\.(\d+)"', re.search(r"python: \[(.+)\]", workflow)[1])
    assert classified == tested
    assert PROJECT["requires-python"] == f">=3.{classified[0]}"


def test_the_changelog_has_a_section_for_this_version() -> None:
    version = resnetlab.__version__.split(".dev")[0]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_and_sdist_work_in_an_empty_environment(tmp_path: Path) -> None:
    uv = ROOT / ".tools/bin/uv" if (ROOT / ".tools/bin/uv").exists() else "uv"
    run(uv, "build", "--quiet", "--out-dir", tmp_path / "dist", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    tracked = run("git", "ls-files", "src", cwd=ROOT).splitlines()
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {name.removeprefix("src/") for name in tracked} <= packed, "a file of the source is missing in the wheel"
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive}
    assert {*tracked, "README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml"} <= names
    assert sum(path.stat().st_size for path in (wheel, sdist)) < 5_000_000

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(
        run(
            uv,
            "export",
            "--frozen",
            "--no-hashes",
            "--no-emit-project",
            "--no-dev",
            "--extra=serve",
            "--quiet",
            cwd=ROOT,
        )
    )
    for package in (wheel, sdist):
        environment = tmp_path / package.suffix
        run(uv, "venv", "--quiet", "--python", version, environment, cwd=tmp_path)
        python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
        what = f"resnetlab[serve] @ {package.as_uri()}" if package == wheel else package
        run(uv, "pip", "install", "--quiet", "--python", python, "--constraints", constraints, what, cwd=tmp_path)
        command = python.with_name("resnetlab")
        assert "study" in run(command, "--help", cwd=tmp_path)
        out = f"runs/{package.suffix}"
        trained = json.loads(run(command, "train", "--steps", "5", "--out", out, "--json", cwd=tmp_path))
        assert trained["steps"] == 5
        image = ROOT / "docs/three.png"
        assert "top1" in run(command, "evaluate", trained["model"], "--data", "digits", "--json", cwd=tmp_path)
        assert run(command, "predict", trained["model"], image, "--json", cwd=tmp_path)
        if package == wheel:
            check_service(command, tmp_path / trained["model"], image)


def check_service(command: Path, model: Path, image: Path) -> None:
    """The installed service starts, answers an image with its page beside it, and ends by SIGTERM with exit code 0."""
    service = subprocess.Popen(
        [command, "serve", model, "--port", "0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        address = next(line for line in service.stderr if "is served at" in line).split()[4]
        request = urllib.request.Request(f"{address}predict?top=2", image.read_bytes(), {"Content-Type": "image/png"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert len(json.load(answer)["predictions"][0]["top"]) == 2
        with urllib.request.urlopen(address, timeout=60) as page:
            assert b"<html" in page.read()
        service.terminate()
        assert service.wait(60) == 0
    finally:
        service.kill()
        service.communicate()
