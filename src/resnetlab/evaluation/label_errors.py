"""Likely label errors by confident learning (Northcutt et al. 2021, arXiv 1911.00068) on out-of-fold predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.device import standard_torch_state
from resnetlab.errors import DataError, missing_package
from resnetlab.random import seed_for

FOLDS = 5
DECAYS = (1e-3, 1e-2, 1e-1)  # L2 penalties that are tried, per image
CLEAR_MARGIN = 0.5  # by which a score exceeds the label's if that is no matter of doubt (docs/log.md has measurements)


class LabelError(NamedTuple):
    """An image whose label is likely wrong: its position, its class, the class it looks like, and both scores."""

    position: int
    given: int
    likely: int
    given_score: float
    likely_score: float


@standard_torch_state()
def out_of_fold_scores(features: Tensor, labels: Tensor, folds: int = FOLDS, seed: int = 0) -> Tensor:
    """Scores of every image by a linear head that was fitted without it, float64 (N, classes).

    The heads are fitted twice, the second time without the images that the first heads predict as of another class than their
    label: wrong labels bend a head towards themselves, and so hide each other.

    Args:
        features: (N, C).
        labels: int64 (N,), 0 to K - 1.

    Raises DataError where a class has fewer than two images, or there is one class only.
    """
    counts = torch.bincount(labels)
    if len(counts) < 2 or int(counts.min()) < 2:
        raise DataError("an audit needs two classes or more, each with two images or more.")
    draw = torch.Generator().manual_seed(seed_for(seed, "audit"))
    order = torch.randperm(len(labels), generator=draw)
    order = order[labels[order].argsort(stable=True)]  # each class is spread over all folds
    fold = torch.empty_like(labels)
    fold[order] = torch.arange(len(labels)) % folds
    scores = _score_folds(features, labels, fold, torch.ones_like(labels, dtype=torch.bool))
    trusted = scores.argmax(1) == labels
    lost = torch.bincount(labels[trusted], minlength=len(counts)) < 2  # classes that only their labels can teach
    return _score_folds(features, labels, fold, trusted | lost[labels])


def _score_folds(features: Tensor, labels: Tensor, fold: Tensor, trusted: Tensor) -> Tensor:
    """Scores of each fold by a head that was fitted on the trusted images of the others."""
    classes = int(labels.max()) + 1
    scores = torch.zeros(len(labels), classes, dtype=torch.float64)
    for i in range(int(fold.max()) + 1):
        inside, outside = (fold != i) & trusted, fold == i
        scores[outside] = _fit_head(features[inside].double(), labels[inside], features[outside].double(), classes)
    return scores


def _fit_head(x: Tensor, labels: Tensor, other: Tensor, classes: int) -> Tensor:
    """Softmax scores of `other` by multinomial logistic regression on x; its penalty is the best on a tenth of x."""
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, other = ((each - mean) / std for each in (x, other))
    held_out = torch.arange(len(x)) % 10 == 0
    losses = {}
    for decay in DECAYS:
        weight, bias = _minimise(x[~held_out], labels[~held_out], classes, decay)
        losses[decay] = float(F.cross_entropy(x[held_out] @ weight + bias, labels[held_out]))
    weight, bias = _minimise(x, labels, classes, min(losses, key=lambda decay: losses[decay]))
    return (other @ weight + bias).softmax(1)


def _minimise(x: Tensor, labels: Tensor, classes: int, decay: float) -> tuple[Tensor, Tensor]:
    """Weight (C, classes) and bias of the least penalised cross entropy, by L-BFGS; the problem is convex."""
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight + bias, labels) + decay * weight.square().sum() / 2
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def find_label_errors(scores: Tensor, labels: Tensor) -> list[LabelError]:
    """The images that are predicted as of another class than their label, the most certain first, as many as are wrong (§3).

    Their number is that outside the diagonal of the calibrated confident joint: the confident predictions, whose score reaches
    the mean score that images labelled as that class have for it, are counted and scaled to the number of images of each label.
    All pairs of classes are taken together, since one pair alone often has too few to count. All whose score exceeds their
    label's by CLEAR_MARGIN are listed, if those are more: a network that learned from the labels has memorised some wrong ones
    and is less confident of such images, so that too few are counted.

    Args:
        scores: out of fold, (N, classes).
        labels: int64 (N,).
    """
    n, classes = scores.shape
    given_scores = scores[torch.arange(n), labels]
    counts = torch.bincount(labels, minlength=classes).to(scores)
    own = torch.zeros_like(counts).index_add_(0, labels, given_scores) / counts.clamp_min(1)
    likely_scores, likely = scores.max(1)
    confident = likely_scores >= own[likely]
    confident_of, confidently_wrong = (
        torch.bincount(labels[chosen], minlength=classes) for chosen in (confident, confident & (likely != labels))
    )
    number = round(float((confidently_wrong / confident_of.clamp_min(1) * counts).sum()))
    margins = likely_scores - given_scores
    number = max(number, int((margins > CLEAR_MARGIN).sum()))
    order = (-margins).argsort(stable=True)
    return _list_errors(order[(likely != labels)[order]][:number].tolist(), scores, labels, likely)


def _list_errors(positions: list[int], scores: Tensor, labels: Tensor, likely: Tensor) -> list[LabelError]:
    """The errors at some positions; `likely` are the classes that the images look like, int64 (N,)."""
    return [
        LabelError(i, int(labels[i]), int(likely[i]), float(scores[i, labels[i]]), float(scores[i, likely[i]]))
        for i in positions
    ]


def find_label_errors_by_cleanlab(scores: Tensor, labels: Tensor) -> list[LabelError]:
    """The images that cleanlab's `find_label_issues` prunes by noise rate, its least confident labels first.

    Arguments as those of `find_label_errors`. Raises UsageError if cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError as error:
        raise missing_package("--method cleanlab", error.name, "audit") from error
    found = find_label_issues(labels.numpy(), scores.numpy(), return_indices_ranked_by="self_confidence", n_jobs=1)
    others = scores.scatter(1, labels[:, None], -1)  # without the score of the label
    return _list_errors(found.tolist(), scores, labels, others.max(1).indices)


METHODS: Mapping[str, Callable[[Tensor, Tensor], list[LabelError]]] = {
    "resnetlab": find_label_errors,
    "cleanlab": find_label_errors_by_cleanlab,
}
