"""Figures of predictions of several classes per image, or none, and the thresholds above which a class is predicted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resnetlab.data.dataset import Split
from resnetlab.device import DeviceConfig
from resnetlab.evaluation.metrics import ClassMetrics, mean_of_known
from resnetlab.evaluation.scores import Member, drop_skipped, predict_scores, take_logarithms
from resnetlab.models.own_network import Network
from resnetlab.preprocessing import Preprocessing

DEFAULT_THRESHOLD, MARGIN = 0.5, 1e-6  # no threshold is nearer to 0 or 1


@dataclass(frozen=True, eq=False)
class MultiLabelMetrics:
    """A network's scores for a split, and the figures computed from them.

    Attributes:
        scores: sigmoid, float32 (N, classes).
        truth: whether an image has a class, bool (N, classes).
        thresholds: a class is predicted where its score is this or more, float (classes,).
        split: the name of the split in its data.
        skipped: name -> reason, of images that could not be read and are not among the N.
    """

    classes: tuple[str, ...]
    scores: Tensor
    truth: Tensor
    thresholds: tuple[float, ...]
    split: str = "test"
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"mean average precision {self.mean_ap:.3f}"

    @property
    def n(self) -> int:
        return len(self.truth)

    @cached_property
    def predicted(self) -> Tensor:
        """The classes over their thresholds; bool (N, classes)."""
        return self.scores.double() >= torch.tensor(self.thresholds, dtype=torch.float64)

    @cached_property
    def per_class(self) -> list[ClassMetrics]:
        """The counts and figures of every class, in the order of `classes`."""
        columns = ((each.sum(0)).tolist() for each in (self.truth, self.truth & self.predicted, self.predicted))
        return [ClassMetrics(*row) for row in zip(self.classes, *columns, strict=True)]

    @cached_property
    def average_precisions(self) -> list[float | None]:
        """The average precision of every class; None for one without an image."""
        return [average_precision(self.scores[:, i], self.truth[:, i]) for i in range(len(self.classes))]

    @property
    def mean_ap(self) -> float:
        """The mean average precision over the classes that have images; 0 where none has."""
        known = [value for value in self.average_precisions if value is not None]
        return math.fsum(known) / len(known) if known else 0.0

    def macro(self, figure: str) -> float:
        """The mean of "precision", "recall" or "f1" over the classes that have images; 0 for a class never predicted."""
        return mean_of_known(getattr(each, figure) or 0.0 for each in self.per_class if each.n)

    @property
    def micro_f1(self) -> float:
        """F1 of all decisions together; 0 where nothing is predicted and nothing is there."""
        right, n, predicted = (sum(getattr(c, key) for c in self.per_class) for key in ("right", "n", "predicted"))
        return 2 * right / (n + predicted) if n + predicted else 0.0

    @property
    def label_error(self) -> float:
        """The share of wrong decisions, one per image and class."""
        return float((self.predicted != self.truth).double().mean())

    @property
    def set_error(self) -> float:
        """The share of images whose classes are not all right."""
        return float((self.predicted != self.truth).any(1).double().mean())

    @property
    def loss(self) -> float:
        """Mean binary cross entropy, in nats; a probability of 0 counts as the smallest float32."""
        p = torch.where(self.truth, self.scores.double(), 1 - self.scores.double())
        return float(-take_logarithms(p).mean())

    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary; keys as in docs/json.md."""
        rows = zip(self.per_class, self.average_precisions, self.thresholds, strict=True)
        return {
            "mean_ap": self.mean_ap,
            **{figure: self.macro(figure) for figure in ("precision", "recall", "f1")},
            "micro_f1": self.micro_f1,
            "label_error": self.label_error,
            "set_error": self.set_error,
            "n": self.n,
            "loss": self.loss,
            "per_class": [
                {"class": c.name, "n": c.n, "predicted": c.predicted, "ap": ap, "threshold": threshold}
                | {"precision": c.precision, "recall": c.recall, "f1": c.f1}
                for c, ap, threshold in rows
            ],
        }

    def tabulate(self, names: Sequence[str]) -> dict[str, list[Any]]:
        """Columns: image, true and predicted classes, whether all are right, and the score of every class."""
        scores = {f"score: {name}": self.scores[:, i].double().tolist() for i, name in enumerate(self.classes)}
        return {
            "image": list(names),
            "true": [";".join(self._names(row)) for row in self.truth],
            "predicted": [";".join(self._names(row)) for row in self.predicted],
            "right": (self.predicted == self.truth).all(1).tolist(),
        } | scores

    def _names(self, row: Tensor) -> list[str]:
        return [self.classes[i] for i in row.nonzero().flatten().tolist()]


def evaluate_label_sets(
    net: Network,
    split: Split,
    truth: Tensor,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    device_config: DeviceConfig,
) -> MultiLabelMetrics:
    """Every image of a split by one crop, at thresholds of one half; `truth` is bool (N, classes).

    The processes of `device_config.world` share the images; each returns the same.
    """
    member = Member.from_network(net, preprocessing, device_config, multi_label=True)
    ((truth, scores),), skipped = drop_skipped(split, truth, predict_scores([member], split, device_config))
    return MultiLabelMetrics(classes, scores, truth, (DEFAULT_THRESHOLD,) * len(classes), skipped=skipped)


def average_precision(scores: Tensor, truth: Tensor) -> float | None:
    """The sum over thresholds of precision times the gain in recall, as scikit-learn's; images of equal scores count together.

    Args:
        scores: (N,).
        truth: bool (N,).

    Returns None if nothing is true.
    """
    if not bool(truth.any()):
        return None
    order = scores.argsort(descending=True, stable=True)
    values, right = scores[order], truth[order].double().cumsum(0)
    last = torch.cat([values[1:] != values[:-1], torch.tensor([True])])  # of each group of equal scores
    right, count = right[last], torch.arange(1, len(values) + 1, dtype=torch.float64)[last]
    gain = right.diff(prepend=torch.zeros(1, dtype=torch.float64)) / right[-1]
    return float((right / count * gain).sum())


def fit_thresholds(scores: Tensor, truth: Tensor) -> tuple[float, ...]:
    """For each class the threshold with the highest F1 on held-out images; of equal ones that nearest to one half.

    It is midway between two scores. A class that no image has keeps one half.

    Args:
        scores: sigmoid (N, classes).
        truth: bool (N, classes).
    """
    return tuple(_fit_threshold(scores[:, i].double(), truth[:, i]) for i in range(scores.shape[1]))


def _fit_threshold(scores: Tensor, truth: Tensor) -> float:
    if not bool(truth.any()):
        return DEFAULT_THRESHOLD
    values = torch.unique(scores)  # ascending
    candidates = torch.cat([values[:1] / 2, (values[1:] + values[:-1]) / 2])
    first = torch.searchsorted(values, scores)  # of each image, the highest candidate that it is over
    n = torch.bincount(first, minlength=len(values)).flip(0).cumsum(0).flip(0)  # images over each candidate
    right = torch.bincount(first[truth], minlength=len(values)).flip(0).cumsum(0).flip(0)
    f1 = 2 * right.double() / (n + truth.sum()).double()
    f1[(candidates < MARGIN) | (candidates > 1 - MARGIN)] = -1
    best = (f1 == f1.max()).nonzero().flatten()
    nearest = best[(candidates[best] - DEFAULT_THRESHOLD).abs().argmin()]
    return float(candidates[nearest]) if float(f1[nearest]) >= 0 else DEFAULT_THRESHOLD


def describe_thresholds(calibration: Mapping[str, Any]) -> str:
    """What a model's thresholds were fitted on, from its `calibration`."""
    if not calibration:
        return f"{DEFAULT_THRESHOLD} for every class, since too few images were held out to fit them"
    about = dict.fromkeys(("data", "split", "n"), "?") | dict(calibration)
    return f"the highest F1 of each class on {about['n']} images ({str(about['split']).replace('_', '-')} of {about['data']})"
