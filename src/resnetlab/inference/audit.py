"""Audits the labels of a data set: images whose class is likely wrong, by a model's features or by cross-validation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnetlab.data import sources
from resnetlab.device import standard_torch_state
from resnetlab.errors import DataError, unknown_name_error, warn
from resnetlab.evaluation.label_errors import FOLDS, METHODS, out_of_fold_scores
from resnetlab.formatting import format_count, format_percent
from resnetlab.inference.embed import embed_data, list_labelled
from resnetlab.inference.predict import Model, load
from resnetlab.run_folder import FOLDS_FILE, RunFolder

MAX_ERROR = 0.2  # out of fold, up to which the list is mostly right: at 0.24 a quarter of it was (docs/log.md)


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        n: labelled images that could be read.
        method: by whose rule, of `evaluation.label_errors.METHODS`.
        errors: the likely label errors, the most certain first: "image", "split", "class", "likely", "score", "likely_score".
        unreadable: name -> reason.
        out_of_fold_error: of the linear heads, or the networks of a cross-validation: it bounds what the audit can see.
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
            f"Out of fold {format_percent(self.out_of_fold_error)} of the images are taken for another class, so "
            "many of these labels may be right; take a model that knows such images."
        )

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return dict(vars(self))


class OutOfFold(NamedTuple):
    """Out-of-fold scores, float64 (N, classes), of images, (name, split) each, with their labels, int64 (N,)."""

    images: list[tuple[str, str]]
    classes: Sequence[str]
    labels: Tensor
    scores: Tensor
    folds: int
    unreadable: dict[str, str]


@standard_torch_state()
def audit_labels(
    model: Model | Path,
    data: str | Path,
    data_dir: Path = Path("data"),
    folds: int = FOLDS,
    seed: int = 0,
    method: str = "resnetlab",
) -> Audit:
    """Finds likely label errors by confident learning on out-of-fold predictions.

    Args:
        model: linear heads are fitted on its features; those of a model that learned from the same labels have memorised some
            errors. The folder of a cross-validation has none that did: each image gets the scores of the network that did not
            learn from it, and `folds` and `seed` are not used.

    Raises DataError if the data have no labels, or a class with fewer than two images, or none that a fold held out; UsageError
    for an unknown method, or one whose package is missing.
    """
    if method not in METHODS:
        raise unknown_name_error("method", method, METHODS)
    if isinstance(model, Path):
        found = _score_by_runs(model, str(data), data_dir)
    else:
        found = _score_by_heads(model, data, data_dir, folds, seed)
    errors = [
        {
            "image": found.images[each.position][0],
            "split": found.images[each.position][1],
            "class": found.classes[each.given],
            "likely": found.classes[each.likely],
            "score": each.given_score,
            "likely_score": each.likely_score,
        }
        for each in METHODS[method](found.scores, found.labels)
    ]
    wrong = float((found.scores.argmax(1) != found.labels).double().mean())
    name = sources.strip_signature(str(data))
    return Audit(name, len(found.labels), found.folds, method, wrong, errors, found.unreadable)


def _score_by_heads(model: Model, data: str | Path, data_dir: Path, folds: int, seed: int) -> OutOfFold:
    """Predictions of linear heads on the model's features."""
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
    unreadable = {row.image: row.error for row in rows if row.features is None}
    return OutOfFold([(row.image, row.split) for row in labelled], classes, labels, scores, folds, unreadable)


def _score_by_runs(folder: Path, data: str, data_dir: Path) -> OutOfFold:
    """Predictions of each run of a cross-validation for the images that it held out to the end."""
    source = sources.load_dataset(data, data_dir)
    images = {name: (split, label, image) for name, (split, label, image) in list_labelled(source)}
    found, labels, rows, unreadable = list[tuple[str, str]](), list[int](), list[list[float]](), dict[str, str]()
    summary = RunFolder(folder).read_json(FOLDS_FILE) or {}
    runs = [folder / Path(each["run"]).name for each in summary["runs"]]
    for run in runs:
        model = load(run / "model.safetensors", precision="auto")
        if set(model.classes) != set(source.classes):
            raise DataError(f"{run} was trained on other classes than those of {data}; give the data of its runs.")
        held_out = [name for name in (RunFolder(run).read_json("holdout.json") or {})["held-out"] if name in images]
        pairs = ((name, images[name][2]) for name in held_out)
        for prediction in model.named_predictions(pairs, top=len(model.classes)):
            name = prediction.name
            if prediction.error:
                unreadable[name] = prediction.error
                continue
            score_of = {each.label: each.score for each in prediction.top}
            found.append((name, images[name][0]))
            labels.append(source.classes.index(images[name][1]))
            rows.append([score_of[label] for label in source.classes])
    if not rows:
        raise DataError(f"no fold of {folder} held out an image of {data}; give the data of its runs.")
    if left := len(images) - len(rows) - len(unreadable):
        warn(f"{format_count(left, 'image')} of {data} that no fold of {folder} held out: not audited.")
    scores = torch.tensor(rows, dtype=torch.float64)
    return OutOfFold(found, source.classes, torch.tensor(labels), scores, len(runs), unreadable)
