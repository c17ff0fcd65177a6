"""Two runs compared: what must be the same to the bit, whatever happened in between."""

from __future__ import annotations

import json
from pathlib import Path

CLOCK = ("seconds", "images_per_second", "share_waiting")  # what the clock decides


def figures(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    assert figures(run) == figures(other)
    assert (run / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
