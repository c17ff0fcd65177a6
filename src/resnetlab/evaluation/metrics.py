"""Figures of a set of predictions. Errors are fractions; intervals are Wilson's, at 95 %.

A test checks confusion and calibration against torchmetrics; importing that library takes longer than training on the digits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resnetlab.evaluation.calibration import reliability_bins


@dataclass(frozen=True, eq=False)
class ClassificationMetrics:
    """A network's scores for a split, and the figures computed from them.

    Attributes:
        scores: softmax, float32 (N, classes).
        labels: int64 (N,).
        loss: mean cross entropy, in nats.
        split: the name of the split in its data.
        skipped: name -> reason, of images that could not be read and are not among the N.
    """

    classes: tuple[str, ...]
    scores: Tensor
    labels: Tensor
    loss: float
    split: str = "test"
    skipped: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def from_scores(classes: tuple[str, ...], scores: Tensor, labels: Tensor) -> ClassificationMetrics:
        """The metrics of softmax scores (N, classes); a score of 0 counts as the smallest float32."""
        true_scores = scores[torch.arange(len(labels)), labels].clamp_min(torch.finfo(torch.float32).tiny)
        return ClassificationMetrics(classes, scores, labels, float(-true_scores.double().log().mean()))

    def with_temperature(self, temperature: float) -> ClassificationMetrics:
        """The same metrics with logits divided by `temperature`; for scores at temperature 1."""
        return ClassificationMetrics.from_scores(
            self.classes, (self.log_scores / temperature).softmax(1).float(), self.labels
        )

    @property
    def log_scores(self) -> Tensor:
        """Logits up to a constant for each image; float64 (N, classes)."""
        return self.scores.double().clamp_min(torch.finfo(torch.float32).tiny).log()

    @property
    def n(self) -> int:
        return len(self.labels)

    @property
    def predicted(self) -> Tensor:
        """The class with the highest score; int64 (N,)."""
        return self.scores.argmax(1)

    @property
    def top1_error(self) -> float:
        return self.top_error(1)

    @property
    def top5_error(self) -> float:
        return self.top_error(5)

    def top_error(self, k: int) -> float:
        """The share of images whose class is not among the k highest scores."""
        best = self.scores.topk(min(k, len(self.classes)), dim=1).indices  # (N, k)
        return int((best != self.labels[:, None]).all(1).sum()) / self.n

    @property
    def confusion(self) -> Tensor:
        """Counts, int64 (classes, classes): rows are true classes, columns predicted ones."""
        k = len(self.classes)
        return torch.bincount(self.labels * k + self.predicted, minlength=k * k).view(k, k)

    @property
    def calibration_error(self) -> float:
        """Expected calibration error over 15 bins: the mean gap of confidence and accuracy (Guo et al. 2017)."""
        confidence, predicted = self.scores.max(1)
        bins = (confidence * 15).ceil().long().clamp(1, 15) - 1  # bin i holds (i/15, (i+1)/15]
        gap = (predicted == self.labels).double() - confidence.double()
        return float(torch.zeros(15, dtype=torch.float64).index_add_(0, bins, gap).abs().sum() / self.n)

    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary; keys as in docs/json.md."""
        confusion = self.confusion
        per_class = [
            {
                "class": name,
                "n": int(row.sum()),
                "top1_error": int(row.sum() - row[i]) / int(row.sum()) if row.sum() else None,
            }
            for i, (name, row) in enumerate(zip(self.classes, confusion, strict=True))
        ]
        return {
            "top1_error": self.top1_error,
            "top1_interval": list(wilson_interval(self.top1_error, self.n)),
            "top5_error": self.top5_error,
            "n": self.n,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
            "reliability": [each._asdict() for each in reliability_bins(self.scores, self.labels)],
            "per_class": per_class,
            "confusion": confusion.tolist(),
        }


def wilson_interval(rate: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate observed on n trials.

    >>> [round(v, 3) for v in wilson(0.0, 100)]
    [0.0, 0.037]
    """
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
