"""Confidence calibration: temperature scaling and the reliability diagram (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnetlab.errors import UsageError
from resnetlab.formatting import format_count, format_split

BINS = 15
MIN_IMAGES, FEW_IMAGES = 10, 100  # to fit a temperature on: fewer are refused, or noted
NONE = "none of these"  # in place of a class, where the best score is too low
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


class Bin(NamedTuple):
    """Predictions with a confidence in (low, high]: their number, mean confidence and accuracy."""

    low: float
    high: float
    n: int
    confidence: float | None  # None where the bin is empty
    accuracy: float | None


def reliability_bins(confidence: Tensor, right: Tensor) -> list[Bin]:
    """The predictions by confidence, in BINS equal bins; best scores (N,), and whether they are of the right class."""
    confidence, correct = confidence.double(), right.double()
    index = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    n = torch.bincount(index, minlength=BINS)
    sums = [torch.zeros(BINS, dtype=torch.float64).index_add_(0, index, value) for value in (confidence, correct)]
    means = [(total / n.clamp_min(1)).tolist() for total in sums]
    columns = zip(n.tolist(), *means, strict=True)
    return [Bin(i / BINS, (i + 1) / BINS, k, c if k else None, a if k else None) for i, (k, c, a) in enumerate(columns)]


def describe_calibration(temperature: float, calibration: Mapping[str, Any], protocol: str) -> str:
    """A sentence on the source of a temperature, and on its limits for scores by `protocol`."""
    if not calibration:
        if temperature == 1:
            return (
                "uncalibrated: no temperature was fitted, so scores may be overconfident; "
                "`evaluate --fit-temperature N` fits one on N of the images"
            )
        return f"temperature {temperature:.3f}; the model file does not say what it was fitted on"
    about = dict.fromkeys(("data", "split", "n", "protocol"), "?") | dict(calibration)
    count = format_count(about["n"], "image") if isinstance(about["n"], int) else f"{about['n']} images"
    images = f"{count} ({format_split(str(about['split'])).replace('_', '-')} of {about['data']})"
    text = f"temperature {temperature:.3f}, fitted on {images} by {about['protocol']}"
    if str(about["split"]).endswith("train"):
        text += ", which the network may have been trained on, so scores may be overconfident"
    if below := about.get("none_below"):
        text += f'; a best score below {below:.3f}, as {about["none_share"]:.0%} of these images have, is "{NONE}"'
    return text + (f"; used here for {protocol}, for which it was not fitted" if about["protocol"] != protocol else "")


def choose_none_below(scores: Tensor, share: float) -> float:
    """The score below which a prediction says "none of these": `share` of held-out images have a lower best score.

    So 1 - `share` of images like them get a class, as in Hendrycks and Gimpel (2017), who recognise strange images by the
    best score too.

    Args:
        scores: calibrated softmax (N, classes) of held-out images.
    """
    best = scores.double().max(1).values.sort().values
    return round(float(best[int(len(best) * share)]), 6)


def describe_few_images(n: int) -> list[str]:
    """A sentence where a temperature is fitted on few images; raises UsageError where they are too few to fit one."""
    few = format_count(n, "image")
    if n < MIN_IMAGES:
        raise UsageError(
            f"a temperature fitted on {few} means nothing; fit it on {FEW_IMAGES} or more, such as --fit-temperature 1000."
        )
    return [f"the temperature was fitted on only {few} and is uncertain; {FEW_IMAGES} or more are better"] * (
        n < FEW_IMAGES
    )


def fit_temperature(log_scores: Tensor, labels: Tensor) -> float:
    """The temperature with the lowest mean cross entropy of held-out images; logits are divided by it.

    The true class counts as (N + 1) / (N + 2) and the others share the rest, as in Platt (1999), so that N correct
    images do not make a network infinitely confident. Cross entropy is convex in 1 / temperature, so its slope is bisected.

    Args:
        log_scores: logits up to a constant for each image, (N, classes).
        labels: int64 (N,).
    """
    n, classes = log_scores.shape
    if n == 0 or classes == 1:
        return 1.0
    z = log_scores.double()
    targets = torch.full_like(z, 1 / (n + 2) / (classes - 1))
    targets[torch.arange(n), labels] = (n + 1) / (n + 2)
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE  # of 1 / temperature
    for _ in range(60):
        middle = (low + high) / 2
        slope = float((((middle * z).softmax(1) - targets) * z).sum(1).mean())
        low, high = (low, middle) if slope > 0 else (middle, high)
    return 2 / (low + high)
