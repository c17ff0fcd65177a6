"""Whatever tells people to install something names this package, by one function."""

from __future__ import annotations

import importlib.metadata
import json
import re
from typing import Any

import pytest

from documents import FIRST, REPOSITORY
from resnetlab.errors import install_hint, missing_package

SOURCES = [path for path in (REPOSITORY / "src").rglob("*.*") if path.suffix in {".py", ".j2", ".html", ".js"}]
DOCUMENTS = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
METADATA = importlib.metadata.metadata("resnetlab")


def install(monkeypatch: pytest.MonkeyPatch, installer: str, origin: dict[str, Any] | None) -> None:
    """Lets the package seem to have been installed by `installer` from `origin`."""
    texts = {"INSTALLER": installer, "direct_url.json": json.dumps(origin) if origin else None}

    class Distribution:
        read_text = texts.get

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())


@pytest.mark.parametrize(("installer", "origin", "command"), [
    ("pip\n", None, "pip install 'resnetlab[onnx]'"),
    ("uv", None, "uv pip install 'resnetlab[onnx]'"),
    ("uv", {"url": "file:///a%20b/c", "dir_info": {"editable": True}}, "uv pip install -e '/a b/c[onnx]'"),
    ("pip", {"url": "file:///a/c", "dir_info": {}}, "pip install 'resnetlab[onnx] @ file:///a/c'"),
    ("pip", {"url": "https://example.org/r.git", "vcs_info": {"vcs": "git", "commit_id": "12ab"}},
     "pip install 'resnetlab[onnx] @ git+https://example.org/r.git@12ab'"),
])  # fmt: skip
def test_extras_come_from_where_the_package_came(
    installer: str, origin: dict[str, Any] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, installer, origin)
    assert install_hint("onnx") == command
    message = str(missing_package("--to onnx", "onnxscript", "onnx"))
    assert message == f"--to onnx needs the package onnxscript; install it with: {command}"


def test_a_package_that_is_not_installed_is_installed_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert install_hint("hub") == "pip install 'resnetlab[hub]'"


def test_nothing_else_tells_people_to_install_a_package() -> None:
    extras = METADATA.get_all("Provides-Extra")
    assert len(SOURCES) > 200 and len(DOCUMENTS) > 10
    for file in (*SOURCES, *DOCUMENTS):
        text = file.read_text().replace(FIRST.split(" && ")[0], "")  # brings uv
        if file.name != "errors.py":
            assert not re.search(r"pip3? install", text), file
        for named in re.findall(r"--extra (\w+)|missing_package\([^)]*, \"(\w+)\"\)|install_hint\([\"'](\w+)", text):
            assert "".join(named) in extras, file


def test_the_name_is_the_imports_and_the_commands() -> None:
    assert METADATA["Name"] == "resnetlab"
    (script,) = importlib.metadata.distribution("resnetlab").entry_points
    assert (script.name, script.value) == ("resnetlab", "resnetlab.__main__:main")
