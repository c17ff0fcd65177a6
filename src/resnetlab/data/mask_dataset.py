"""Images with a class for every pixel, in any layout of `data.layouts`: masks in files, or outlines and run lengths of objects.

Files are read by `data.mask_files`. Smaller objects are drawn over larger ones; COCO's "iscrowd" is not evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnetlab.data.annotated_dataset import AnnotatedDataset, arrange_annotated_splits
from resnetlab.data.annotations import (
    AnnotatedItem,
    ImageRecord,
    ObjectRecord,
    find_label,
    find_training_classes,
    keep_images_of_their_size,
    note_ignored,
)
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.layouts import read_annotations
from resnetlab.data.mask_files import BACKGROUND, MAX_CLASSES, VOID, MaskFile, decide_mask_classes, read_label_map
from resnetlab.data.mask_folders import cityscapes_classes
from resnetlab.data.object_masks import ObjectMask, parse_segmentation
from resnetlab.errors import DataError, warn
from resnetlab.formatting import format_list


@dataclass(frozen=True, eq=False)
class MaskedImage(AnnotatedItem):
    """One image and the source of its mask."""

    source: MaskFile | ObjectMasks

    def read(self) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (H, W, 3) and mask uint8 (H, W). Raises DataError if either is unreadable or they do not fit."""
        pixels = self.read_pixels()
        return pixels, self.source.read_mask((pixels.shape[0], pixels.shape[1]))

    def update_hash(self, digest: Any) -> None:
        self.source.update_hash(digest)


@dataclass(frozen=True, eq=False)
class ObjectMasks:
    """The masks of an image's objects in drawing order: (class, mask); the class of a crowd is VOID."""

    objects: tuple[tuple[int, ObjectMask], ...]

    @property
    def has_objects(self) -> bool:
        return any(value != VOID for value, _ in self.objects)

    def read_mask(self, size: tuple[int, int]) -> Tensor:
        mask = np.zeros(size, np.uint8)
        for value, thing in self.objects:
            thing.paint(mask, value)
        return torch.from_numpy(mask)

    def update_hash(self, digest: Any) -> None:
        for value, thing in self.objects:
            digest.update(b"%d " % value)
            thing.update_hash(digest)


def load_masks(root: Path, on_bad: str = "stop", class_255: str = "") -> AnnotatedDataset[MaskedImage]:
    """The images with masks in a folder; classes with the background first.

    Args:
        on_bad: "stop" at an invalid mask or image, or "skip" it: left out, and listed by name.
        class_255: the class that 255 means in masks, "ignore", or "" to decide by the masks.

    Raises:
        DataError: the folder has neither format, files are broken or missing, or, under "stop", a mask is invalid; or no
            mask to train or evaluate on holds another class than the background.
    """
    errors = ErrorPolicy(on_bad, "--on-bad-mask")
    found = read_annotations(root, errors, masks=True)
    records = {split: list(keep_images_of_their_size(images, errors)) for split, images in found.splits.items()}
    if any(record.mask for images in records.values() for record in images):
        classes, splits = _read_mask_files(found.folder, records, errors, class_255)
    else:
        _refuse_boxes(root, records)
        names = found.classes or find_training_classes(records)
        if len(names) >= MAX_CLASSES:
            raise DataError(
                f"{root} has {len(names):,} classes; masks hold {MAX_CLASSES - 1} beside the background, so leave some out."
            )
        classes = ("background", *(name for name in names if name.lower() not in BACKGROUND))
        positions = {name: i for i, name in enumerate(classes)}
        splits = {
            split: [MaskedImage(r.name, r.file, r.size, make_object_masks(r, positions, errors)) for r in images]
            for split, images in records.items()
        }
    data = arrange_annotated_splits(str(root), classes, splits, errors, note_ignored(found, records))
    for split, images in data.splits.items():  # an IoU of the background alone is no figure
        if classes[0].lower() in BACKGROUND and not any(image.source.has_objects for image in images):
            raise DataError(
                f"{root}: no mask of the {split} split has another class than {classes[0]}; check what the masks' values mean."
            )
    return data


def _refuse_boxes(root: Path, records: Mapping[str, list[ImageRecord]]) -> None:
    """Raises DataError if there are objects, but no outline or mask of any."""
    objects = [thing for images in records.values() for record in images for thing in record.objects if thing.label]
    if objects and not any(thing.segmentation for thing in objects):
        raise DataError(
            f"{root} holds boxes without outlines or masks, for a detector: resnetlab detect train {root}. A segmenter needs "
            "polygons or masks: export those."
        )


def _read_mask_files(
    root: Path, records: Mapping[str, list[ImageRecord]], errors: ErrorPolicy, class_255: str
) -> tuple[tuple[str, ...], dict[str, list[MaskedImage]]]:
    """Classes, and the images whose masks fit; the masks of the training images come first in deciding what values mean."""
    ordered = sorted(records, key=lambda split: split not in ("train", "trainval"))
    files = [record.mask for split in ordered for record in records[split] if record.mask is not None]
    label_map = read_label_map(root)
    meaning = (None if label_map else cityscapes_classes(files)) or decide_mask_classes(files, label_map, class_255)
    if meaning.note:
        warn(f"{root}: {meaning.note}.")
    splits: dict[str, list[MaskedImage]] = {split: [] for split in records}
    trained = torch.zeros(VOID + 1, dtype=torch.int64)  # pixels of each value in the masks to train on
    for split, images in records.items():
        for record in images:
            assert record.mask is not None
            source = MaskFile(record.mask, len(meaning.names), meaning.lookup, meaning.colours)
            try:
                mask = source.read_mask(record.size)
            except DataError as error:
                errors.reject(str(record.mask), str(error).removeprefix(f"{record.mask} ").rstrip("."))
            else:
                counts = torch.bincount(mask.flatten(), minlength=VOID + 1)
                source = replace(source, has_objects=bool(counts[1:VOID].any()))
                trained += counts * (split in (ordered[0], "train", "trainval"))
                splits[split].append(MaskedImage(record.name, record.file, record.size, source))
    if absent := [name for i, name in enumerate(meaning.names) if not trained[i]]:
        void = ""
        if n := int(trained[VOID]):
            void = f"; {VOID}, which is not evaluated, has {n:,} (class_255 changes that)"
        warn(f"{root}: no mask to train on has a pixel of {format_list(absent)}{void}.")
    return meaning.names, splits


def make_object_masks(record: ImageRecord, positions: Mapping[str, int], errors: ErrorPolicy) -> ObjectMasks:
    """The masks of an image's objects, the largest first, so that smaller objects are drawn over larger ones.

    An object that is rejected is left out of training and evaluation: the pixels of its box are VOID, not background.
    """
    drawn = []
    for number, thing in enumerate(record.objects, 1):
        label, mask = find_label(thing, number, record, positions, errors), None
        try:
            mask = parse_segmentation(thing.segmentation, record.size)
        except ValueError as error:
            if thing.label is not None and label is not None:
                errors.reject(thing.where, f"its segmentation {error}")
            mask, label = _mask_of_box(thing, record.size), None
        if mask is not None:
            drawn.append((VOID if thing.ignored or label is None else label, mask))
    return ObjectMasks(tuple(sorted(drawn, key=lambda item: -item[1].area())))


def _mask_of_box(thing: ObjectRecord, size: tuple[int, int]) -> ObjectMask | None:
    """The pixels of an object's box as far as it is in the image; None without a box."""
    if thing.box is None or not all(abs(v) < 1e7 for v in thing.box):
        return None
    (x1, x2), (y1, y2) = (np.clip(thing.box[i::2], 0, size[1 - i]).tolist() for i in range(2))
    return parse_segmentation([[x1, y1, x2, y1, x2, y2, x1, y2]], size)
