"""Images with objects: what the readers of all formats give, and the check that rejects invalid boxes.

A box is (x1, y1, x2, y2) in pixels from the image's upper left corner, float32, its area (x2 - x1)(y2 - y1). Coordinates are
used as the files give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from resnetlab.data.decode import decode_pixels, read_header, warn_of_scaling
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.file_lookup import find_first_split
from resnetlab.data.object_masks import ObjectMask, encode_mask, parse_segmentation
from resnetlab.data.text_files import read_bytes
from resnetlab.errors import DataError
from resnetlab.formatting import format_list

MIN_EXTENT = 0.01  # pixels: a narrower box was drawn by nobody, and may be empty in float32 once the image is resized
ROUNDING = 1e-3  # by which fractions of an image's side may be below 0 or above 1, since tools round them

Box = tuple[float, float, float, float]


class ObjectRecord(NamedTuple):
    """One object as its file gives it, not yet checked.

    Attributes:
        where: file and entry, for messages.
        label: its class; None if the reader has rejected it: it is not trained on, but no background either.
        box: None if the file gives none.
        segmentation: as `parse_segmentation` takes it, or the ObjectMask of a relative box, in any resolution; None if the file
            gives none.
        ignored: VOC's "difficult" and COCO's "iscrowd".
    """

    where: str
    label: str | None
    box: Box | None
    segmentation: Any = None
    ignored: bool = False


class ImageRecord(NamedTuple):
    """One image with its objects.

    Attributes:
        name: the image file's path inside the data's folder.
        source: the annotation file, for messages.
        size: (height, width) according to the annotation; (0, 0) where it gives none.
        relative: whether the objects' coordinates are fractions of the image's width and height.
        mask: the file of its mask, if the masks are files.
    """

    name: str
    file: Path
    source: str
    size: tuple[int, int]
    objects: list[ObjectRecord]
    relative: bool = False
    mask: Path | None = None


class Annotations(NamedTuple):
    """What a folder holds.

    Attributes:
        layout: the format's name, completed by `describe`.
        classes: None if the files do not list them: those of the training objects.
        splits: images by split: "train", "trainval", "val", "test", or "" for images of no split.
        notes: what was left out or translated, a sentence each.
        folder: where it was found: the folder that was given, or one inside.
    """

    layout: str
    classes: tuple[str, ...] | None
    splits: dict[str, Iterable[ImageRecord]]
    notes: tuple[str, ...] = ()
    folder: Path = Path()


def add_record(
    splits: dict[str, list[ImageRecord]], file: Path, root: Path, record: ImageRecord, tags: Iterable[str] = ()
) -> None:
    """Adds an image to the split that one of its tags, or a folder above its file, names."""
    words = (*tags, *file.relative_to(root).parts[:-1])
    splits.setdefault(find_first_split(words), []).append(record)


@dataclass(frozen=True, eq=False)
class AnnotatedItem:
    """An image with its annotation.

    Attributes:
        name: the image file's path inside the data's folder.
        size: (height, width) according to the annotation; (0, 0) where it gives none.
    """

    name: str
    file: Path
    size: tuple[int, int]

    def read_pixels(self) -> Tensor:
        """Decodes the image, uint8 (H, W, 3). Raises DataError if it is unreadable or not of its annotation's size."""
        pixels = decode_pixels(read_bytes(self.file), str(self.file))
        check_size(self.file, (pixels.shape[0], pixels.shape[1]), self.size)
        return pixels

    def update_hash(self, digest: Any) -> None:
        """Adds the annotation to a hash."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class AnnotatedImage(AnnotatedItem):
    """One image and its boxes; without boxes it is background.

    Attributes:
        boxes: float32 (n, 4).
        labels: int64 (n,), indices into the data's `classes`.
        ignored: bool (n,), VOC's "difficult" and COCO's "iscrowd": not trained on, neither right nor wrong when evaluated.
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor

    def update_hash(self, digest: Any) -> None:
        digest.update(self.boxes.numpy().tobytes() + self.labels.numpy().tobytes() + self.ignored.numpy().tobytes())


def check_size(file: Path, upright: tuple[int, int], size: tuple[int, int]) -> None:
    """Raises DataError if an image, turned upright, is not of its annotation's size; both (height, width)."""
    if size not in ((0, 0), upright):
        raise DataError(
            f"{file} has {upright[1]}x{upright[0]} pixels, its annotation says {size[1]}x{size[0]}; "
            "what is annotated may be another image (an EXIF rotation turns it)."
        )


def keep_images_of_their_size(records: Iterable[ImageRecord], errors: ErrorPolicy) -> Iterable[ImageRecord]:
    """The images whose files can be opened and have their annotation's size; fills in a size that is not given.

    Warns of values that are scaled to 8 bits.
    """
    deep: list[str] = []
    for record in records:
        try:
            upright, is_deep = read_header(record.file)
            check_size(record.file, upright, record.size)
        except DataError as error:
            errors.handle({record.name: str(error)})
        else:
            objects = _scale_boxes(record.objects, upright) if record.relative else record.objects
            deep += [str(record.file)] * is_deep
            yield record._replace(size=upright, objects=objects, relative=False)
    warn_of_scaling(deep)


def _scale_boxes(objects: list[ObjectRecord], size: tuple[int, int]) -> list[ObjectRecord]:
    """Objects whose coordinates were fractions of (height, width)."""

    def scale(values: Sequence[float]) -> list[float]:
        near = [min(max(v, 0.0), 1.0) if -ROUNDING <= v <= 1 + ROUNDING else v for v in values]
        return [v * size[1 - i % 2] for i, v in enumerate(near)]

    scaled = []
    for thing in objects:
        box, outline = thing.box and cast(Box, tuple(scale(thing.box))), thing.segmentation
        if isinstance(outline, list):
            outline = list(map(scale, outline))
        elif isinstance(outline, ObjectMask) and box is not None:
            outline = _fit_mask(outline, box, size)
        scaled.append(thing._replace(box=box, segmentation=outline))  # run lengths are of pixels already
    return scaled


def _fit_mask(mask: ObjectMask, box: Box, size: tuple[int, int]) -> Any:
    """Run lengths of the mask of a box in an image of (height, width), brought to the box's whole pixels in the image."""
    inside = np.zeros(mask.size, np.uint8)
    mask.paint(inside, 1)
    starts, places = [0, 0], [np.zeros(0, int)] * 2
    for axis in (0, 1) if all(abs(v) < 1e7 for v in box) else ():  # rows, columns
        start, end = round(box[1 - axis]), round(box[3 - axis])
        pixels = np.arange(max(start, 0), min(end, size[axis]))
        starts[axis], places[axis] = (
            max(start, 0),
            ((pixels - start + 0.5) * mask.size[axis] / (end - start)).astype(int),
        )
    if not all(map(len, places)):
        return []  # refused as a mask without a pixel
    return encode_mask(inside[places[0]][:, places[1]].astype(bool), starts[1], starts[0], size)


def note_ignored(found: Annotations, records: Mapping[str, Sequence[ImageRecord]]) -> Annotations:
    """The annotations with a note on how many objects are ignored, if any is."""
    objects = [thing for images in records.values() for record in images for thing in record.objects]
    if not (ignored := sum(thing.ignored for thing in objects)):
        return found
    note = f"{ignored:,} of {len(objects):,} objects are marked difficult or iscrowd: not trained on, and no fault if missed"
    return found._replace(notes=(*found.notes, note))


def find_training_classes(splits: dict[str, list[ImageRecord]]) -> tuple[str, ...]:
    """The classes of the training objects, in the order of their names."""
    training = splits.get("train") or splits.get("trainval") or next(iter(splits.values()), [])
    return tuple(sorted({thing.label for record in training for thing in record.objects if thing.label is not None}))


def find_label(
    thing: ObjectRecord, number: int, record: ImageRecord, positions: Mapping[str, int], errors: ErrorPolicy
) -> int | None:
    """The position of an object's class; None for an object that the reader or this has rejected."""
    if thing.label is None or thing.label in positions:
        return None if thing.label is None else positions[thing.label]
    where = f"{record.source}, box {number} of {record.file.name}"
    errors.reject(where, f"its class {thing.label!r} is none of the training classes ({format_list(list(positions))})")
    return None


def make_annotated_image(errors: ErrorPolicy, record: ImageRecord, positions: Mapping[str, int]) -> AnnotatedImage:
    """An image with its valid boxes; an object that has only an outline gets the box around it."""
    valid: list[tuple[Sequence[float], int, bool]] = []
    for number, thing in enumerate(record.objects, 1):
        if (label := find_label(thing, number, record, positions, errors)) is None:
            continue
        box = thing.box
        if box is None:
            try:
                box = parse_segmentation(thing.segmentation, record.size).bounds()
            except ValueError as error:
                more = "" if thing.segmentation is None else f", and its segmentation {error}"
                errors.reject(thing.where, f"it has no box{more}")
                continue
        if problem := find_box_error(box, record.size):
            errors.reject(f"{record.source}, box {number} of {record.name}", problem)
        else:
            valid.append((box, label, thing.ignored))
    return AnnotatedImage(
        record.name,
        record.file,
        record.size,
        torch.tensor([box for box, _, _ in valid], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([label for _, label, _ in valid], dtype=torch.int64),
        torch.tensor([ignored for _, _, ignored in valid], dtype=torch.bool),
    )


def find_box_error(box: Sequence[float], size: tuple[int, int]) -> str | None:
    """What is wrong with (x1, y1, x2, y2) in an image of (height, width), (0, 0) if unknown; None if nothing is.

    The box is compared as float32, as which it is trained on.
    """
    text = "({:g}, {:g}, {:g}, {:g})".format(*box)
    if not all(abs(v) < 1e7 for v in box):
        return f"{text} does not consist of pixel coordinates"
    x1, y1, x2, y2 = (float(np.float32(v)) for v in box)
    height, width = size
    if box[2] < box[0] or box[3] < box[1]:
        return f"{text} is flipped: its right or lower edge comes before its left or upper one"
    if min(x2 - x1, y2 - y1) < MIN_EXTENT:
        return f"{text} is empty"
    if x1 < 0 or y1 < 0 or (size != (0, 0) and (x2 > width or y2 > height)):
        return f"{text} reaches outside the image" + (f" of {width}x{height} pixels" if size != (0, 0) else "")
    return None
