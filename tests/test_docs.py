"""The documents: their links and images exist, and they contain no placeholders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from documents import GENERATED, REPOSITORY

PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
PAGES = [page for page in PAGES if page.relative_to(REPOSITORY).as_posix() not in GENERATED]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_links_exist_and_no_placeholders_are_left(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            generated = (page.parent / target).resolve().relative_to(REPOSITORY).as_posix() in GENERATED
            assert generated or (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|TBD|[A-Z]+_[A-Z_]+_?LINE|RESULT_LINE|COMMIT_[A-Z]+)\b", text)
