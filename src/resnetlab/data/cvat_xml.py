"""CVAT's own XML, "CVAT for images 1.1": one annotations.xml and the images, together or in a folder for each split.

<annotations><meta>…<label><name>round</name></label>…</meta>
  <image name="frames/a.png" subset="Train" width="640" height="480">
    <box label="round" xtl="1" ytl="2" xbr="30" ybr="40" rotation="15"/> <polygon label="round" points="1,2;30,2;30,40"/>
    <ellipse label="round" cx="9" cy="9" rx="5" ry="4"/>
    <mask label="round" rle="3, 5, 2" left="1" top="2" width="5" height="2"/>
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from resnetlab.data.annotations import Annotations, Box, ImageRecord, ObjectRecord
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.file_lookup import ImageFinder, find_split, list_subfolders
from resnetlab.data.object_masks import ellipse_corners, encode_mask, turn_corners
from resnetlab.data.text_files import PEEKED_FILES, peek_text, read_bytes
from resnetlab.errors import DataError
from resnetlab.formatting import format_count

NO_REGIONS = ("polyline", "points", "cuboid", "skeleton")


def find_cvat_files(root: Path) -> list[Path]:
    """The XML files that are CVAT's, sorted: in a folder itself, or else in the folders of its splits."""
    for folders in ([root], [folder for folder in list_subfolders(root) if find_split(folder.name)]):
        files = sorted(file for folder in folders for file in folder.glob("*.[xX][mM][lL]") if file.is_file())
        if found := [file for file in files[:PEEKED_FILES] if re.search(r"<annotations[\s>]", peek_text(file))]:
            return found
    return []


def read_cvat(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """The images of each subset with their shapes; one without a shape is background."""
    splits: dict[str, list[ImageRecord]] = {}
    classes: dict[str, None] = {}
    finder, left_out = ImageFinder(root), Counter[str]()
    for file in find_cvat_files(root):
        try:
            document = ElementTree.fromstring(read_bytes(file))
        except (ElementTree.ParseError, ValueError, LookupError) as error:  # an unknown encoding is a LookupError
            raise DataError(f"{file} is broken XML ({error}); export it again.") from None
        if document.find("track") is not None:
            raise DataError(f'{file} is CVAT\'s XML for video; export "CVAT for images 1.1" or "COCO 1.0".')
        folder = finder.folder_of(file)
        places = [f"{folder}/{inner}".strip("/") for inner in ("", "images", "data")]
        classes |= dict.fromkeys(name.text or "" for name in document.findall("meta//label/name"))
        for item in document.findall("image"):
            name, where = item.get("name") or "", f"{file}, image {item.get('name')}"
            subset = find_split(item.get("subset") or file.stem)  # Datumaro writes a file for each subset
            subset = subset or find_split(file.parent.name if file.parent != root else "")
            image = finder.find(name, (*places, *(f"images/{s}" for s in [item.get("subset")] if s)))
            size = (_read_pixels(item, "height"), _read_pixels(item, "width"))
            if image is None or 0 in size:
                missing = f"its image does not exist below {root}" if image is None else "it has no width and height"
                errors.reject(where, missing)
                continue
            left_out.update(shape.tag for shape in item if shape.tag in NO_REGIONS)
            objects = [
                _read_region(shape, f"{where}, {shape.tag} {number}", size, errors)
                for number, shape in enumerate(item, 1)
                if shape.tag in SHAPES
            ]
            splits.setdefault(subset, []).append(ImageRecord(finder.name_of(image), image, str(file), size, objects))
    notes = [f"{format_count(n, tag)} enclosing no area left out" for tag, n in sorted(left_out.items())]
    return Annotations("CVAT", tuple(filter(None, classes)) or None, dict(splits), tuple(notes))


def _read_pixels(item: ElementTree.Element, key: str) -> int:
    text = item.get(key) or ""
    return int(text) if text.isdecimal() else 0


def _read_region(shape: ElementTree.Element, where: str, size: tuple[int, int], errors: ErrorPolicy) -> ObjectRecord:
    try:
        return ObjectRecord(where, shape.attrib["label"], *SHAPES[shape.tag](shape, size))
    except KeyError as error:
        errors.reject(where, f"it has no {error.args[0]}")
    except (ValueError, OverflowError) as error:  # an infinite number is an OverflowError
        errors.reject(where, f"its shape cannot be used: {error}")
    return ObjectRecord(where, None, None)


def _read_numbers(shape: ElementTree.Element, *keys: str) -> list[float]:
    return [float(shape.attrib[key]) for key in keys]


def _turn_outline(
    shape: ElementTree.Element, corners: Sequence[tuple[float, float]], pivot: tuple[float, float]
) -> list[list[float]]:
    """One polygon, turned about a point by the shape's rotation in degrees, clockwise."""
    turned = turn_corners(corners, pivot, math.radians(float(shape.get("rotation") or 0)))
    return [[v for corner in turned for v in corner]]


def _read_rectangle(shape: ElementTree.Element, size: tuple[int, int]) -> tuple[Box | None, Any]:
    x1, y1, x2, y2 = _read_numbers(shape, "xtl", "ytl", "xbr", "ybr")
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    outline = _turn_outline(shape, corners, ((x1 + x2) / 2, (y1 + y2) / 2))
    return None if float(shape.get("rotation") or 0) else (x1, y1, x2, y2), outline


def _read_ellipse(shape: ElementTree.Element, size: tuple[int, int]) -> tuple[None, Any]:
    x, y, rx, ry = _read_numbers(shape, "cx", "cy", "rx", "ry")
    return None, _turn_outline(shape, ellipse_corners(x, y, rx, ry), (x, y))


def _read_mask(shape: ElementTree.Element, size: tuple[int, int]) -> tuple[None, Any]:
    """Run lengths row by row inside a box, the first outside the object."""
    left, top, width, height = (int(v) for v in _read_numbers(shape, "left", "top", "width", "height"))
    if width * height > size[0] * size[1]:
        raise ValueError(f"its box of {width}x{height} pixels is larger than the image of {size[1]}x{size[0]}")
    lengths = [int(v) for v in shape.attrib["rle"].split(",")]
    if min((width, height, *lengths)) < 0 or sum(lengths) != width * height:
        raise ValueError(f"its run lengths are for {sum(lengths):,} pixels, its box has {width}x{height}")
    inside = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(height, width)
    return None, encode_mask(inside, left, top, size)


# what gives the box and the segmentation of a shape, in an image of (height, width)
SHAPES: Mapping[str, Callable[[ElementTree.Element, tuple[int, int]], tuple[Box | None, Any]]] = {
    "box": _read_rectangle,
    "polygon": lambda shape, _: (None, [[float(v) for v in re.split("[;,]", shape.attrib["points"])]]),
    "ellipse": _read_ellipse,
    "mask": _read_mask,
}
