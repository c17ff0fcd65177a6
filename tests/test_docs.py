"""The documents: their links and images exist, and they contain no placeholders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist_and_no_placeholders_are_left(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which does not exist"
    assert not re.findall(r"\b(?:TODO|FIXME|XXX|TBD|[A-Z]+_[A-Z_]+_?LINE|RESULT_LINE|COMMIT_[A-Z]+)\b", text)
