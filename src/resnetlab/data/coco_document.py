"""Reads a COCO document entry by entry, so that of a million objects memory holds the numbers, not the JSON's objects."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from resnetlab.data.decode import check_regular_file
from resnetlab.data.text_files import find_encoding
from resnetlab.errors import DataError

CHUNK = 2**20  # characters that are read at once
REQUIRED = {"images": ("id", "file_name"), "categories": ("id", "name"), "annotations": ("image_id",)}
IMAGE_KEYS = ("id", "file_name", "width", "height")
SPACE = re.compile(r"[\s,]*")


class CocoAnnotation(NamedTuple):
    """One of `annotations`.

    Attributes:
        image_id, category_id, bbox: as the file has them; a bbox of numbers is an array.
        segmentation: None if it was not wanted; polygons of numbers are arrays.
    """

    number: int
    id: Any
    image_id: Any
    category_id: Any
    bbox: Any
    segmentation: Any
    crowd: bool

    def describe(self, source: Path) -> str:
        """File and entry, for messages."""
        return f"{source}, " + (f"entry {self.number} of annotations" if self.id is None else f"annotation {self.id}")


@dataclass
class CocoDocument:
    """The content of a document."""

    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[CocoAnnotation]


def read_coco_document(file: Path, masks: bool) -> CocoDocument:
    """The JSON of a split; outlines are kept only if masks are wanted or there is no box.

    Raises DataError if it is broken or not a COCO document.
    """
    found: dict[str, list[Any]] = {}
    for key, number, entry in _iterate_entries(file):
        entries = found.setdefault(key, [])
        if number < 0:  # an empty list
            continue
        if not isinstance(entry, dict):
            raise DataError(f"{file} is not a COCO document: its {key!r} is not a list of objects.")
        if missing := [name for name in REQUIRED[key] if name not in entry]:
            raise DataError(f"{file}: entry {number} of {key!r} has no {missing[0]!r}.")
        if key == "annotations":
            entries.append(_compact(number, entry, masks))
        else:
            entries.append({name: entry[name] for name in IMAGE_KEYS if name in entry} if key == "images" else entry)
    for key in ("images", "annotations", "categories"):
        if key not in found:
            raise DataError(f"{file} is not a COCO document: its {key!r} is not a list of objects.")
    return CocoDocument(found["images"], found["categories"], found["annotations"])


def _compact(number: int, entry: dict[str, Any], masks: bool) -> CocoAnnotation:
    segmentation = entry.get("segmentation") if masks or not entry.get("bbox") else None
    if isinstance(segmentation, list):
        segmentation = [_to_array(polygon) for polygon in segmentation]
    crowd = entry.get("iscrowd") in (1, "1", "true")
    ids = entry.get("id"), entry.get("image_id"), entry.get("category_id")
    return CocoAnnotation(number, *ids, _to_array(entry.get("bbox")), segmentation, crowd)


def _to_array(values: Any) -> Any:
    """Numbers as an array; anything else as it is."""
    try:
        return array("d", values) if isinstance(values, list) else values
    except (TypeError, OverflowError):
        return values


def _iterate_entries(file: Path) -> Iterator[tuple[str, int, Any]]:
    """Yields (key, position, entry) of the three lists of a document; an empty list yields position -1."""
    check_regular_file(file)
    try:
        with file.open("rb") as start:
            encoding = find_encoding(start.read(4))
        stream = file.open(encoding=encoding)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    with stream:
        yield from _iterate_lists(file, _Text(file, stream))


def _iterate_lists(file: Path, text: _Text) -> Iterator[tuple[str, int, Any]]:
    if text.peek() != "{":
        raise DataError(f"{file} is not a COCO document: it is no JSON object.")
    text.skip(1)
    while (mark := text.peek()) != "}":
        key = text.decode() if mark == '"' else None
        if not isinstance(key, str) or text.peek() != ":":
            raise text.error("a key was expected")
        text.skip(1)
        if key not in REQUIRED:
            text.peek()
            text.decode()
            continue
        if text.peek() != "[":
            raise DataError(f"{file} is not a COCO document: its {key!r} is not a list of objects.")
        text.skip(1)
        number = 0
        while text.peek() != "]":
            yield key, number, text.decode()
            number += 1
        text.skip(1)
        if not number:
            yield key, -1, None


class _Text:
    """A JSON text of which only a window is in memory."""

    def __init__(self, file: Path, stream: TextIO) -> None:
        self._file, self._stream = file, stream
        self._decoder = json.JSONDecoder()
        self._window, self._at, self._passed = "", 0, 0

    def _read_more(self) -> bool:
        """Adds to the window at least as much as it has; False at the end of the file."""
        self._passed += self._at
        self._window, self._at = self._window[self._at :], 0
        try:
            more = self._stream.read(max(CHUNK, len(self._window)))
        except (UnicodeError, OSError) as error:
            raise DataError(f"{self._file} is not valid UTF-8 ({error}); write it again.") from error
        self._window += more
        return bool(more)

    def peek(self) -> str:
        """The next character that is neither space nor comma; raises DataError at the end of the file."""
        while True:
            space = SPACE.match(self._window, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._window):
                return self._window[self._at]
            if not self._read_more():
                raise self.error("it ends too early")

    def skip(self, count: int) -> None:
        """Passes over characters."""
        self._at += count

    def decode(self) -> Any:
        """The next value; raises DataError if it is broken."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
            except RecursionError:
                raise self.error("it is nested too deeply") from None
            except ValueError as error:
                if self._read_more():
                    continue
                raise self.error(str(error).partition(": line")[0]) from None
            if end == len(self._window) and self._read_more():  # a number may go on
                continue
            self._at = end
            return value

    def error(self, reason: str) -> DataError:
        """What is wrong at the current place."""
        return DataError(
            f"{self._file} is broken JSON ({reason}, at character {self._passed + self._at:,}); write it again."
        )
