"""Images with boxes in a folder, in any layout of `data.layouts`."""

from __future__ import annotations

from pathlib import Path

from resnetlab.data.annotated_dataset import AnnotatedDataset, arrange_annotated_splits
from resnetlab.data.annotations import (
    AnnotatedImage,
    find_training_classes,
    keep_images_of_their_size,
    make_annotated_image,
    note_ignored,
)
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.layouts import read_annotations
from resnetlab.errors import DataError


def load_boxes(root: Path, on_bad: str = "stop") -> AnnotatedDataset[AnnotatedImage]:
    """The images with boxes in a folder; an object that has only an outline gets the box around it.

    Args:
        on_bad: "stop" at an invalid box or image, or "skip" it: left out, and listed by name.

    Raises:
        DataError: the folder has no known layout, files are broken or missing, or, under "stop", a box is invalid.
    """
    errors = ErrorPolicy(on_bad, "--on-bad-box")
    found = read_annotations(root, errors, masks=False)
    records = {split: list(keep_images_of_their_size(images, errors)) for split, images in found.splits.items()}
    classes = found.classes or find_training_classes(records)
    if not classes:
        raise DataError(f"{root} has no box to train on; each object needs a class and a box.")
    positions = {name: i for i, name in enumerate(classes)}
    splits = {split: [make_annotated_image(errors, r, positions) for r in images] for split, images in records.items()}
    return arrange_annotated_splits(str(root), classes, splits, errors, note_ignored(found, records))
