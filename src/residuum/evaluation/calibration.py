"""How far a network's scores can be taken at their word: temperature scaling and the reliability diagram (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

BINS = 15
COLDEST, HOTTEST = 0.05, 20.0


class Bin(NamedTuple):
    """Predictions with a confidence in (low, high]: how many, how confident and how often right on average."""

    low: float
    high: float
    n: int
    confidence: float | None  # None where the bin is empty
    accuracy: float | None


def reliability(scores: Tensor, labels: Tensor) -> list[Bin]:
    """The predictions by confidence, in BINS equal steps; scores are softmax (N, classes), labels int64 (N,)."""
    confidence, predicted = scores.double().max(1)
    right = (predicted == labels).double()
    where = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    n = torch.bincount(where, minlength=BINS)
    sums = [torch.zeros(BINS, dtype=torch.float64).index_add_(0, where, value) for value in (confidence, right)]
    means = [(total / n.clamp_min(1)).tolist() for total in sums]
    columns = zip(n.tolist(), *means, strict=True)
    return [Bin(i / BINS, (i + 1) / BINS, k, c if k else None, a if k else None) for i, (k, c, a) in enumerate(columns)]


def provenance(temperature: float, calibration: Mapping[str, Any], protocol: str) -> str:
    """A sentence on where a temperature comes from, and what there is to mind where scores by `protocol` are read."""
    if not calibration:
        if temperature == 1:
            return "uncalibrated: no temperature was fitted, so scores may be surer than they should be"
        return f"temperature {temperature:.3f}; the model file does not say on what it was fitted"
    about = dict.fromkeys(("data", "split", "n", "protocol"), "?") | dict(calibration)
    n = f"{about['n']:,}" if isinstance(about["n"], int) else about["n"]
    pictures = f"{n} pictures ({str(about['split']).replace('_', '-')} of {about['data']})"
    text = f"temperature {temperature:.3f}, fitted on {pictures} by {about['protocol']}"
    if str(about["split"]).endswith("train"):
        text += ", from which the network may have learnt, so scores may be surer than they should be"
    return text + (f"; used here for {protocol}, for which it was not fitted" if about["protocol"] != protocol else "")


def fit_temperature(log_scores: Tensor, labels: Tensor) -> float:
    """The temperature by which logits are divided so that held-out pictures are least surprising (mean cross entropy).

    The true class counts as (N + 1) / (N + 2) and the others share the rest, as in Platt (1999), so that N pictures that are
    all right do not make a network certain of everything. Cross entropy is convex in 1 / temperature, so its slope is bisected.

    Args:
        log_scores: logits up to a constant for each picture, (N, classes).
        labels: int64 (N,).
    """
    n, classes = log_scores.shape
    if n == 0 or classes == 1:
        return 1.0
    z = log_scores.double()
    wanted = torch.full_like(z, 1 / (n + 2) / (classes - 1))
    wanted[torch.arange(n), labels] = (n + 1) / (n + 2)
    low, high = 1 / HOTTEST, 1 / COLDEST  # of 1 / temperature
    for _ in range(60):
        middle = (low + high) / 2
        slope = float((((middle * z).softmax(1) - wanted) * z).sum(1).mean())
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 2 / (low + high)
