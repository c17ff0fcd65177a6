"""Images with boxes or masks, divided into splits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from resnetlab.data.annotations import AnnotatedItem, Annotations
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.errors import DataError, warn
from resnetlab.formatting import find_name_problem, format_count, format_list
from resnetlab.random import seed_for

HELD_OUT_FRACTION = 0.2  # of data without a split to evaluate on


P = TypeVar("P", bound=AnnotatedItem)


@dataclass(frozen=True)
class AnnotatedDataset(Generic[P]):
    """Annotated images that share their classes.

    Attributes:
        evaluated_split: the name of `test`: "test", "val", or "held-out" if it was drawn from all images.
        val: evaluated while training; may be empty.
        errors: handles images and annotations that cannot be used; lists those that were skipped.
        layout: what was found, "COCO, 2 splits, 128 images, 80 classes".
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[P, ...]
    val: tuple[P, ...]
    test: tuple[P, ...]
    evaluated_split: str
    errors: ErrorPolicy = field(default_factory=ErrorPolicy)
    layout: str = ""

    def __post_init__(self) -> None:
        if problem := find_name_problem(self.classes):
            raise DataError(f"{self.name} cannot be used: {problem}; give each class a name of its own.")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of classes, names and annotations, the first 16 hex digits."""
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for split in (self.train, self.val, self.test):
            for image in split:
                digest.update(image.name.encode(errors="surrogateescape"))
                image.update_hash(digest)
        return digest.hexdigest()[:16]

    @property
    def splits(self) -> dict[str, tuple[P, ...]]:
        """The splits that are not empty, by the names that people give."""
        return {k: v for k, v in {"train": self.train, "val": self.val, self.evaluated_split: self.test}.items() if v}


def arrange_annotated_splits(
    name: str, classes: tuple[str, ...], splits: dict[str, list[P]], errors: ErrorPolicy, found: Annotations
) -> AnnotatedDataset[P]:
    """The data set of splits named "train", "val", "test", "trainval", or "" for images without a split.

    Where there is no split to evaluate on, a fifth of the images is held out, chosen by name. Warns of what the reader left out
    or translated (`found.notes`).
    """
    for note in found.notes:
        warn(f"{name}: {note}.")
    empty = sorted(split for split, images in splits.items() if split and not images)
    count, splits = sum(map(len, splits.values())), {split: images for split, images in splits.items() if images}
    if not splits:
        raise DataError(f"{name} ({found.layout}) has no image that can be used.")
    for split in empty:
        warn(f"{name}: the {split} split has no image that can be used, and is left out.")
    training = {image.file for image in (*splits.get("train", ()), *splits.get("trainval", ()))}
    for evaluated in ("test",) if "trainval" in splits else ("val", "test"):
        if shared := [image.name for image in splits.get(evaluated, ()) if image.file in training]:
            raise DataError(
                f"{name}: the training and {evaluated} splits share {format_list(shared)}; do not evaluate on training images."
            )
    counts = (format_count(n, what) for n, what in ((len(splits), "split"), (count, "image"), (len(classes), "class")))
    layout = ", ".join((found.layout, *counts))
    train, val, test, evaluated = _choose_splits(splits)
    used = {image.file for image in (*train, *val, *test)}
    if left := [image.name for images in splits.values() for image in images if image.file not in used]:
        warn(
            f"{name}: {format_count(len(left), 'image')} left out, of no split or of one that is not used, such as {left[0]}."
        )
    return AnnotatedDataset(name, classes, train, val, test, evaluated, errors, layout)


def _choose_splits(splits: dict[str, list[P]]) -> tuple[tuple[P, ...], tuple[P, ...], tuple[P, ...], str]:
    """(train, val, test, the name of the split that `test` is)."""
    if "trainval" in splits and "test" in splits:  # 2015, appendix A: trained on both, evaluated on test
        return tuple(splits["trainval"]), (), tuple(splits["test"]), "test"
    if "train" not in splits and (only := splits.get("", splits.get("trainval"))) is not None:
        train, test = hold_out_images(only, max(1, round(HELD_OUT_FRACTION * len(only))))
        return train, (), test, "held-out"
    evaluated = next((split for split in ("test", "val") if split in splits), None)
    if evaluated is None:
        return _choose_splits({"": splits["train"]})
    val = tuple(splits.get("val", [])) if evaluated == "test" else ()
    return tuple(splits.get("train", [])), val, tuple(splits[evaluated]), evaluated


def hold_out_images(images: Sequence[P], count: int) -> tuple[tuple[P, ...], tuple[P, ...]]:
    """(rest, held out): `count` images chosen by a hash of their names, the same on every machine.

    Raises DataError if nothing would be left.
    """
    if not 0 < count < len(images):
        raise DataError(
            f"cannot hold out {count:,} of {format_count(len(images), 'image')}; hold out fewer, or give more."
        )
    chosen = set(sorted(range(len(images)), key=lambda i: seed_for(0, "held-out", images[i].name))[:count])
    rest, held_out = (tuple(p for i, p in enumerate(images) if (i in chosen) is wanted) for wanted in (False, True))
    return rest, held_out
