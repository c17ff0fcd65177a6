"""Annotation tools' own JSON: LabelMe (a file beside each image), Label Studio (one list of tasks), CreateML."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
from PIL import Image

from resnetlab.data.annotations import Annotations, ImageRecord, ObjectRecord, add_record
from resnetlab.data.decode import decode
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.file_lookup import ImageFinder, find_entry, list_json_files
from resnetlab.data.object_masks import ellipse_corners, encode_mask, turn_corners
from resnetlab.data.text_files import read_json, read_lines
from resnetlab.errors import DataError

NO_CLASSES = ("__ignore__", "_background_")  # of LabelMe's labels.txt
UPLOAD_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # that Label Studio gives to an uploaded file's name


def read_labelme(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """LabelMe: {"imagePath", "imageHeight", "imageWidth", "shapes": [{"label", "points", "shape_type", "group_id"}]}."""
    splits: dict[str, list[ImageRecord]] = {}
    finder = ImageFinder(root)
    for file in list_json_files(root):
        try:
            content = read_json(file)
            name, shapes = str(content["imagePath"]), list(content["shapes"])
            size = (int(content.get("imageHeight") or 0), int(content.get("imageWidth") or 0))
        except DataError as error:
            errors.handle({str(file): str(error)})
            continue
        except (TypeError, KeyError, ValueError, OverflowError):
            errors.reject(str(file), "it is not a LabelMe file with imagePath and shapes")
            continue
        places = (finder.folder_of(file), "")
        image = finder.find(name, places) or finder.find(f"{file.stem}{Path(name).suffix}", places)
        if image is None:
            errors.reject(str(file), f"its image {name} does not exist")
            continue
        objects = _merge_groups([_read_shape(s, f"{file}, shape {i}", size, errors) for i, s in enumerate(shapes, 1)])
        record = ImageRecord(finder.name_of(image), image, str(file), size if all(size) else (0, 0), objects)
        add_record(splits, file, root, record)
    listed = find_entry(root, "labels.txt")
    classes = tuple(name for name in read_lines(listed) if name not in NO_CLASSES) if listed is not None else None
    return Annotations("LabelMe", classes, dict(splits))


def _read_shape(shape: Any, where: str, size: tuple[int, int], errors: ErrorPolicy) -> tuple[ObjectRecord, Any]:
    """One shape and the id of the group that makes it one object with others; without a label if it is rejected."""
    try:
        label, kind = str(shape["label"]), shape.get("shape_type") or "polygon"
        points = [(float(x), float(y)) for x, y in shape["points"]]
        polygons = _outline(kind, points, shape, size)
        group = shape.get("group_id")
        hash(group)  # raises TypeError for what is no id
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, DataError) as error:
        errors.reject(where, f"its shape cannot be used: {error or type(error).__name__}")
        return ObjectRecord(where, None, None), None
    return ObjectRecord(where, label, None, polygons, ignored=label == "__ignore__"), group


def _outline(kind: str, points: list[tuple[float, float]], shape: Any, size: tuple[int, int]) -> Any:
    """COCO's segmentation of a shape; raises ValueError for one without an area."""
    if kind == "polygon" or (kind == "oriented_rectangle" and len(points) == 4):
        return [[v for point in points for v in point]]
    if kind in ("rectangle", "mask") and len(points) == 2:
        (x1, x2), (y1, y2) = (sorted(axis) for axis in zip(*points, strict=True))
        if kind == "mask":  # a PNG in base64 that begins at (x1, y1)
            inside = np.asarray(decode(base64.b64decode(shape["mask"]), "its mask").convert("L")) > 0
            return encode_mask(inside, round(x1), round(y1), size)
        return [[x1, y1, x2, y1, x2, y2, x1, y2]]
    if kind == "circle" and len(points) == 2:
        radius = math.dist(*points)
        return [[v for corner in ellipse_corners(*points[0], radius, radius) for v in corner]]
    raise ValueError(f"a {kind} of {len(points)} points encloses no area")


def _merge_groups(shapes: list[tuple[ObjectRecord, Any]]) -> list[ObjectRecord]:
    """Objects, those polygons of one label and group united."""
    objects: dict[Any, ObjectRecord] = {}
    for i, (thing, group) in enumerate(shapes):
        key = (thing.label, group) if group is not None and isinstance(thing.segmentation, list) else i
        if key in objects:
            thing = thing._replace(segmentation=[*objects[key].segmentation, *thing.segmentation])
        objects[key] = thing
    return list(objects.values())


def read_label_studio(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """Label Studio: tasks with data.image and annotations[].result[], their coordinates in percent of the image."""
    splits: dict[str, list[ImageRecord]] = {}
    finder, several = ImageFinder(root), 0
    for file in list_json_files(root):
        for number, task in enumerate(read_json(file), 1):
            where = f"{file}, task {task.get('id', number) if isinstance(task, dict) else number}"
            try:
                results, count = list_results(task)
                last, image = find_task_image(task, finder)
            except (KeyError, TypeError, AttributeError):
                errors.reject(where, "it is no task with an image and annotations")
                continue
            several += count > 1
            if image is None:
                errors.reject(where, f"its image {last} does not exist below {root}")
                continue
            things = (_read_result(result, f"{where}, result {i}", errors) for i, result in enumerate(results, 1))
            objects = [thing for thing in things if thing is not None]
            record = ImageRecord(finder.name_of(image), image, str(file), (0, 0), objects, relative=True)
            add_record(splits, image, root, record)
    note = f"{several:,} tasks have several annotations; the first of each is read"
    return Annotations("Label Studio", None, dict(splits), (note,) if several else ())


def find_task_image(task: Any, finder: ImageFinder) -> tuple[str, Path | None]:
    """The name and the file of a task's image; raises KeyError and others for what is no task."""
    data = task.get("data", task)
    keys = ("image", "img", "image_url", "ocr", *data)
    address = next((str(data[key]) for key in keys if isinstance(data.get(key), str)), None)
    if address is None:
        raise KeyError("image")
    last = re.split(r"[/\\=]", unquote(address))[-1]
    return last, finder.find(last, ("", "images")) or finder.find(UPLOAD_PREFIX.sub("", last), ("", "images"))


def list_results(task: Any) -> tuple[list[Any], int]:
    """The results of a task's first annotation that was not cancelled, and how many there are; JSON-MIN has them directly."""
    if "data" not in task:  # JSON-MIN: {"image": …, "label": [{"x": …, "rectanglelabels": […]}]}
        lists = [value for value in task.values() if isinstance(value, list)]
        return [{"value": value} for values in lists[:1] for value in values], 1
    annotations = task["annotations"] if "annotations" in task else task["completions"]
    kept = [a for a in annotations if not a.get("was_cancelled")]
    return (list(kept[0]["result"]) if kept else []), len(kept)


def _read_result(result: Any, where: str, errors: ErrorPolicy) -> ObjectRecord | None:
    """One rectangle, ellipse, polygon or brush; None for what is no region (a choice, a text)."""
    try:
        value = result["value"]
        key = next((key for key in value if key.endswith("labels")), None)
        if key is None or not value[key]:
            return None
        label = str(value[key][0])
        if value.get("format") == "rle":
            return ObjectRecord(where, label, None, _decode_brush(value["rle"], result))
        if "points" in value:
            return ObjectRecord(where, label, None, [[float(v) / 100 for point in value["points"] for v in point]])
        return ObjectRecord(where, label, None, [_region_outline(value, result)])
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        errors.reject(where, f"its region cannot be read ({error or type(error).__name__})")
        return ObjectRecord(where, None, None)


def _region_outline(value: Any, result: Any) -> list[float]:
    """The corners of a rectangle or ellipse as fractions of the image, turned by its rotation about the first corner."""
    if "radiusX" in value:
        x, y, rx, ry = (float(value[k]) / 100 for k in ("x", "y", "radiusX", "radiusY"))
        pivot, corners = (x, y), ellipse_corners(x, y, rx, ry)
    else:
        x, y, w, h = (float(value[k]) / 100 for k in ("x", "y", "width", "height"))
        pivot, corners = (x, y), [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
    if turn := math.radians(float(value.get("rotation") or 0)):
        ratio = float(result["original_width"]) / float(result["original_height"])  # turned in pixels, not in fractions
        turned = turn_corners([(px * ratio, py) for px, py in corners], (pivot[0] * ratio, pivot[1]), turn)
        corners = [(px / ratio, py) for px, py in turned]
    return [v for corner in corners for v in corner]


def _decode_brush(content: Any, result: Any) -> dict[str, Any]:
    """COCO's run lengths of a brush, whose bytes hold the pixels' RGBA values (label_studio_converter.brush.decode_rle):

    32 bits of how many values, 5 of a value's length - 1, 4 times 4 of a run's length - 1; then runs: 1 bit whether one value
    is repeated, 2 bits which of the four lengths, the run - 1, and the value or values.
    """
    height, width = int(result["original_height"]), int(result["original_width"])
    if height * width > 2 * (Image.MAX_IMAGE_PIXELS or 0):
        raise ValueError(f"an image of {width}x{height} pixels is too large")
    bits = np.unpackbits(np.array(content, np.uint8))
    at = 0

    def read(count: int) -> int:
        nonlocal at
        at += count
        if at > len(bits):
            raise ValueError("its run lengths are cut short")
        return int.from_bytes(
            np.packbits(np.r_[np.zeros(-count % 8, np.uint8), bits[at - count : at]]).tobytes(), "big"
        )

    total, word = read(32), read(5) + 1
    if total != 4 * height * width:
        raise ValueError(
            f"its run lengths are for {total:,} values, an image of {width}x{height} has {4 * height * width:,}"
        )
    lengths = [read(4) + 1 for _ in range(4)]
    inside, i = np.zeros(total, bool), 0
    while i < total:
        repeated, run = read(1), read(lengths[read(2)]) + 1
        if i + run > total:
            raise ValueError("its run lengths are longer than the image")
        inside[i : i + run] = read(word) > 0 if repeated else [read(word) > 0 for _ in range(run)]
        i += run
    return encode_mask(inside.reshape(height, width, 4)[:, :, 3], 0, 0, (height, width))


def read_createml(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """CreateML: [{"image", "annotations": [{"label", "coordinates": {"x", "y", "width", "height"}}]}], x and y the centre."""
    splits: dict[str, list[ImageRecord]] = {}
    finder = ImageFinder(root)
    for file in list_json_files(root):
        for number, entry in enumerate(read_json(file), 1):
            name = str(entry.get("image") or entry.get("imagefilename") or "")
            if (image := finder.find(name, (finder.folder_of(file), ""))) is None:
                errors.reject(f"{file}, entry {number}", f"its image {name} does not exist in {file.parent}")
                continue
            objects = []
            for i, thing in enumerate(entry["annotations"], 1):
                where = f"{file}, {name}, annotation {i}"
                try:
                    x, y, w, h = (float(thing["coordinates"][key]) for key in ("x", "y", "width", "height"))
                    box = (x - w / 2, y - h / 2, x + w / 2, y + h / 2)
                    objects.append(ObjectRecord(where, str(thing["label"]), box))
                except (KeyError, TypeError, ValueError):
                    errors.reject(where, "it has no label and coordinates x, y, width and height")
                    objects.append(ObjectRecord(where, None, None))
            add_record(splits, file, root, ImageRecord(finder.name_of(image), image, str(file), (0, 0), objects))
    return Annotations("CreateML", None, dict(splits))
