"""Checks a folder of images with boxes or masks: every annotation and every image, and copies in two splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from resnetlab.data.annotations import AnnotatedImage
from resnetlab.data.box_dataset import load_boxes
from resnetlab.data.check import CheckReport, Problem, check_splits
from resnetlab.data.dataset import Split
from resnetlab.data.disk_split import DiskSplit, FileNames, FileSource
from resnetlab.data.layouts import Layout
from resnetlab.data.mask_dataset import MaskedImage, load_masks
from resnetlab.data.mask_files import VOID
from resnetlab.errors import DataError


def check_annotated(
    root: Path, layout: Layout, workers: int = 0, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckReport:
    """Checks a folder of boxes, or of masks where its layout has no boxes; arguments as those of `check_dataset`.

    Raises DataError if nothing of it can be used.
    """
    load = load_masks if layout.gives == "masks" else load_boxes
    data = load(root, "skip")
    report = CheckReport(str(root), layout=data.layout)
    report.problems = [Problem("annotation", name, reason) for name, reason in data.errors.skipped.items()]
    for name, images in data.splits.items():
        counts = _count_objects(images, data.classes, report)
        report.classes[name] = {label: counts[k] for k, label in enumerate(data.classes)}
    check_splits(report, {name: _as_split(images) for name, images in data.splits.items()}, ("",), workers, on_progress)
    return report


def _count_objects(
    images: Sequence[AnnotatedImage | MaskedImage], classes: Sequence[str], report: CheckReport
) -> Counter[int]:
    """How many boxes each class has, or in how many images' masks it is; masks that cannot be read become problems."""
    counts = Counter[int]()
    for image in images:
        if isinstance(image, AnnotatedImage):
            counts.update(image.labels.tolist())
            continue
        try:
            counts.update(set(torch.unique(image.read()[1]).tolist()) - {VOID})
        except DataError as error:
            report.problems.append(Problem("annotation", str(image.file), str(error)))
    return counts


def _as_split(images: Sequence[AnnotatedImage | MaskedImage]) -> Split:
    """The image files alone; all of one class, so that copies are never taken for two classes."""
    files = FileNames(str(image.file) for image in images)
    source = FileSource(Path(), files, np.zeros(len(images), np.int64))
    return DiskSplit(source, torch.arange(len(images)), torch.zeros(len(images), dtype=torch.long))
