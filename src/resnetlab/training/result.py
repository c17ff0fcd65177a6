"""The progress of a run and how it is shown, and its result."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from resnetlab.errors import AnsweredAttributes
from resnetlab.formatting import HtmlFigures, format_duration, format_figure, format_percent
from resnetlab.peer_words import CLASSIFIER_ATTRIBUTES, RESULT_ATTRIBUTES
from resnetlab.progress import ProgressBar


@dataclass(frozen=True)
class Progress:
    """The progress of a running training; errors are fractions."""

    step: int
    steps: int
    lr: float
    loss: float
    error: float
    held_out: Mapping[str, float]  # figures of the last held-out evaluation, the most important first; may be empty
    images_per_second: float  # training steps only
    seconds_left: float  # NaN while there is only the first step, which compiled

    def describe(self) -> list[str]:
        """The figures as text, the most important first."""
        figure = next(iter(self.held_out.items()), None)
        held_out = [] if figure is None else [f"held-out {format_figure(*figure)}"]
        known = not math.isnan(self.seconds_left)
        return [
            f"{format_duration(self.seconds_left)} left" if known else "compiled, time left not known yet",
            f"loss {self.loss:.4f}",
            *held_out,
            f"training error {format_percent(self.error)}",
            f"{self.images_per_second:,.{0 if self.images_per_second >= 10 else 1}f} images/s",
            f"lr {self.lr:g}",
        ]


@contextlib.contextmanager
def show_training() -> Iterator[Callable[[Progress], None]]:
    """A progress bar for a training run; yields the function that updates it."""
    with ProgressBar("step") as bar:
        yield lambda p: bar.update(p.step, p.steps, p.describe())


@dataclass(frozen=True, kw_only=True)
class TrainResult(AnsweredAttributes, HtmlFigures):
    """The result of any run; figures are measured on `split` with the final weights. Each task adds its own."""

    run: str
    model: str
    report: str
    split: str
    n: int
    steps: int
    seconds: float
    images_per_second: float  # training steps only
    parameters: int
    budget: str | None  # "600 of the 64,000 steps of …" if the run is not as long as its recipe
    attribute_answers = RESULT_ATTRIBUTES

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The result in a dictionary; raises TypeError for one of another kind."""
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    to_dict = to_json


@dataclass(frozen=True, kw_only=True)
class ClassificationResult(TrainResult):
    """Result of a classifier, as printed by `resnetlab train --json`; errors are fractions."""

    top1_error: float
    top1_interval: tuple[float, float]  # Wilson, 95 %
    top5_error: float
    held_out_error: float | None  # None if nothing was held out
    none_of_these: Mapping[str, float | None] | None = None  # ClassificationMetrics.with_none_below, if one was chosen
    balanced_error: float | None = None  # the mean of the classes' errors; None in results of before
    attribute_answers = CLASSIFIER_ATTRIBUTES

    def __post_init__(self) -> None:
        low, high = self.top1_interval  # a list if read from a file
        object.__setattr__(self, "top1_interval", (low, high))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Any:
        """The result in a dictionary, of whichever kind of classifier; raises TypeError for another."""
        return MultiLabelResult(**values) if "mean_ap" in values else cls(**values)


@dataclass(frozen=True, kw_only=True)
class MultiLabelResult(TrainResult):
    """Result of a classifier that gives an image several classes, or none; fractions."""

    mean_ap: float  # over the classes
    f1: float  # mean over the classes
    micro_f1: float  # of all decisions together
    label_error: float  # the share of wrong decisions
    held_out_mean_ap: float | None  # None if nothing was held out


@dataclass(frozen=True, kw_only=True)
class DetectionResult(TrainResult):
    """Result of a detector, as printed by `resnetlab detect train --json`; mean average precisions are fractions."""

    map: float  # at IoU .5 to .95
    map_50: float
    voc_map: float
    per_class: list[dict[str, Any]]  # class, n, ap, ap_50, voc_ap, voc07_ap


@dataclass(frozen=True, kw_only=True)
class SegmentationResult(TrainResult):
    """Result of a segmenter, as printed by `resnetlab segment train --json`; fractions."""

    mean_iou: float
    pixel_error: float
    per_class: list[dict[str, Any]]  # class, pixels, iou
