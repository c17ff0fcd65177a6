"""A detector's or segmenter's model file put to use: judged on data, and asked about pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from residuum.data import boxes, masks
from residuum.data.decode import decode
from residuum.data.parts import Marked, Parts
from residuum.errors import DataError, UsageError, unknown
from residuum.evaluation import drawing
from residuum.evaluation.boxes import Found, needed
from residuum.evaluation.boxes import judge as boxes_judged
from residuum.evaluation.detections import find, find_in
from residuum.evaluation.masks import judge as masks_judged
from residuum.evaluation.masks import segment
from residuum.models.dense_file import DenseBundle, load_dense
from residuum.models.values import Additions, Detector, Segmenter
from residuum.runtime import Engine, pick_engine

P = TypeVar("P", bound=Marked)


def load(model: Path, task: str, precision: str, device: str) -> tuple[DenseBundle, Engine]:
    """A model file of a task on the device; raises ModelFileError, UsageError."""
    bundle = load_dense(model, task)
    engine = pick_engine(precision, device)
    bundle.net = engine.place(bundle.net)
    return bundle, engine


def chosen(data: Parts[P], split: str) -> tuple[str, Sequence[P]]:
    """A split by its name or as "test", what the data are judged by: (its own name, pictures). Raises UsageError."""
    splits = data.splits | {"test": data.test}
    if split not in splits:
        raise unknown("split", split, splits)
    return data.judged if split == "test" else split, splits[split]


def evaluate_boxes(
    model: Path,
    data: Path,
    *,
    split: str = "test",
    testing: Additions | None = None,
    on_bad: str = "stop",
    precision: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Judges a detector on a split of boxes; classes are matched by name. Gives what `residuum detect evaluate --json` prints.

    Args:
        split: "test" is what the data are judged by, whatever it is called.
        testing: the paper's additions; None for none.

    Raises:
        ModelFileError, DataError, UsageError: see residuum.errors.
    """
    testing = testing or Additions()
    needed()
    bundle, engine = load(model, "detect", precision, device)
    found_data = boxes.load(data, on_bad)
    places = _places(found_data.classes, bundle.classes, data, model)
    name, pictures = chosen(found_data, split)
    truth = [boxes.relabelled(picture, torch.tensor(places)) for picture in pictures]
    skipped = dict(found_data.skipped)
    readable, found = find(bundle.net, truth, engine, testing, on_bad, skipped, progress)
    about = {
        "model": str(model),
        "data": str(data),
        "split": name,
        "scales": list(testing.sides),
        "refine": testing.refine,
        "context": cast(Detector, bundle.values).context,
    }
    figures = boxes_judged(readable, found, bundle.classes).to_json()
    return about | figures | ({"skipped": skipped} if skipped else {})


def evaluate_masks(
    model: Path,
    data: Path,
    *,
    split: str = "test",
    on_bad: str = "stop",
    precision: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Judges a segmenter on a split of masks. Gives what `residuum segment evaluate --json` prints.

    Raises:
        ModelFileError, DataError, UsageError: see residuum.errors.
    """
    bundle, engine = load(model, "segment", precision, device)
    found = masks.load(data, on_bad)
    if found.classes != bundle.classes:
        raise DataError(
            f"{data} has the classes {', '.join(found.classes)}, {model} knows {', '.join(bundle.classes)}; "
            "give the same names, in the same order, to both."
        )
    name, pictures = chosen(found, split)
    skipped, values = dict(found.skipped), cast(Segmenter, bundle.values)
    judgement = masks_judged(bundle.net, pictures, bundle.classes, values, engine, on_bad, skipped, progress)
    about = {"model": str(model), "data": str(data), "split": name}
    return about | judgement.to_json() | ({"skipped": skipped} if skipped else {})


def _places(theirs: Sequence[str], ours: Sequence[str], data: Path, model: Path) -> list[int]:
    """Where the data's classes stand among the model's; raises DataError for one that it does not know."""
    if strange := [name for name in theirs if name not in ours]:
        raise DataError(f"{data} has the class {strange[0]}, {model} knows only {', '.join(ours)}.")
    return [list(ours).index(name) for name in theirs]


@dataclass(frozen=True)
class Answer:
    """What is on one picture, or why it cannot be told."""

    name: str
    said: dict[str, Any] = field(default_factory=dict)
    drawn: Image.Image | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return {"image": self.name} | ({"error": self.error} if self.error else self.said)


def detections(
    bundle: DenseBundle, engine: Engine, files: Sequence[Path], testing: Additions, least: float
) -> Iterator[Answer]:
    """What is on each picture, boxes of a score of at least `least`; one that cannot be read becomes its error."""
    if not 0 <= least <= 1:
        raise UsageError(f"--score must be from 0 to 1, not {least}.")
    for file in files:
        try:
            pixels = as_pixels(decode(file))
        except DataError as error:
            yield Answer(str(file), error=str(error))
            continue
        found = find_in(bundle.net, pixels, engine, testing).at_least(least)
        drawn = drawing.boxes_on(pixels, found, bundle.classes)
        yield Answer(str(file), {"boxes": listed(found, bundle.classes)}, drawn)


def segmentations(bundle: DenseBundle, engine: Engine, files: Sequence[Path]) -> Iterator[Answer]:
    """The share of each class on each picture, and the picture tinted by class; one that cannot be read becomes its error."""
    for file in files:
        try:
            pixels = as_pixels(decode(file))
        except DataError as error:
            yield Answer(str(file), error=str(error))
            continue
        mask = segment(bundle.net, pixels, cast(Segmenter, bundle.values), engine)
        yield Answer(str(file), {"classes": shares(mask, bundle.classes)}, drawing.mask_on(pixels, mask))


def listed(found: Found, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Each box as class, score and [x1, y1, x2, y2] in pixels."""
    rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    return [
        {"class": classes[label], "score": round(score, 4), "box": [round(v, 1) for v in box]}
        for box, score, label in rows
    ]


def shares(mask: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The share of each class in a mask, int64 (H, W)."""
    counts = torch.bincount(mask.flatten(), minlength=len(classes)).tolist()
    return [{"class": c, "share": round(n / mask.numel(), 6)} for c, n in zip(classes, counts, strict=True)]


def as_pixels(picture: Image.Image) -> Tensor:
    """A PIL picture of any mode as uint8 (H, W, 3)."""
    return torch.from_numpy(np.array(picture.convert("RGB")))
