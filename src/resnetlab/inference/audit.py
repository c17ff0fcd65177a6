"""Audits the labels of a data set: images whose class is likely wrong, by a model's features or by cross-validation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from resnetlab.inference.embed import EmbeddingRow, embed_data, read_encoded_image
from resnetlab.inference.predict import Model, Prediction, load
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
    count: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Audit:
    """Finds likely label errors by confident learning on out-of-fold predictions.

    Args:
        model: linear heads are fitted on its features; those of a model that learned from the same labels have memorised some
            errors. The folder of a cross-validation has none that did: each image gets the scores of the network that did not
            learn from it, and `folds` and `seed` are not used.
        count: passes images on as they are computed, and may show how many.

    Raises DataError if the data have no labels, or a class with fewer than two images, or none that a fold held out; UsageError
    for an unknown method, or one whose package is missing.
    """
    if method not in METHODS:
        raise unknown_name_error("method", method, METHODS)
    if isinstance(model, Path):
        found = _score_by_runs(model, str(data), data_dir, count)
    else:
        found = _score_by_heads(list(count(embed_data(model, data, data_dir))), data, folds, seed)
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


def _score_by_heads(rows: Sequence[EmbeddingRow], data: str | Path, folds: int, seed: int) -> OutOfFold:
    """Predictions of linear heads on the features of a model."""
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


def _score_by_runs(
    folder: Path, data: str, data_dir: Path, count: Callable[[Iterable[Any]], Iterable[Any]]
) -> OutOfFold:
    """Predictions of each run of a cross-validation for the images that it held out to the end."""
    source = sources.load_dataset(data, data_dir)
    splits = {"all": source.all_images} if source.all_images is not None else source.splits
    places = {split.name_of(i): (name, i) for name, split in splits.items() for i in range(len(split))}
    held_out_of = _read_held_out(folder)
    found, labels, rows, unreadable = list[tuple[str, str]](), list[int](), list[list[float]](), dict[str, str]()

    def predict() -> Iterator[Prediction]:
        for run, names in held_out_of.items():
            model = load(run / "model.safetensors", precision="auto")
            if set(model.classes) != set(source.classes):
                raise DataError(f"{run} was trained on other classes than those of {data}; give the data of its runs.")
            held_out = ((name, places[name]) for name in names if name in places)
            images = ((name, read_encoded_image(splits[split], i)) for name, (split, i) in held_out)
            yield from model.named_predictions(images, top=len(model.classes))

    for prediction in count(predict()):
        name = prediction.name
        if prediction.error:
            unreadable[name] = prediction.error
            continue
        score_of = {each.label: each.score for each in prediction.top}
        split, i = places[name]
        found.append((name, split))
        labels.append(int(splits[split].labels[i]))
        rows.append([score_of[label] for label in source.classes])
    if not rows:
        raise DataError(f"no fold of {folder} held out an image of {data}; give the data of its runs.")
    if left := len(places) - len(rows) - len(unreadable):
        warn(f"{format_count(left, 'image')} of {data} that no fold of {folder} held out: not audited.")
    scores = torch.tensor(rows, dtype=torch.float64)
    return OutOfFold(found, source.classes, torch.tensor(labels), scores, len(held_out_of), unreadable)


def _read_held_out(folder: Path) -> dict[Path, list[str]]:
    """The runs of a cross-validation, and the names of the images that each held out."""
    summary = RunFolder(folder).read_json(FOLDS_FILE) or {}
    runs = [folder / Path(each["run"]).name for each in summary.get("runs", ())]
    held_out = {run: (RunFolder(run).read_json("holdout.json") or {}).get("held-out") for run in runs}
    if lacking := [run for run, names in held_out.items() if names is None] or ([] if runs else [folder]):
        raise DataError(
            f"{lacking[0]} does not say which images it held out; train the folds again, or give a model file."
        )
    return {run: names for run, names in held_out.items() if names is not None}
