"""Pictures with boxes in a folder, in Pascal VOC's form (`data.voc`) or COCO's (`data.coco`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from residuum.data import coco, voc
from residuum.data.annotated import Annotated
from residuum.data.parts import Checker, Parts, arrange
from residuum.errors import DataError


def load(root: Path, on_bad: str = "stop") -> Parts[Annotated]:
    """The annotated pictures in a folder: Pascal VOC's (Annotations/, JPEGImages/) or COCO's (a JSON a split).

    Args:
        on_bad: "stop" at what cannot be right, or "skip" it: left out, and listed by name.

    Raises:
        DataError: nothing of that form, files that are broken or missing, and under "stop" every bad box.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one in Pascal VOC's form or with COCO's JSON.")
    checker = Checker(on_bad)
    classes, parts = (voc if (root / "Annotations").is_dir() else coco).read(root, checker)
    return arrange(str(root), classes, parts, checker.skipped)


def relabelled(picture: Annotated, places: Tensor) -> Annotated:
    """The picture with label i called `places[i]`, int64 (classes,): another order of the same classes."""
    return replace(picture, labels=places[picture.labels])
