"""The documentation site: its pages are in the navigation, its commands exist, its code runs, and it builds strictly."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import resnetlab
from documents import GENERATED, REPOSITORY, UV, blocks, commands, run_document
from resnetlab.cli.main import app

DOCS = REPOSITORY / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *DOCS.glob("*/*.md")])
PAGES = [page for page in PAGES if page.relative_to(REPOSITORY).as_posix() not in GENERATED]


def list_navigation(entries: list[dict[str, object]]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        for value in entry.values():
            found += list_navigation(value) if isinstance(value, list) else [str(value)]
    return found


def test_the_navigation_has_every_page_once() -> None:
    project = tomllib.loads((REPOSITORY / "zensical.toml").read_text())["project"]
    listed = list_navigation(project["nav"])
    assert sorted(listed) == sorted(
        [*(name.removeprefix("docs/") for name in GENERATED), *(page.relative_to(DOCS).as_posix() for page in PAGES)]
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_commands_and_options_exist_and_python_compiles(page: Path) -> None:
    """Also of blocks that need a network, a cluster or a person, which no test runs (`console`)."""
    for command in [*commands(page), *commands(page, "console")]:
        call = re.sub(rf"^{UV}(torchrun .* -m )?resnetlab(?!\S)", "", command)
        if call != command:
            app.parse_args(shlex.split(call), print_error=False, exit_on_error=False)
    for program in blocks("python", page):
        compile(program, page.name, "exec")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings(  # torch's launcher (`train --procs`) leaves its log files open
    "ignore:Exception ignored in.*stderr.log:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Ray and of trainers
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks("sh", page) or blocks("python", page)], ids=lambda p: p.stem
)
def test_a_pages_code_runs(
    page: Path,
    tmp_path: Path,
    subtests: pytest.Subtests,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_document(page, tmp_path, subtests, request, monkeypatch)


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("zensical", reason="the dependency group docs")
    for name in ("docs", "src", "scripts"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "zensical.toml", tmp_path)
    done = subprocess.run(
        [sys.executable, "scripts/docs"], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index", "reference/commands/index", "reference/python/index", "faq/index"):
        assert (tmp_path / "site" / f"{page}.html").is_file()
    assert "resnetlab-detect-train" in (tmp_path / "site/reference/commands/index.html").read_text()
    python = (tmp_path / "site/reference/python/index.html").read_text()
    assert "num_classes" in python or "classes" in python


@pytest.mark.slow
@pytest.mark.parametrize("notebook", sorted((DOCS / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_a_notebooks_cells_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, beside the one file that they read; the last value of a cell is what its stored output shows."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(DOCS / "three.png", tmp_path)
    names: dict[str, object] = {}
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells and all(cell["outputs"] or cell["source"] for cell in cells)
    for cell in cells:
        exec(compile("".join(cell["source"]), notebook.name, "exec"), names)


def test_the_reference_documents_what_the_package_exports() -> None:
    """Not a function of the same name that it is built from."""
    documented = re.findall(r"^::: (\S+)", (DOCS / "reference" / "python.md").read_text(), re.MULTILINE)
    exported = {name: f"{module}.{name}" for name, module in resnetlab._MODULES.items()}
    assert {path.rpartition(".")[2]: path for path in documented} | exported == {
        path.rpartition(".")[2]: path for path in documented
    }
    assert resnetlab.models.__getattr__("backbone").__name__ in [path.rpartition(".")[0] for path in documented]
