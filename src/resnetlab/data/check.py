"""Checks a data set: decodes every image in full and reports problems by file name.

Memory holds less than a kilobyte per image, whatever its size. Kinds of problems:

    unreadable       the file is missing, damaged, not an image, implausibly large, or of other channels than the first image
    suspicious       it can be read, but is damaged (for JPEGs only the extra `fast` finds that), tiny, very narrow, of one
                     colour, has another format's suffix, or Pillow warns of it
    duplicate        the same bytes as another image of the same split and class
    near-duplicate   nearly the same image (resized, compressed again), likewise
    conflict         the same or nearly the same image in another class, or with others
    leak             the same or nearly the same image in another split
    stray            an image beside the class folders
    layout           the folder cannot be read as a data set at all
    annotation       a box, outline or mask that cannot be used
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from resnetlab.data import folder
from resnetlab.data.annotations import AnnotatedImage
from resnetlab.data.array_files import NPY
from resnetlab.data.box_dataset import load_boxes
from resnetlab.data.dataset import Dataset, Split
from resnetlab.data.decode import decode, decode_as, find_damage, has_deep_values
from resnetlab.data.disk_split import DiskSplit, FileNames, FileSource
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.label_sets import join_classes
from resnetlab.data.layouts import Layout
from resnetlab.data.mask_dataset import MaskedImage, load_masks
from resnetlab.data.mask_files import VOID
from resnetlab.data.prefetch import prefetch
from resnetlab.errors import DataError, DataErrors
from resnetlab.formatting import format_count, format_list
from resnetlab.preprocessing import RGB, PixelFormat, render_pixels

MIN_SIDE = 16  # pixels: an image with a smaller side is reported
MAX_RATIO = 10  # of the longer to the shorter side: more is reported
MIN_DEVIATION = 2.0  # grey levels: an image with less is of one colour
GRADIENT_STEP = 4  # grey levels: a smaller step is noise, which compressing a plain border again changes
THUMBNAIL_SIDE = 16  # pixels
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    **{name: (f".{name.lower()}",) for name in ("PNG", "GIF", "WEBP", "BMP")},
}
CHUNK = 32  # images that a worker checks at once
MAX_DISTANCE = 8  # of 128 gradient bits: near copies differ in no more
MIN_CORRELATION = 0.995  # of the thumbnails of near copies
BLOCK = 2048  # images compared at once
BANDS = MAX_DISTANCE + 1  # near copies agree in all bits of at least one of so many bands
SET_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # of each byte


@dataclass(frozen=True)
class ImageInfo:
    """Properties of an image that can be read.

    Attributes:
        kind: format and mode of the file, "JPEG RGB".
        size: (width, height) in pixels, upright.
        content_hash: hash of the file's bytes (or of the pixels in memory).
        gradient_bits: a 128-bit difference hash: where the image gets brighter, to the right and downwards, on a grid of
            8 x 8; near copies differ in few bits. None for an image of one colour or of few pixels, which resembles many.
        suspicious: what is suspicious, in words.
        thumbnail: if there are gradient bits, the image in THUMBNAIL_SIDE x THUMBNAIL_SIDE grey levels, one byte each.
    """

    kind: str
    size: tuple[int, int]
    content_hash: bytes
    gradient_bits: int | None
    suspicious: tuple[str, ...] = ()
    thumbnail: bytes = b""


class Problem(NamedTuple):
    """Something to fix."""

    kind: str
    file: str
    detail: str


class CheckedImage(NamedTuple):
    """One image of the data set."""

    split: str
    name: str  # as in a quarantine list
    file: str  # as in messages
    label: str
    info: ImageInfo | None


@dataclass
class CheckReport:
    """The result of `check_dataset`.

    Attributes:
        images: split -> how many were checked; `readable` of all could be read.
        classes: split -> class -> how many images; of boxes, how many of them. An image may have several classes.
        layout: of boxes or masks, what was found, "COCO, 2 splits, 128 images, 80 classes"; empty for class folders.
        kinds: "JPEG RGB" -> how many.
        shorter_sides: smallest, median and largest shorter side, in pixels; None if no image could be read.
        quarantine: names of images to leave out of training: the unreadable ones, and of every group of copies all but one;
            of copies in two splits the training images, of copies in two classes all training images.
    """

    data: str
    images: dict[str, int] = field(default_factory=dict)
    readable: int = 0
    problems: list[Problem] = field(default_factory=list)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    shorter_sides: tuple[int, float, int] | None = None
    quarantine: list[str] = field(default_factory=list)
    layout: str = ""

    @property
    def total(self) -> int:
        """Images of all splits."""
        return sum(self.images.values())

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return {
            "data": self.data,
            "layout": self.layout,
            "images": self.total,
            "readable": self.readable,
            "problems": [problem._asdict() for problem in self.problems],
            "classes": self.classes,
            "kinds": self.kinds,
            "shorter_sides": list(self.shorter_sides) if self.shorter_sides else None,
        }


def check_dataset(
    data: Dataset, workers: int = 0, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckReport:
    """Checks every image of a data set.

    Args:
        workers: processes that decode.
        on_progress: called with the number of checked images and of all images.
    """
    data = read_as_found(data)
    splits = {name: split for name, split in data.splits.items() if name != "all"}
    report = CheckReport(data.name)
    if few := data.describe_few_images():
        report.problems.append(Problem("layout", data.name, few))
    report.classes = {name: _count_classes(split, data.classes, data.label_sets) for name, split in splits.items()}
    labels = data.classes
    if data.label_sets is not None:
        sets = data.label_sets.bool().tolist()
        labels = tuple(join_classes(compress(data.classes, each)) or "none" for each in sets)
        if missing := [name for name, n in report.classes.get("train", {}).items() if not n]:
            names = f"no image to train on has the class {format_list(missing)}; add some, or leave the class out."
            report.problems.append(Problem("layout", data.name, names))
    check_splits(report, splits, labels, workers, on_progress)
    return report


def check_layout(
    data: str, error: DataError, workers: int = 0, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> CheckReport:
    """Checks what `error` keeps from being a data set: all problems of its layout, and the images of a folder's classes.

    Other arguments as those of `check_dataset`.
    """
    found, root = error.problems if isinstance(error, DataErrors) else (str(error),), Path(data)
    report = CheckReport(data, problems=[Problem("layout", data, sentence) for sentence in found])
    if isinstance(error, DataErrors) and root.is_dir():
        with warnings.catch_warnings(action="ignore"):  # loading has warned
            layouts, _ = folder.read_layouts(root)
        classes = tuple(sorted({name for layout in layouts.values() for name in layout.classes}))
        number = {name: i for i, name in enumerate(classes)}
        splits: dict[str, Split] = {}
        for name, layout in layouts.items():
            labels = torch.tensor([number[each] for each in layout.classes], dtype=torch.long)
            splits[name or "all"] = DiskSplit(layout.source(root), torch.arange(len(labels)), labels)
        report.classes = {name: _count_classes(split, classes) for name, split in splits.items()}
        check_splits(report, splits, classes, workers, on_progress)
    return report


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


def _count_classes(split: Split, classes: tuple[str, ...], label_sets: Tensor | None = None) -> dict[str, int]:
    counts = split.labels.bincount(minlength=len(classes if label_sets is None else label_sets))
    if label_sets is not None:
        counts = counts.double() @ label_sets.double()
    return dict(zip(classes, counts.long().tolist(), strict=True))


def read_as_found(data: Dataset) -> Dataset:
    """The data set with its images read as the first readable one is (`data.decode`), as training does."""
    split = data.train if len(data.train) else data.test
    if isinstance(split, DiskSplit):
        split = replace(split, errors=ErrorPolicy("skip"))
    return data.with_pixel_format(split.find_pixel_format())


def check_splits(
    report: CheckReport,
    splits: dict[str, Split],
    labels: tuple[str, ...],
    workers: int,
    on_progress: Callable[[int, int], None],
) -> None:
    """Decodes the images of all splits, and adds what is found to a report; `labels` are the words for their labels."""
    report.images = {name: len(split) for name, split in splits.items()}
    readable, kinds, sides = [], Counter[str](), []
    for image, problem in _check_images(splits, labels, workers):
        if problem is not None:
            report.problems.append(problem)
            report.quarantine.append(image.name)
        elif image.info is not None:
            readable.append(image)
            kinds[image.info.kind] += 1
            sides.append(min(image.info.size))
            report.problems += [Problem("suspicious", image.file, words) for words in image.info.suspicious]
        on_progress(len(readable) + len(report.quarantine), report.total)
    report.readable, report.kinds = len(readable), dict(kinds.most_common())
    report.shorter_sides = (min(sides), median(sides), max(sides)) if sides else None
    for first, second, near in find_copies(readable):
        report.problems.append(_describe_copy(first, second, near))
        differ = first.split != second.split or first.label != second.label
        copies = (first, second) if differ else (second,)
        report.quarantine += [image.name for image in copies if image.split == "train"]
    report.quarantine = list(dict.fromkeys(report.quarantine))


@dataclass(frozen=True, eq=False)
class _ChunkCheck:
    """Checks CHUNK images from an index on. Picklable, so that workers can run it."""

    split: Split

    def __call__(self, start: int) -> list[ImageInfo | str]:
        return [self._check(i) for i in range(start, min(start + CHUNK, len(self.split)))]

    def _check(self, i: int) -> ImageInfo | str:
        if not isinstance(self.split, DiskSplit):
            return check_pixels(self.split.read_image(i))
        try:
            return check_file(*self.split.read_file(i), self.split.pixel_format)
        except DataError as error:
            return str(error)


def _check_images(
    splits: dict[str, Split], classes: tuple[str, ...], workers: int
) -> Iterator[tuple[CheckedImage, Problem | None]]:
    """Yields every image, with a problem if it cannot be read."""
    for name, split in splits.items():
        starts = range(0, len(split), CHUNK)
        names, labels = split.names, split.labels.tolist()
        results = (result for chunk in prefetch(_ChunkCheck(split), starts, workers) for result in chunk)
        for i, result in enumerate(results):
            file = split.source.display_name(int(split.indices[i])) if isinstance(split, DiskSplit) else names[i]
            info = result if isinstance(result, ImageInfo) else None
            image = CheckedImage(name, names[i], file, classes[labels[i]], info)
            yield image, Problem("unreadable", file, result) if isinstance(result, str) else None


def check_file(content: bytes, name: str, pixel_format: PixelFormat = RGB) -> ImageInfo:
    """Decodes an encoded image in full; raises DataError if it cannot be read."""
    if pixel_format.dtype:
        shown = render_pixels(decode_as(content, name, pixel_format))
        return _describe_image(shown, f"{os.path.splitext(name)[1][1:].upper()} {pixel_format}", content, [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = decode(content, name)
        kind, mode, metadata, is_deep = "NPY", image.mode, "", False
        with Image.open(io.BytesIO(content)) if not content.startswith(NPY) else contextlib.nullcontext() as header:
            kind, mode = (header.format or "?", header.mode) if header else (kind, mode)
            is_deep = header is not None and has_deep_values(header)
            try:
                _ = header and header.getexif()
            except Exception as error:  # the pixels are intact, but the metadata are not
                metadata = f"its EXIF cannot be read and counts as absent: {error or type(error).__name__}"
    suspicious = [
        f"Pillow says: {str(w.message).strip()}" for w in caught if not issubclass(w.category, DeprecationWarning)
    ]
    if metadata:
        suspicious.append(metadata)
    if is_deep:
        suspicious.append("its values have more than 8 bits and are scaled to 8")
    if (damage := find_damage(content, kind)) is not None:
        suspicious.append(f"it is damaged, though it can be read: {damage}")
    suffix = os.path.splitext(name)[1].lower()
    if kind in SUFFIXES and suffix and suffix not in SUFFIXES[kind]:
        suspicious.append(f"it is a {kind} file but is called {suffix}")
    return _describe_image(image, f"{kind} {mode}", content, suspicious)


def check_pixels(pixels: Tensor) -> ImageInfo:
    """Checks a decoded image (H, W, C)."""
    image, mode = render_pixels(pixels), f"of {format_count(pixels.shape[2], 'channel')}"
    mode = image.mode if pixels.dtype == torch.uint8 else mode
    return _describe_image(image, f"pixels {mode}", pixels.numpy().tobytes(), [])


def _describe_image(image: Image.Image, kind: str, content: bytes, suspicious: list[str]) -> ImageInfo:
    width, height = image.size
    content_hash = hashlib.blake2b(content, digest_size=16).digest()
    if min(width, height) < MIN_SIDE and not kind.startswith("pixels"):
        suspicious.append(f"it is tiny: {width}x{height} pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        suspicious.append(f"it is very narrow: {width}x{height} pixels")
    if min(width, height) < MIN_SIDE:  # too few pixels to distinguish similarity from chance
        return ImageInfo(kind, image.size, content_hash, None, tuple(suspicious))
    grey = image.convert("L")
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    if across.std() < MIN_DEVIATION:
        if np.asarray(grey).std() < MIN_DEVIATION:
            suspicious.append("it is of one colour")
        return ImageInfo(kind, image.size, content_hash, None, tuple(suspicious))
    bits = np.concatenate([(np.diff(across) > GRADIENT_STEP).ravel(), (np.diff(down, axis=0) > GRADIENT_STEP).ravel()])
    gradient_bits = int.from_bytes(np.packbits(bits).tobytes(), "big")
    thumbnail = grey.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX).tobytes()
    return ImageInfo(kind, image.size, content_hash, gradient_bits, tuple(suspicious), thumbnail)


def find_copies(images: list[CheckedImage]) -> Iterator[tuple[CheckedImage, CheckedImage, bool]]:
    """Yields (first, copy, whether only nearly) of images that show the same: each copy once, with the first of its group."""
    first_with: dict[bytes, CheckedImage] = {}
    hashed: list[CheckedImage] = []
    bits, thumbnails = list[int](), list[bytes]()
    for image in images:
        info = image.info
        assert info is not None
        if (first := first_with.setdefault(info.content_hash, image)) is not image:
            yield first, image, False
        elif info.gradient_bits is not None:
            hashed.append(image)
            bits.append(info.gradient_bits)
            thumbnails.append(info.thumbnail)
    firsts = find_near_copies(bits, thumbnails)
    for i, first_index in enumerate(firsts.tolist()):
        if first_index != i:
            yield hashed[first_index], hashed[i], True


def find_near_copies(gradient_bits: Sequence[int], thumbnails: Sequence[bytes]) -> NDArray[np.int64]:
    """For each image the index of the first that is nearly the same, int64 (N,): its own index if there is no other.

    Two are nearly the same if at most MAX_DISTANCE of their 128 gradient bits differ and their thumbnails correlate: the bits
    alone are no proof, since a shared background makes most of them equal. Only images that agree in a whole band of bits are
    compared; the most informative bits are distributed over all bands, so that none consists of background.
    """
    first = np.arange(len(gradient_bits))
    if not len(gradient_bits):
        return first
    packed = np.frombuffer(b"".join(s.to_bytes(16, "big") for s in gradient_bits), np.uint8).reshape(-1, 16)
    bits = np.unpackbits(packed, axis=1)
    pixels = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(len(gradient_bits), -1)
    by_information = np.argsort(np.abs(bits.mean(0) - 0.5), kind="stable")
    for band in range(BANDS):
        keys = np.packbits(bits[:, by_information[band::BANDS]], axis=1)  # (N, 2)
        number = keys.astype(np.int64) @ (256 ** np.arange(keys.shape[1]))
        order = np.argsort(number, kind="stable")  # indices stay ascending within a group
        for group in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
            for start in range(0, len(group), BLOCK):
                later = group[start : start + BLOCK]
                for before in range(0, start + 1, BLOCK):
                    earlier = group[before : before + BLOCK]
                    np.minimum.at(first, *_near_pairs(later, earlier, pixels, packed))
    return first


def _near_pairs(
    later: NDArray[np.int64], earlier: NDArray[np.int64], pixels: NDArray[np.uint8], bits: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of near copies among `later`, and for each the index of an image among `earlier` that it is a copy of."""
    if len(later) == len(earlier) == 1 and later[0] == earlier[0]:
        return later[:0], later[:0]
    one, other = np.nonzero(_standardize(pixels[later]) @ _standardize(pixels[earlier]).T >= MIN_CORRELATION)
    one, other = later[one], earlier[other]
    near = (other < one) & (SET_BITS[bits[one] ^ bits[other]].sum(1) <= MAX_DISTANCE)
    return one[near], other[near]


def _standardize(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Vectors of mean 0 and length 1, so that their products are correlations."""
    x = thumbnails.astype(np.float32)
    x -= x.mean(1, keepdims=True)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    return x


def _describe_copy(first: CheckedImage, second: CheckedImage, near: bool) -> Problem:
    words = f"{'nearly ' if near else ''}the same image as {first.file}"
    if first.split != second.split:
        return Problem("leak", second.file, f"{words}, which is in {first.split}")
    if first.label != second.label:
        return Problem("conflict", second.file, f"{words}, which is of class {first.label}, not {second.label}")
    return Problem("near-duplicate" if near else "duplicate", second.file, words)


def find_unexpected_files(data: Dataset) -> list[Problem]:
    """Images beside the class folders of a folder, and files inside them that may be images of an unsupported kind."""
    split = data.train if len(data.train) else data.test
    root = Path(data.name)
    if not isinstance(split, DiskSplit) or not isinstance(split.source, FileSource) or not root.is_dir():
        return []  # a table or an archive lists its images
    split_folders = folder.find_split_folders(root).values()
    flat = {name for split in data.splits.values() for name in split.names if name.count(os.sep) == 1}
    loose = [
        os.path.join(place, name)
        for place in dict.fromkeys([root, *split_folders])
        for name in folder.find_loose_images(place)
        if os.path.relpath(os.path.join(place, name), root) not in flat
    ]
    unsupported = [
        os.path.join(place, name) for place in split_folders for name in folder.find_unsupported_files(place)
    ]
    kind = "it is of a kind that is not read, or has no suffix; save it as JPEG or PNG"
    return [
        *(Problem("stray", file, "it is beside the class folders and belongs to no class") for file in loose),
        *(Problem("stray", file, kind) for file in unsupported),
    ]
