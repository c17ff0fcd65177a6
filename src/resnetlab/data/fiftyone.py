"""FiftyOne's exports: labels.json with data/ (FiftyOneImageDetectionDataset), and its own data sets (samples.json)."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from resnetlab.data.annotations import Annotations, ImageRecord, ObjectRecord, add_record
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.file_lookup import ImageFinder, NameIndex, list_json_files
from resnetlab.data.mask_files import read_codes
from resnetlab.data.object_masks import make_mask
from resnetlab.data.text_files import read_json
from resnetlab.errors import DataError
from resnetlab.formatting import format_list

REGIONS = ("detections", "polylines")  # keys of the lists of objects
WHOLE_IMAGE = (0.0, 0.0, 1.0, 1.0)


def read_fiftyone(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """FiftyOne's image detections: {"classes": […], "labels": {name: [{"label", "bounding_box": [x, y, w, h]}]}} and data/."""
    splits: dict[str, list[ImageRecord]] = {}
    finder = ImageFinder(root)
    classes: tuple[str, ...] = ()
    for file in (file for file in list_json_files(root) if file.stem.lower() == "labels"):
        content = read_json(file)
        classes = classes or tuple(map(str, content["classes"] or ()))
        by_stem = finder.by_stem(f"{finder.folder_of(file)}/data".strip("/"))
        stems = NameIndex(by_stem)
        for name, entries in content["labels"].items():
            if (stem := stems.find(name) or stems.find(Path(name).stem)) is None:
                errors.reject(f"{file}, {name}", f"its image does not exist in {file.parent / 'data'}")
                continue
            where, image = f"{file}, {name}, detection", by_stem[stem]
            objects = [_read_detection(e, f"{where} {i}", classes, errors) for i, e in enumerate(entries or (), 1)]
            record = ImageRecord(finder.name_of(image), image, str(file), (0, 0), objects, relative=True)
            add_record(splits, file, root, record)
    return Annotations("FiftyOne", classes or None, dict(splits))


def read_fiftyone_samples(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """FiftyOne's own data sets: {"samples": [{"filepath", "tags", FIELD: {"detections": […]} or {"polylines": […]}}]}.

    The first field in the order of names that holds any is read, "ground_truth" before others; for masks one that has them,
    which may be of the whole image: a class for each value, named by `mask_targets` in metadata.json.
    """
    splits: dict[str, list[ImageRecord]] = {}
    finder, notes, classes = ImageFinder(root), list[str](), list[str]()
    for file in (file for file in list_json_files(root) if file.stem.lower() == "samples"):
        samples = read_json(file)["samples"]
        first, others = _choose_field(file, samples, masks)
        notes += [f"{file.name}: the field {first} is read, not {format_list(others)}"] if others else []
        folder, targets = finder.folder_of(file), _read_mask_targets(file, first)
        for number, sample in enumerate(samples, 1):
            name, value = str(sample.get("filepath", "")), sample.get(first) or {}
            if (image := finder.find(name, (folder, f"{folder}/data".strip("/")))) is None:
                errors.reject(f"{file}, sample {number}", f"its image {name} does not exist below {file.parent}")
                continue
            where = f"{file}, {Path(name).name}, {first}"
            if value.get("_cls") == "Segmentation":
                objects = _read_segmentation(value, where, file.parent, targets, errors)
                classes = classes or [name for number, name in sorted(targets.items()) if number]
            else:
                entries = value.get("detections") or value.get("polylines") or ()
                place = file.parent if masks else None
                objects = [_read_detection(e, f"{where} {i}", (), errors, place) for i, e in enumerate(entries, 1)]
            record = ImageRecord(finder.name_of(image), image, str(file), (0, 0), objects, relative=True)
            add_record(splits, file, root, record, map(str, sample.get("tags") or ()))
    return Annotations("FiftyOne", tuple(classes) or None, dict(splits), tuple(notes))


def _choose_field(file: Path, samples: list[Any], masks: bool) -> tuple[str, list[str]]:
    """The field of the samples that is read, and the others; raises DataError if none has boxes or masks."""
    values = [(key, value) for sample in samples for key, value in sample.items() if isinstance(value, dict)]
    found = {key for key, value in values if any(region in value for region in REGIONS)}
    if masks:  # fields of boxes alone only if there is nothing else, to be refused by who wants masks
        found = {key for key, value in values if _has_masks(value)} or found
    if not found:
        wanted = "detections or polylines" + ", or a segmentation" * masks
        raise DataError(f"{file} has no field with {wanted}; export one of them with the samples.")
    first, *others = sorted(found, key=lambda name: (name != "ground_truth", name))
    return first, others


def _has_masks(value: Mapping[str, Any]) -> bool:
    detections = value.get("detections") or ()
    return "polylines" in value or value.get("_cls") == "Segmentation" or any(map(_has_mask, detections))


def _has_mask(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("mask") or entry.get("mask_path"))


def _read_mask_targets(file: Path, field: str) -> dict[int, str]:
    """The classes of a field's values, as metadata.json beside the samples gives them; {} without it."""
    metadata = file.with_name("metadata.json")
    content = read_json(metadata) if metadata.is_file() else {}
    targets = (content.get("mask_targets") or {}).get(field) or content.get("default_mask_targets") or {}
    return {int(value): str(name) for value, name in targets.items() if str(value).isdecimal()}


def read_class_label(label: Any, classes: Sequence[str]) -> str:
    """The class that a label means: a name, or a number among the classes. Raises IndexError for a number that is none."""
    if isinstance(label, int) and label < 0:
        raise IndexError(f"there is no class {label}")
    return str(classes[label] if isinstance(label, int) else label)


def _read_detection(
    entry: Any, where: str, classes: tuple[str, ...], errors: ErrorPolicy, folder: Path | None = None
) -> ObjectRecord:
    """One object; with its mask if `folder` is given, where the paths of masks begin."""
    label: str | None
    try:
        label = read_class_label(entry["label"], classes)
        if "points" in entry:  # a polyline of FiftyOne's: rings of [x, y]
            rings = [[float(v) for point in ring for v in point] for ring in entry["points"]]
            return ObjectRecord(where, label, None, rings)
        x, y, w, h = (float(v) for v in entry["bounding_box"])
    except (KeyError, TypeError, ValueError, IndexError):
        errors.reject(where, "it has no label and bounding_box [x, y, width, height] as fractions of the image")
        return ObjectRecord(where, None, None)
    inside = None
    if folder is not None and _has_mask(entry):
        try:
            inside = make_mask(_unpack_mask(entry, folder) > 0)
        except ValueError as error:
            errors.reject(where, f"its mask cannot be read ({error})")
            label = None
    return ObjectRecord(where, label, (x, y, x + w, y + h), inside)


def _read_segmentation(
    value: Mapping[str, Any], where: str, folder: Path, targets: Mapping[int, str], errors: ErrorPolicy
) -> list[ObjectRecord]:
    """The mask of a whole image as one object for each value but 0."""
    try:
        mask = _unpack_mask(value, folder)
    except ValueError as error:
        errors.reject(where, f"its mask cannot be read ({error})")
        return [ObjectRecord(where, None, WHOLE_IMAGE)]
    found = [number for number in np.unique(mask).tolist() if number]
    return [
        ObjectRecord(where, targets.get(number, f"class {number}"), WHOLE_IMAGE, make_mask(mask == number))
        for number in found
    ]


def _unpack_mask(value: Mapping[str, Any], folder: Path) -> NDArray[Any]:
    """The values of a mask (h, w): a file, or an array of NumPy's, compressed, in base64. Raises ValueError."""
    if value.get("mask_path"):
        try:
            return read_codes(folder / str(value["mask_path"]).replace("\\", "/"), colours=False)
        except DataError as error:
            raise ValueError(str(error)) from error
    content = (value.get("mask") or {}).get("$binary")
    text = content.get("base64") if isinstance(content, dict) else content
    if not isinstance(text, str):
        raise ValueError("it is neither a path nor a text in base64")
    limit = 8 * 2 * (Image.MAX_IMAGE_PIXELS or 0)
    reader = zlib.decompressobj()
    try:
        unpacked = reader.decompress(base64.b64decode(text), limit)
        if reader.unconsumed_tail:
            raise ValueError("it is larger than any image")
        mask = np.lib.format.read_array(io.BytesIO(unpacked), allow_pickle=False)
    except (zlib.error, MemoryError) as error:  # NumPy makes room for what the array says of itself
        raise ValueError(str(error)) from error
    if mask.ndim != 2 or not mask.size or mask.dtype.kind not in "biu":
        raise ValueError("it is no array of whole numbers with rows and columns")
    return mask
