"""What a run says while it goes on, and what it ends with."""

from __future__ import annotations

from collections.abc import Mapping
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
    held_out: Mapping[str, float]  # figures of the last judgement of held-out pictures, the one to watch first; or none
    images_per_second: float  # training steps only
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What every run ends with; figures are measured on `split`, by the last iterate. A task's result adds its own."""

    run: str
    model: str
    report: str
    split: str
    n: int
    steps: int
    seconds: float
    images_per_second: float  # training steps only
    parameters: int
    budget: str | None  # "600 of the 64,000 steps of …" where the run is not as long as its recipe

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


@dataclass(frozen=True, kw_only=True)
class Result(Ended):
    """A classifier's: `residuum train --json` prints it; errors are fractions."""

    top1_error: float
    top1_interval: tuple[float, float]  # Wilson, 95 %
    top5_error: float
    held_out_error: float | None  # None where nothing was held out

    def __post_init__(self) -> None:
        low, high = self.top1_interval  # a list where it comes from a file
        object.__setattr__(self, "top1_interval", (low, high))


@dataclass(frozen=True, kw_only=True)
class BoxResult(Ended):
    """A detector's: `residuum detect train --json` prints it; mean average precisions are fractions."""

    map: float  # at IoU .5 to .95
    map_50: float
    voc_map: float
    per_class: list[dict[str, Any]]  # class, n, ap, ap_50, voc_ap, voc07_ap


@dataclass(frozen=True, kw_only=True)
class MaskResult(Ended):
    """A segmenter's: `residuum segment train --json` prints it; fractions."""

    mean_iou: float
    pixel_error: float
    per_class: list[dict[str, Any]]  # class, pixels, iou
