"""What a run says while it goes on, and what it ends with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Progress:
    """What a person wants to know while a run goes on; errors are fractions."""

    step: int
    steps: int
    lr: float
    loss: float
    error: float
    held_out_error: float | None
    images_per_second: float  # training steps only
    seconds_left: float


@dataclass(frozen=True)
class Result:
    """What a run ends with: `residuum train --json` prints it; errors are fractions, measured on `split`."""

    run: str
    model: str
    report: str
    split: str
    n: int
    top1_error: float
    top1_interval: tuple[float, float]  # Wilson, 95 %
    top5_error: float
    held_out_error: float | None  # None where nothing was held out
    steps: int
    seconds: float
    images_per_second: float  # training steps only
    parameters: int
    budget: str | None  # "600 of the 64,000 steps of …" where the run is not as long as its recipe

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return asdict(self) | {"top1_interval": list(self.top1_interval)}
