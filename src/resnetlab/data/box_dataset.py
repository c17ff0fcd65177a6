"""Images with boxes in a folder, in Pascal VOC's format (`data.voc`) or COCO's (`data.coco`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor

from resnetlab.data.annotated_dataset import AnnotatedDataset, arrange_annotated_splits
from resnetlab.data.annotations import AnnotatedImage
from resnetlab.data.coco import read_coco_boxes
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.voc import read_voc_boxes
from resnetlab.errors import DataError


def load_boxes(root: Path, on_bad: str = "stop") -> AnnotatedDataset[AnnotatedImage]:
    """The images with boxes in a folder: Pascal VOC's (Annotations/, JPEGImages/) or COCO's (one JSON per split).

    Args:
        on_bad: "stop" at an invalid box or image, or "skip" it: left out, and listed by name.

    Raises:
        DataError: the folder has neither format, files are broken or missing, or, under "stop", a box is invalid.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one in Pascal VOC's format or with COCO's JSON.")
    errors = ErrorPolicy(on_bad, "--on-bad-box")
    read = read_voc_boxes if (root / "Annotations").is_dir() else read_coco_boxes
    classes, splits = read(root, errors)
    return arrange_annotated_splits(str(root), classes, splits, errors)


def relabel_boxes(image: AnnotatedImage, indices: Tensor) -> AnnotatedImage:
    """The image with label i replaced by `indices[i]`, int64 (classes,): another order of the same classes."""
    return replace(image, labels=indices[image.labels])
