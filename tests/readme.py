"""The README's commands."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
README = REPOSITORY / "README.md"
UV = r"(?:(?:\.tools/bin/)?uv run (?:--\S+ )*)?"  # how a command may begin
FIRST = "python3 -m pip install -q --target .tools 'uv>=0.13,<1' && .tools/bin/uv run --no-dev resnetlab train"
SECOND = ".tools/bin/uv run pytest"


def blocks(language: str) -> list[str]:
    """The README's code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """All commands of the README's sh blocks, continued lines and `&&` taken apart."""
    lines = "".join(blocks("sh")).replace("\\\n", "").splitlines()
    parts = (part.strip() for line in lines if not line.startswith("#") for part in line.split(" && "))
    return [part for part in parts if part]
