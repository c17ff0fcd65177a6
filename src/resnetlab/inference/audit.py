"""Audits the labels of a data set: images whose class is likely wrong, by a model's features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resnetlab.data import sources
from resnetlab.device import standard_torch_state
from resnetlab.errors import DataError, unknown_name_error
from resnetlab.evaluation.label_errors import FOLDS, METHODS, out_of_fold_scores
from resnetlab.formatting import format_percent
from resnetlab.inference.embed import embed_data
from resnetlab.inference.predict import Model

MAX_ERROR = 0.2  # out of fold, up to which the list is mostly right: at 0.24 a quarter of it was (docs/log.md)


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        n: labelled images that could be read.
        method: by whose rule, of `evaluation.label_errors.METHODS`.
        errors: the likely label errors, the most certain first: "image", "split", "class", "likely", "score", "likely_score".
        unreadable: name -> reason.
        out_of_fold_error: of the linear heads, which bounds what the audit can see.
    """

    data: str
    n: int
    folds: int
    method: str
    out_of_fold_error: float
    errors: list[dict[str, Any]]
    unreadable: dict[str, str]

    def describe_doubt(self) -> str:
        """Why many of the listed labels may be right; "" where the features tell the classes apart."""
        if self.out_of_fold_error <= MAX_ERROR:
            return ""
        return (
            f"By the model's features {format_percent(self.out_of_fold_error)} of the images are taken for another class, so "
            "many of these labels may be right; take a model that knows such images."
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return dict(vars(self))


@standard_torch_state()
def audit_labels(
    model: Model,
    data: str | Path,
    data_dir: Path = Path("data"),
    folds: int = FOLDS,
    seed: int = 0,
    method: str = "resnetlab",
) -> Audit:
    """Finds likely label errors by confident learning on out-of-fold predictions of linear heads on the model's features.

    Features of a model that was trained on the same labels for long may have memorised some of the errors.

    Raises DataError if the data have no labels, or a class with fewer than two images; UsageError for an unknown method, or one
    whose package is missing.
    """
    if method not in METHODS:
        raise unknown_name_error("method", method, METHODS)
    rows = list(embed_data(model, data, data_dir))
    labelled = [row for row in rows if row.features is not None and row.label]
    if not labelled:
        raise DataError(
            f"{data} has no labelled image that can be read; an audit needs class folders or a table of labels."
        )
    classes = sorted({row.label for row in labelled})
    labels = torch.tensor([classes.index(row.label) for row in labelled])
    features = torch.stack([row.features for row in labelled if row.features is not None])
    scores = out_of_fold_scores(features, labels, folds, seed)
    errors = [
        {
            "image": labelled[each.position].image,
            "split": labelled[each.position].split,
            "class": classes[each.given],
            "likely": classes[each.likely],
            "score": each.given_score,
            "likely_score": each.likely_score,
        }
        for each in METHODS[method](scores, labels)
    ]
    wrong = float((scores.argmax(1) != labels).double().mean())
    unreadable = {row.image: row.error for row in rows if row.features is None}
    return Audit(sources.strip_signature(str(data)), len(labelled), folds, method, wrong, errors, unreadable)
