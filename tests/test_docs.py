"""The documents: their links and images exist, and they contain no placeholders."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from documents import GENERATED, REPOSITORY, blocks

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


def test_the_service_behind_a_proxy_agrees_with_its_options() -> None:
    """The unit's command is one of ours, and the proxy's port and limit are the service's."""
    from resnetlab.cli.main import app
    from resnetlab.cli.serve import serve

    page = (REPOSITORY / "docs" / "how-to" / "serve.md").read_text()
    unit, proxy = (blocks(language, REPOSITORY / "docs" / "how-to" / "serve.md")[0] for language in ("ini", "nginx"))
    (line,) = re.findall(r"^ExecStart=\S+/resnetlab (.*)$", unit, re.MULTILINE)
    command, bound, _ = app.parse_args(line, exit_on_error=False)
    assert command is serve
    bound.apply_defaults()
    given = bound.arguments
    assert f"proxy_pass http://127.0.0.1:{given['port']}/;" in proxy and given["host"] == "127.0.0.1"
    assert f"client_max_body_size {given['max_body_mb']:g}m;" in proxy
    assert f"{2 * given['timeout'] + 1:g} seconds at most" in page  # serve.process.run_server
