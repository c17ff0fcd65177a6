"""Pictures with a class for every pixel: Pascal VOC's masks, or COCO's polygons.

VOC    SegmentationClass/*.png (a palette or grey: the value is the class, 255 is not judged), JPEGImages/, and the lists in
       ImageSets/Segmentation/; the names of the values stand in classes.txt or labelmap.txt, background first
COCO   as `data.coco`; later pixels of smaller objects lie on top, "iscrowd" is not judged
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from residuum.data import coco
from residuum.data.decode import decode_pixels
from residuum.data.parts import Checker, Parts, arrange
from residuum.data.voc import picture_files, split_lists
from residuum.errors import DataError

VOID = 255  # a pixel that is neither trained on nor judged
NAMES = ("classes.txt", "labelmap.txt")


class Source(Protocol):
    """Where a mask comes from."""

    def mask(self, size: tuple[int, int]) -> Tensor:
        """uint8 (H, W), for a picture of that size. Raises DataError, naming the file, where it cannot be that."""

    def feed(self, digest: Any) -> None:
        """Feeds a hash with what decides the mask."""


@dataclass(frozen=True, eq=False)
class Masked:
    """One picture and where its mask comes from."""

    name: str
    file: Path
    source: Source

    def read(self) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (H, W, 3) and mask uint8 (H, W). Raises DataError where either cannot be read or they do not fit."""
        try:
            pixels = decode_pixels(self.file.read_bytes(), str(self.file))
        except OSError as error:
            raise DataError(f"{self.file} cannot be read ({error.strerror}).") from error
        return pixels, self.source.mask((pixels.shape[0], pixels.shape[1]))

    def feed(self, digest: Any) -> None:
        self.source.feed(digest)


@dataclass(frozen=True)
class Painted:
    """A mask in a file of its own."""

    file: Path
    classes: int

    def mask(self, size: tuple[int, int]) -> Tensor:
        try:
            with Image.open(self.file) as picture:
                picture.load()
                values, mode = np.array(picture), picture.mode
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{self.file} cannot be read as a mask ({error}).") from error
        if mode not in ("P", "L", "1"):
            raise DataError(
                f"{self.file} has the mode {mode}; a mask is a palette or grey picture whose values are classes."
            )
        if values.shape != size:
            raise DataError(
                f"{self.file} has {values.shape[1]}x{values.shape[0]} pixels, its picture {size[1]}x{size[0]}; "
                "make them one size."
            )
        mask = torch.from_numpy(values.astype(np.uint8))
        if len(strange := mask[(mask >= self.classes) & (mask != VOID)]):
            raise DataError(
                f"{self.file} has the value {int(strange[0])}, but there are {self.classes} classes, 0 the first."
            )
        return mask

    def feed(self, digest: Any) -> None:
        digest.update(self.file.read_bytes())


@dataclass(frozen=True, eq=False)
class Polygons:
    """The outlines of objects, to be filled in their order: (class, list of [x1, y1, x2, y2, …]); class VOID for a crowd."""

    objects: tuple[tuple[int, tuple[tuple[float, ...], ...]], ...]

    def mask(self, size: tuple[int, int]) -> Tensor:
        picture = Image.new("L", (size[1], size[0]))
        draw = ImageDraw.Draw(picture)
        for value, outlines in self.objects:
            for outline in outlines:
                draw.polygon(outline, fill=value)
        return torch.from_numpy(np.array(picture))

    def feed(self, digest: Any) -> None:
        digest.update(repr(self.objects).encode())


def load(root: Path, on_bad: str = "stop") -> Parts[Masked]:
    """The masked pictures in a folder; classes with the background first.

    Args:
        on_bad: "stop" at what cannot be right, or "skip" it: left out, and listed by name.

    Raises:
        DataError: nothing of either form, files that are broken or missing, and under "stop" every bad mask.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one in Pascal VOC's form or with COCO's JSON.")
    checker = Checker(on_bad, "--on-bad-mask")
    classes, parts = (_voc if (root / "SegmentationClass").is_dir() else _coco)(root, checker)
    return arrange(str(root), classes, parts, checker.skipped)


def _voc(root: Path, checker: Checker) -> tuple[tuple[str, ...], dict[str, list[Masked]]]:
    folder = root / "SegmentationClass"
    masks = {file.stem: file for file in sorted(folder.glob("*.png"))}
    pictures = picture_files(root / "JPEGImages")
    lists = split_lists(root / "ImageSets" / "Segmentation") or {"": sorted(set(pictures) | set(masks))}
    pairs = {}
    for stem in dict.fromkeys(stem for names in lists.values() for stem in names):
        if stem not in pictures:
            checker.bad(
                str(masks.get(stem, folder / f"{stem}.png")), f"its picture {stem} is not in {root / 'JPEGImages'}"
            )
        elif stem not in masks:
            checker.bad(str(pictures[stem]), f"it has no mask {folder / f'{stem}.png'}")
        else:
            pairs[stem] = (pictures[stem], masks[stem])
    classes = _names(root) or _numbered([file for _, file in pairs.values()])
    kept = {}
    for stem, (picture, file) in pairs.items():
        try:
            with Image.open(picture) as opened:
                width, height = opened.size
            Painted(file, len(classes)).mask((height, width))
        except DataError as error:
            checker.bad(str(file), str(error).removeprefix(f"{file} ").rstrip("."))
        except OSError as error:
            checker.bad(str(picture), f"it cannot be read ({error})")
        else:
            kept[stem] = Masked(f"JPEGImages/{picture.name}", picture, Painted(file, len(classes)))
    return classes, {split: [kept[stem] for stem in names if stem in kept] for split, names in lists.items()}


def _names(root: Path) -> tuple[str, ...]:
    """The classes' names, one a line, the background first ("name:colour:…" as in CVAT's labelmap); () where no file says."""
    for file in (root / name for name in NAMES):
        if file.is_file():
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
            names = tuple(line.split(":")[0] for line in lines if line and not line.startswith("#"))
            if len(names) < 2 or len(set(names)) != len(names):
                raise DataError(f"{file} must name two or more different classes, one a line, the background first.")
            return names
    return ()


def _numbered(files: list[Path]) -> tuple[str, ...]:
    """Names for the values that occur: "background", "class 1", …"""
    most = 0
    for file in files:
        with Image.open(file) as picture:
            values = np.array(picture)
        most = max(most, int(values[values != VOID].max(initial=0)))
    if not most:
        raise DataError(f"the masks hold no value but 0 and {VOID}; there is no class to learn.")
    return ("background", *(f"class {i}" for i in range(1, most + 1)))


def _coco(root: Path, checker: Checker) -> tuple[tuple[str, ...], dict[str, list[Masked]]]:
    found = coco.split_files(root)
    documents = {split: coco.document(file) for split, file in found.items()}
    classes = coco.categories(found, documents)
    parts: dict[str, list[Masked]] = {}
    for split, file in found.items():
        value = {c["id"]: classes.index(str(c["name"])) + 1 for c in documents[split]["categories"]}
        parts[split] = [
            Masked(image.name, image.file, Polygons(_objects(image, file, value, checker)))
            for image in coco.images(root, file, documents[split], split, checker)
        ]
    return ("background", *classes), parts


def _objects(
    image: coco.Image, source: Path, value: dict[Any, int], checker: Checker
) -> tuple[tuple[int, tuple[tuple[float, ...], ...]], ...]:
    """The filled outlines of an image, large ones first."""
    found = []
    for a in image.annotations:
        where = f"{source}, annotation {a.get('id')}"
        outlines = a.get("segmentation")
        if a.get("category_id") not in value:
            checker.bad(where, f"its category {a.get('category_id')!r} is not among the categories")
        elif not isinstance(outlines, list) or not outlines:
            checker.bad(where, "its segmentation is no list of polygons (run lengths are not read; convert them)")
        elif any(len(o) < 6 or len(o) % 2 or not all(isinstance(v, int | float) for v in o) for o in outlines):
            checker.bad(where, "a polygon of it has fewer than three corners, or is not made of numbers")
        else:
            label = VOID if a.get("iscrowd") else value[a["category_id"]]
            shapes = tuple(tuple(float(v) for v in o) for o in outlines)
            found.append((sum(map(_area, shapes)), (label, shapes)))
    return tuple(shape for _, shape in sorted(found, key=lambda each: -each[0]))


def _area(outline: tuple[float, ...]) -> float:
    """Of a polygon, by the shoelace formula."""
    xs, ys = outline[::2], outline[1::2]
    return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
