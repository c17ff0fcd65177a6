"""Images with a class for every pixel: Pascal VOC's masks, or COCO's polygons.

VOC    SegmentationClass/*.png (a palette or grey: the value is the class, 255 is not evaluated), JPEGImages/, and the lists in
       ImageSets/Segmentation/; classes.txt or labelmap.txt names the values, background first
COCO   as `data.coco`; smaller objects are drawn over larger ones, "iscrowd" is not evaluated
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from resnetlab.data import coco
from resnetlab.data.annotated_dataset import AnnotatedDataset, arrange_annotated_splits
from resnetlab.data.decode import check_regular_file, decode_pixels
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.voc import list_voc_images, read_voc_splits
from resnetlab.errors import DataError

VOID = 255  # a pixel that is neither trained on nor evaluated
CLASS_FILES = ("classes.txt", "labelmap.txt")


class MaskSource(Protocol):
    """Where a mask comes from."""

    def read_mask(self, size: tuple[int, int]) -> Tensor:
        """uint8 (H, W), for an image of that size. Raises DataError, naming the file, if there is no such mask."""

    def update_hash(self, digest: Any) -> None:
        """Adds what decides the mask to a hash."""


@dataclass(frozen=True, eq=False)
class MaskedImage:
    """One image and the source of its mask."""

    name: str
    file: Path
    source: MaskSource

    def read(self) -> tuple[Tensor, Tensor]:
        """Pixels uint8 (H, W, 3) and mask uint8 (H, W). Raises DataError if either is unreadable or they do not fit."""
        pixels = self.read_pixels()
        return pixels, self.source.read_mask((pixels.shape[0], pixels.shape[1]))

    def read_pixels(self) -> Tensor:
        """Decodes the image, uint8 (H, W, 3). Raises DataError if it is unreadable."""
        check_regular_file(self.file)
        try:
            return decode_pixels(self.file.read_bytes(), str(self.file))
        except OSError as error:
            raise DataError(f"{self.file} cannot be read ({error.strerror}).") from error

    def update_hash(self, digest: Any) -> None:
        self.source.update_hash(digest)


@dataclass(frozen=True)
class MaskFile:
    """A mask in a file of its own."""

    file: Path
    classes: int

    def read_mask(self, size: tuple[int, int]) -> Tensor:
        check_regular_file(self.file)
        try:
            with Image.open(self.file) as image:
                image.load()
                values, mode = np.array(image), image.mode
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{self.file} cannot be read as a mask ({error}).") from error
        if mode not in ("P", "L", "1"):
            raise DataError(
                f"{self.file} has the mode {mode}; a mask is a palette or grey image whose values are classes."
            )
        if values.shape != size:
            raise DataError(
                f"{self.file} has {values.shape[1]}x{values.shape[0]} pixels, its image {size[1]}x{size[0]}; "
                "make them one size."
            )
        mask = torch.from_numpy(values.astype(np.uint8))
        if len(invalid := mask[(mask >= self.classes) & (mask != VOID)]):
            raise DataError(
                f"{self.file} has the value {int(invalid[0])}, but there are {self.classes} classes, 0 the first."
            )
        return mask

    def update_hash(self, digest: Any) -> None:
        digest.update(self.file.read_bytes())


@dataclass(frozen=True, eq=False)
class Polygons:
    """Outlines of objects in drawing order: (class, list of [x1, y1, x2, y2, …]); the class of a crowd is VOID."""

    objects: tuple[tuple[int, tuple[tuple[float, ...], ...]], ...]

    def read_mask(self, size: tuple[int, int]) -> Tensor:
        image = Image.new("L", (size[1], size[0]))
        draw = ImageDraw.Draw(image)
        for value, outlines in self.objects:
            for outline in outlines:
                draw.polygon(outline, fill=value)
        return torch.from_numpy(np.array(image))

    def update_hash(self, digest: Any) -> None:
        digest.update(repr(self.objects).encode())


def load_masks(root: Path, on_bad: str = "stop") -> AnnotatedDataset[MaskedImage]:
    """The images with masks in a folder; classes with the background first.

    Args:
        on_bad: "stop" at an invalid mask or image, or "skip" it: left out, and listed by name.

    Raises:
        DataError: the folder has neither format, files are broken or missing, or, under "stop", a mask is invalid.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give one in Pascal VOC's format or with COCO's JSON.")
    errors = ErrorPolicy(on_bad, "--on-bad-mask")
    read = _read_voc_masks if (root / "SegmentationClass").is_dir() else _read_coco_masks
    classes, splits = read(root, errors)
    return arrange_annotated_splits(str(root), classes, splits, errors)


def _read_voc_masks(root: Path, errors: ErrorPolicy) -> tuple[tuple[str, ...], dict[str, list[MaskedImage]]]:
    folder = root / "SegmentationClass"
    masks = {file.stem: file for file in sorted(folder.glob("*.png"))}
    images = list_voc_images(root / "JPEGImages")
    splits = read_voc_splits(root / "ImageSets" / "Segmentation") or {"": sorted(set(images) | set(masks))}
    pairs = {}
    for stem in dict.fromkeys(stem for stems in splits.values() for stem in stems):
        if stem not in images:
            mask = masks.get(stem, folder / f"{stem}.png")
            errors.reject(str(mask), f"its image {stem} is not in {root / 'JPEGImages'}")
        elif stem not in masks:
            errors.reject(str(images[stem]), f"it has no mask {folder / f'{stem}.png'}")
        else:
            pairs[stem] = (images[stem], masks[stem])
    classes = _read_mask_classes(root) or _number_classes([mask for _, mask in pairs.values()])
    valid = {}
    for stem, (image, file) in pairs.items():
        try:
            check_regular_file(image)
            with Image.open(image) as opened:
                width, height = opened.size
            MaskFile(file, len(classes)).read_mask((height, width))
        except DataError as error:
            errors.reject(str(file), str(error).removeprefix(f"{file} ").rstrip("."))
        except OSError as error:
            errors.reject(str(image), f"it cannot be read ({error})")
        else:
            valid[stem] = MaskedImage(f"JPEGImages/{image.name}", image, MaskFile(file, len(classes)))
    return classes, {split: [valid[stem] for stem in stems if stem in valid] for split, stems in splits.items()}


def _read_mask_classes(root: Path) -> tuple[str, ...]:
    """Class names, one a line, the background first ("name:colour:…" as in CVAT's labelmap); () without a file."""
    for file in (root / name for name in CLASS_FILES):
        if file.is_file():
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
            names = tuple(line.split(":")[0] for line in lines if line and not line.startswith("#"))
            if len(names) < 2 or len(set(names)) != len(names):
                raise DataError(f"{file} must name two or more different classes, one a line, the background first.")
            return names
    return ()


def _number_classes(files: list[Path]) -> tuple[str, ...]:
    """Names for the values that occur in masks: "background", "class 1", …"""
    largest = 0
    for file in files:
        with Image.open(file) as image:
            values = np.array(image)
        largest = max(largest, int(values[values != VOID].max(initial=0)))
    if not largest:
        raise DataError(f"the masks hold no value but 0 and {VOID}; there is no class to train on.")
    return ("background", *(f"class {i}" for i in range(1, largest + 1)))


def _read_coco_masks(root: Path, errors: ErrorPolicy) -> tuple[tuple[str, ...], dict[str, list[MaskedImage]]]:
    files = coco.find_coco_files(root)
    documents = {split: coco.read_coco_document(file) for split, file in files.items()}
    classes = coco.read_coco_classes(files, documents)
    splits: dict[str, list[MaskedImage]] = {}
    for split, file in files.items():
        values = {c["id"]: classes.index(str(c["name"])) + 1 for c in documents[split]["categories"]}
        splits[split] = [
            MaskedImage(image.name, image.file, Polygons(_read_polygons(image, file, values, errors)))
            for image in coco.list_coco_images(root, file, documents[split], split, errors)
        ]
    return ("background", *classes), splits


def _read_polygons(
    image: coco.CocoImage, source: Path, values: dict[Any, int], errors: ErrorPolicy
) -> tuple[tuple[int, tuple[tuple[float, ...], ...]], ...]:
    """The outlines of an image's objects, the largest object first; `values`: category id -> mask value."""
    objects = []
    for a in image.annotations:
        where = f"{source}, annotation {a.get('id')}"
        outlines = a.get("segmentation")
        if a.get("category_id") not in values:
            errors.reject(where, f"its category {a.get('category_id')!r} is not among the categories")
        elif not isinstance(outlines, list) or not outlines:
            errors.reject(where, "its segmentation is not a list of polygons (run lengths are not read; convert them)")
        elif any(len(o) < 6 or len(o) % 2 or not all(isinstance(v, int | float) for v in o) for o in outlines):
            errors.reject(where, "one of its polygons has fewer than three corners, or is not made of numbers")
        else:
            value = VOID if a.get("iscrowd") else values[a["category_id"]]
            shapes = tuple(tuple(float(v) for v in o) for o in outlines)
            objects.append((sum(map(_polygon_area, shapes)), (value, shapes)))
    return tuple(shape for _, shape in sorted(objects, key=lambda item: -item[0]))


def _polygon_area(outline: tuple[float, ...]) -> float:
    """Area of a polygon [x1, y1, x2, y2, …], by the shoelace formula."""
    xs, ys = outline[::2], outline[1::2]
    return abs(sum(xs[i - 1] * ys[i] - xs[i] * ys[i - 1] for i in range(len(xs)))) / 2
