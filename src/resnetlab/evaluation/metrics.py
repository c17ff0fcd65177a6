"""Figures of a set of predictions. Errors are fractions; intervals are Wilson's, at 95 %.

A test checks confusion and calibration against torchmetrics; importing that library takes longer than training on the digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnetlab.data.dataset import Columns, Split
from resnetlab.device import DeviceConfig
from resnetlab.errors import UsageError
from resnetlab.evaluation.calibration import reliability_bins
from resnetlab.evaluation.scores import (
    MAX_SCORES,
    Member,
    ScoreSummary,
    drop_skipped,
    predict_scores,
    rescale_scores,
    summarise_scores,
    take_logarithms,
)
from resnetlab.formatting import format_list
from resnetlab.models.own_network import Network
from resnetlab.preprocessing import Preprocessing

Z_95 = 1.959964  # the 97.5 % quantile of the normal distribution
MAX_VALUES = 20  # of a table's column: errors by the values of one with more are not computed
MAX_CONFUSION = 1000  # classes of a confusion matrix; with more, only the counts that are not 0 are listed


@dataclass(frozen=True)
class ClassMetrics:
    """The figures of one class.

    Attributes:
        n: images of the class.
        right: images of it that are predicted as such.
        predicted: images that are predicted as it.
    """

    name: str
    n: int
    right: int
    predicted: int

    @property
    def wrong(self) -> int:
        """Images of the class that are predicted as another."""
        return self.n - self.right

    @property
    def error(self) -> float | None:
        """The share of its images that are taken for others; None without an image."""
        return self.wrong / self.n if self.n else None

    @property
    def precision(self) -> float | None:
        """The share of what is predicted as the class that is right; None where nothing is."""
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """The share of its images that are right; None without an image."""
        return self.right / self.n if self.n else None

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall; None where the class neither has images nor is predicted."""
        return 2 * self.right / (self.n + self.predicted) if self.n + self.predicted else None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        figures = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        return {"class": self.name, "n": self.n, "top1_error": self.error} | figures


@dataclass(frozen=True, eq=False)
class ClassificationMetrics:
    """The figures of a network's scores for a split. Of equal scores the class that comes first is higher.

    Attributes:
        summary: `summarise_scores` of each image, float32 (N, 4).
        labels: int64 (N,).
        all_scores: softmax, float32 (N, classes); None for more than scores.MAX_SCORES of them.
        split: the name of the split in its data.
        skipped: name -> reason, of images that could not be read and are not among the N.
    """

    classes: tuple[str, ...]
    summary: Tensor
    labels: Tensor
    all_scores: Tensor | None = None
    split: str = "test"
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"top-1 error {self.top1_error:.2%}"

    @staticmethod
    def from_scores(classes: tuple[str, ...], scores: Tensor, labels: Tensor) -> ClassificationMetrics:
        """The metrics of softmax scores (N, classes); a score of 0 counts as the smallest float32."""
        return ClassificationMetrics(classes, summarise_scores(scores, labels), labels, scores)

    @property
    def scores(self) -> Tensor:
        """Softmax, float32 (N, classes); raises UsageError where they were too many to be kept."""
        if self.all_scores is None:
            raise UsageError(
                f"{self.n:,} images have more scores of {len(self.classes):,} classes than are kept ({MAX_SCORES:,}); "
                "evaluate fewer images at a time, or take the model's predict."
            )
        return self.all_scores

    def with_temperature(self, temperature: float) -> ClassificationMetrics:
        """The same metrics with logits divided by `temperature`; for scores at temperature 1."""
        return ClassificationMetrics.from_scores(self.classes, rescale_scores(self.scores, temperature), self.labels)

    @property
    def log_scores(self) -> Tensor:
        """Logits up to a constant for each image; float64 (N, classes)."""
        return take_logarithms(self.scores)

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def predicted(self) -> Tensor:
        """The class with the highest score; int64 (N,)."""
        return self.summary[:, 3].long()

    @property
    def right(self) -> Tensor:
        """Whether that is the image's class; bool (N,)."""
        return self.predicted == self.labels

    def errors_by_column(self, columns: Columns) -> dict[str, list[dict[str, Any]]]:
        """column of the data's table -> `value`, `n` and `top1_error` of its values, for columns of 2 to MAX_VALUES values."""
        wrong, found = (self.predicted != self.labels).numpy(), {}
        for column, values in columns.items():
            names, codes = np.unique(values.astype(str), return_inverse=True)
            if 2 <= len(names) <= MAX_VALUES:
                counts, errors = np.bincount(codes), np.bincount(codes, wrong)
                rows = zip(names.tolist(), counts.tolist(), (errors / counts).tolist(), strict=True)
                found[column] = [{"value": value, "n": n, "top1_error": error} for value, n, error in rows]
        return found

    @property
    def confidence(self) -> Tensor:
        """The highest score; (N,)."""
        return self.summary[:, 2]

    @property
    def true_scores(self) -> Tensor:
        """The score of the image's class; (N,)."""
        return self.summary[:, 0]

    @property
    def ranks(self) -> Tensor:
        """The true class's place among the scores, from 1; int64 (N,)."""
        return self.summary[:, 1].long()

    @property
    def loss(self) -> float:
        """Mean cross entropy, in nats."""
        return mean_loss(self.true_scores)

    @property
    def top1_error(self) -> float:
        return self.top_error(1)

    @property
    def top5_error(self) -> float:
        return self.top_error(5)

    def top_error(self, k: int) -> float:
        """The share of images whose class is not among the k highest scores."""
        return int((self.ranks > k).sum()) / self.n

    def with_none_below(self, score: float) -> dict[str, float | None]:
        """The `share` of images whose best score is `below` this; the `top1_error` of the others, if any."""
        sure = self.confidence >= score
        wrong = float((self.ranks[sure] > 1).double().mean()) if bool(sure.any()) else None
        return {"below": score, "share": 1 - float(sure.double().mean()), "top1_error": wrong}

    @property
    def confusion(self) -> Tensor:
        """Counts, int64 (classes, classes): rows are true classes, columns predicted ones."""
        k = len(self.classes)
        return torch.bincount(self.labels * k + self.predicted, minlength=k * k).view(k, k)

    @cached_property
    def confusion_counts(self) -> list[tuple[int, int, int]]:
        """(true class, predicted class, images) of every pair that occurs, in the order of the matrix."""
        k = len(self.classes)
        cells, counts = torch.unique(self.labels * k + self.predicted, return_counts=True)
        return [(cell // k, cell % k, n) for cell, n in zip(cells.tolist(), counts.tolist(), strict=True)]

    @cached_property
    def taken_for(self) -> list[list[tuple[str, int]]]:
        """For every class, the classes that its images are taken for and how many are, the most first."""
        wrong: list[list[tuple[str, int]]] = [[] for _ in self.classes]
        for true, predicted, n in self.confusion_counts:
            if true != predicted:
                wrong[true].append((self.classes[predicted], n))
        return [sorted(row, key=lambda pair: -pair[1]) for row in wrong]

    @cached_property
    def per_class(self) -> list[ClassMetrics]:
        """The figures of every class, in the order of `classes`."""
        k = len(self.classes)
        right = self.labels[self.right]
        columns = (torch.bincount(values, minlength=k).tolist() for values in (self.labels, right, self.predicted))
        return [ClassMetrics(*row) for row in zip(self.classes, *columns, strict=True)]

    def macro(self, figure: str) -> float:
        """The mean of "precision", "recall" or "f1" over the classes that have images; 0 for a class never predicted."""
        return mean_of_known(getattr(each, figure) or 0.0 for each in self.per_class if each.n)

    @property
    def balanced_error(self) -> float:
        """The mean of the classes' errors, which counts every class that has images alike."""
        return 1 - self.macro("recall")

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over 15 bins: the mean gap of confidence and accuracy (Guo et al. 2017)."""
        bins = (self.confidence * 15).ceil().long().clamp(1, 15) - 1  # bin i holds (i/15, (i+1)/15]
        gap = self.right.double() - self.confidence.double()
        return float(torch.zeros(15, dtype=torch.float64).index_add_(0, bins, gap).abs().sum() / self.n)

    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary; keys as in docs/json.md."""
        dense = len(self.classes) <= MAX_CONFUSION
        return {
            "top1_error": self.top1_error,
            "top1_interval": list(wilson_interval(self.top1_error, self.n)),
            "top5_error": self.top5_error,
            "n": self.n,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
            "reliability": [each._asdict() for each in reliability_bins(self.confidence, self.right)],
            "balanced_error": self.balanced_error,
            **{figure: self.macro(figure) for figure in ("precision", "recall", "f1")},
            "per_class": [each.to_json() for each in self.per_class],
            "confusion": self.confusion.tolist() if dense else None,
        } | ({} if dense else {"confusion_counts": list(map(list, self.confusion_counts))})


def evaluate_network(
    net: Network,
    split: Split,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    device_config: DeviceConfig,
    temperature: float | None = None,
) -> ClassificationMetrics:
    """Evaluates a network on every image of a split, of any size, one crop each.

    The processes of `device_config.world` share the images; each returns the same.

    Args:
        temperature: of the figures. Without one the scores are kept however many they are, for a temperature to be fitted.
    """
    member, summary = Member.from_network(net, preprocessing, device_config), None
    if temperature is not None:
        summary = ScoreSummary.if_many(split.labels, len(classes), temperature=temperature)
    found = predict_scores([member], split, device_config, summary=summary)
    ((labels, scores),), skipped = drop_skipped(split, split.labels, found)
    if summary is not None:
        return ClassificationMetrics(classes, scores, labels, skipped=skipped)
    metrics = replace(ClassificationMetrics.from_scores(classes, scores, labels), skipped=skipped)
    return metrics if temperature is None else metrics.with_temperature(temperature)


def evaluate_errors(
    net: Network, split: Split, preprocessing: Preprocessing, device_config: DeviceConfig
) -> dict[str, float]:
    """Top-1 error and loss as `evaluate_network` gives them, without N x classes scores in memory."""
    member, summary = Member.from_network(net, preprocessing, device_config), ScoreSummary(split.labels)
    found = predict_scores([member], split, device_config, summary=summary)
    ((labels, kept),), _ = drop_skipped(split, split.labels, found)
    metrics = ClassificationMetrics((), kept, labels)
    return {"top1_error": metrics.top1_error, "loss": metrics.loss}


def mean_loss(true_scores: Tensor) -> float:
    """The mean cross entropy, in nats, of the scores of the images' classes, float32 (N,)."""
    return float(-take_logarithms(true_scores).mean())


def mean_of_known(values: Iterable[float | None]) -> float:
    """The mean of the values that are not None; 0 if there are none."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0


def describe_wide_columns(columns: Columns) -> list[str]:
    """A sentence on the columns with too many values for `ClassificationMetrics.errors_by_column`, if there are any."""
    counts = {column: len(np.unique(values.astype(str))) for column, values in columns.items()}
    wide = [f"{column} ({n:,})" for column, n in counts.items() if n > MAX_VALUES]
    note = f"errors by a column's values are given for up to {MAX_VALUES} values; without {format_list(wide)}"
    return [note] * bool(wide)


def wilson_interval(rate: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate observed on n trials.

    >>> [round(v, 3) for v in wilson_interval(0.0, 100)]
    [0.0, 0.037]
    """
    z = Z_95
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
