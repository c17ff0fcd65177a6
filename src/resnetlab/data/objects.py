"""Data sets from Python objects: lists of (path, label), arrays, PyTorch's and Hugging Face's data sets, and `hf:NAME`.

[("a/1.jpg", "cat"), …]                  paths, read as a table is (data.tables)
(X, y)                                   arrays or tensors: images (N, H, W) or (N, H, W, C), uint8 or floats in [0, 1];
                                         of other numbers of channels or values: uint8, uint16, int16 or float32
                                         several classes per image: y (N, classes) of 0 and 1, or lists of names
torch.utils.data.Dataset                 items (image, label); a PIL image, an array or a tensor
datasets.Dataset                         a column of images and one of labels
{"train": …, "val": …, "test": …}        splits of any of these
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from resnetlab.data import tables
from resnetlab.data.array_files import DTYPES, as_array, convert_array, put_channels_last
from resnetlab.data.dataset import Columns, Dataset, MemorySplit, Split
from resnetlab.data.decode import convert_image, decode, decode_as, find_pixel_format
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.folder import arrange_splits, guess_split, require_classes
from resnetlab.data.label_sets import LabelLists, number_label_sets
from resnetlab.errors import DataError, UsageError, first_line, missing_package
from resnetlab.formatting import format_count
from resnetlab.preprocessing import RGB, PixelFormat, pil_to_tensor

PREFIX, HUB = "python:", "hf:"  # of the names of data sets that were given as objects, and of Hugging Face's
HASHED = 64  # images of a split whose pixels are in its fingerprint


@dataclass(frozen=True, eq=False)
class ObjectSplit(Split):
    """Images that an object gives one by one.

    Attributes:
        items: `items[i]` holds image i; `image_of` takes the image from it.
        indices: positions in `items`, int64 (N,).
    """

    items: Any
    image_of: Any
    indices: Tensor
    labels: Tensor
    name: str
    errors: ErrorPolicy = field(default_factory=ErrorPolicy)
    workers: int = 0
    columns: Columns = field(default_factory=dict)
    pixel_format: PixelFormat = RGB

    @property
    def names(self) -> Sequence[str]:
        return [f"{self.name}/{i}" for i in self.indices.tolist()]

    def name_of(self, i: int) -> str:
        return f"{self.name}/{int(self.indices[i])}"

    def read_image(self, i: int) -> Tensor:
        try:
            return to_pixels(self.image_of(self.items[int(self.indices[i])]), self.pixel_format)
        except Exception as error:  # the object may raise anything
            raise DataError(f"image {self.name_of(i)} cannot be read ({error}).") from error

    def find_pixel_format(self, channels: int = 0) -> PixelFormat:
        for item in self.indices[:1].tolist():
            try:
                return find_object_format(self.image_of(self.items[item]), channels)
            except UsageError:
                raise
            except Exception:  # the object may raise anything, which reading it reports
                break
        return PixelFormat(channels or 3)

    def _select(self, indices: Tensor) -> dict[str, Any]:
        return {"indices": self.indices[indices]}

    def update_hash(self, digest: Any) -> None:
        """Hashes the labels, the positions and the pixels of some images; an unreadable one counts as such."""
        digest.update(self.labels.numpy().tobytes() + self.indices.numpy().tobytes())
        for i in np.linspace(0, len(self) - 1, min(HASHED, len(self))).astype(int).tolist():
            try:
                digest.update(self.read_image(i).numpy().tobytes())
            except DataError:
                digest.update(b"unreadable")


def to_pixels(image: Any, pixel_format: PixelFormat = RGB) -> Tensor:
    """An image as an object gives it -> uint8 (H, W, 3), or as `pixel_format` says.

    A PIL image, a path, bytes, or an array or tensor (H, W), (H, W, C) or (C, H, W) with values 0 to 255, or floats in [0, 1].
    """
    if isinstance(image := _load_bytes(image), bytes):
        return decode_as(image, "the image", pixel_format)
    if pixel_format.dtype:
        return torch.from_numpy(convert_array(as_array(image), pixel_format))
    if isinstance(image, str | Path):
        image = decode(Path(image))
    elif not isinstance(image, Image.Image):
        array = _to_uint8(torch.as_tensor(as_array(image)))
        if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[2] not in (1, 3):
            array = array.permute(1, 2, 0)  # channels first, as torchvision's ToTensor
        image = Image.fromarray(array.squeeze(-1).numpy() if array.ndim == 3 else array.numpy())
    return pil_to_tensor(convert_image(image).convert("RGB" if pixel_format.channels == 3 else "L"))


def _load_bytes(image: Any) -> Any:
    """The bytes of an image that is in a file or undecoded (as Hugging Face's may be); any other image as it is."""
    if isinstance(image, Mapping):
        image = image["bytes"] if image.get("bytes") is not None else image["path"]
    return Path(image).read_bytes() if isinstance(image, str | Path) and Path(image).is_file() else image


def find_object_format(image: Any, channels: int = 0) -> PixelFormat:
    """How the values of an image that an object gives are read; raises UsageError for another number of channels."""
    if isinstance(image := _load_bytes(image), bytes):
        try:
            return find_pixel_format(image, "the first image", channels)
        except DataError as error:
            raise UsageError(str(error)) from error
    if channels in (0, 1, 3):
        try:
            if not (isinstance(image, Image.Image) and image.mode.startswith(("I", "F"))) or channels == 3:
                to_pixels(image)
                return PixelFormat(channels or 3)
        except (DataError, TypeError):  # of more channels, or beyond 8 bits
            pass
    try:
        found = _find_stored_format(as_array(image), channels)
    except DataError as error:
        raise UsageError(f"the first image cannot be read: it {error}") from error
    if channels not in (0, found.channels):
        raise UsageError(f"the images have {found}, not {format_count(channels, 'channel')}.")
    return found


def _find_stored_format(array: NDArray[Any], channels: int = 0) -> PixelFormat:
    """The format of one image's values as they are; raises DataError for another type, or if its channels are ambiguous."""
    if array.dtype.name not in DTYPES:
        known = ", ".join(DTYPES)
        raise DataError(
            f"has values of {array.dtype}, not 0 to 255 or floats from 0 to 1; others are given as {known}."
        )
    return PixelFormat(put_channels_last(array, channels).shape[2], array.dtype.name)


def _to_uint8(values: Tensor) -> Tensor:
    """Values 0 to 255, or floats in [0, 1]; raises DataError for others."""
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.uint16:  # in which torch compares nothing
        values = values.to(torch.int32)
    low, high = float(values.min()), float(values.max())
    if not values.is_floating_point() and values.dtype != torch.bool and 0 <= low <= high <= 255:
        return values.to(torch.uint8)
    if not (values.is_floating_point() and 0 <= low <= high <= 1):
        raise DataError(
            f"images have values 0 to 255, or floats from 0 to 1, not {values.dtype} from {low:g} to {high:g}."
        )
    return values.mul(255).round().to(torch.uint8)


def dataset_from_object(data: Any, read_options: ReadOptions | None = None) -> Dataset:
    """The data set in an object (above); its name is "python:" and a hash of its content.

    Raises:
        UsageError: an object of another kind.
        DataError: labels or images that cannot be used.
    """
    read_options = read_options or ReadOptions()
    if isinstance(data, Dataset):
        return data
    parts = dict(data) if isinstance(data, Mapping) else {"": data}
    named = [guess_split(str(name)) if name else "" for name in parts]
    if not parts or len(set(named)) < len(parts) or ("" in named and (len(parts) > 1 or "" not in parts)):
        raise UsageError(
            f"a dictionary of data has the splits train, val and test, not {', '.join(map(str, parts)) or 'none'}."
        )
    if all(map(_is_path_list, parts.values())):
        return _name_by_content(_load_path_lists(parts, read_options))
    found = {name: _read_part(part) for name, part in zip(named, parts.values(), strict=True)}
    several = [labels for _, labels, _ in found.values() if isinstance(labels, LabelLists)]
    if 0 < len(several) < len(found):
        raise DataError("some splits have one label per image, others several; give all the same kind.")
    every = {label for _, labels, _ in found.values() for label in labels}
    class_names = {name for labels in several for name in labels.classes} if several else every
    classes = require_classes("the data", class_names, read_options)
    if all(label.isdecimal() for label in classes):
        classes.sort(key=int)
    number, label_sets = {label: i for i, label in enumerate(classes)}, None
    if several:
        number, label_sets = number_label_sets(every, classes)
    splits: dict[str, Split] = {}
    for name, (items, texts, image_of) in found.items():
        labels = torch.tensor([number[unicodedata.normalize("NFC", text)] for text in texts])
        place = name or "images"
        if image_of is None:
            splits[name] = MemorySplit(items.images, labels, place, dtype=items.dtype)
        else:
            errors, everything = ErrorPolicy(read_options.on_bad), torch.arange(len(labels))
            split = ObjectSplit(items, image_of, everything, labels, place, errors, read_options.workers)
            splits[name] = split.with_pixel_format(split.find_pixel_format())
    return _name_by_content(arrange_splits("the data", tuple(classes), splits, label_sets))


def _load_path_lists(parts: Mapping[Any, Any], read_options: ReadOptions) -> Dataset:
    """The data set of lists of (path, label), by split: that of a table with these paths."""
    rows = [(str(path), label, str(name)) for name, part in parts.items() for path, label in part]
    paths, labels, splits = zip(*rows, strict=True)
    texts = _label_texts(labels, None)
    classes = texts.classes if isinstance(texts, LabelLists) else ()
    images = tables.ImageList("the list", Path(), paths, texts, splits, classes=classes)
    return tables.load_listed(images, read_options)


def _name_by_content(data: Dataset) -> Dataset:
    return replace(data, name=f"{PREFIX}{data.fingerprint}")


def _is_path_list(data: Any) -> bool:
    if not isinstance(data, list) or not data:
        return False
    pairs = all(isinstance(item, list | tuple) and len(item) == 2 for item in data)
    return pairs and all(isinstance(path, str | Path) for path, _ in data)


def _read_part(data: Any) -> tuple[Any, list[str], Any]:
    """(images, labels as text, function that takes the image from one of them; None for a tensor of all images)."""
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(each, "__len__") for each in data):
        return _read_arrays(*data)
    if hasattr(data, "features") and hasattr(data, "column_names"):  # datasets.Dataset
        return _read_hugging_face(data)
    if isinstance(data, Sized) and hasattr(data, "__getitem__") and not isinstance(data, str | bytes) and len(data):
        labels = getattr(data, "targets", None)
        if labels is None or len(labels) != len(data):
            labels = [_take(data[i], 1) for i in range(len(data))]
        return data, _label_texts(labels, getattr(data, "classes", None)), partial(_take, position=0)
    raise UsageError(
        f"data is a name, a folder, a table, a list of (path, label), arrays (X, y), a PyTorch or Hugging Face data set, or a "
        f"dictionary of splits, not {type(data).__name__}{'; give its dataset' if hasattr(data, 'dataset') else ''}."
    )


def _take(item: Any, position: int) -> Any:
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise DataError(f"items of a data set are (image, label), not {type(item).__name__}.")
    return item[position]


class _Pixels(NamedTuple):
    """Images of one size, uint8 or float32 (N, H, W, C), and the type of values as stored."""

    images: Tensor
    dtype: str = ""


def _read_arrays(images: Any, labels: Any) -> tuple[Any, list[str], Any]:
    if isinstance(images, list | tuple):  # which as one array would be of a type that holds the values of all
        arrays = [as_array(image) for image in images]
        for i, each in enumerate(arrays):
            if each.dtype != arrays[0].dtype:
                kinds = f"image {i} has values of {each.dtype}, image 0 of {arrays[0].dtype}"
                raise DataError(f"{kinds}; give all images the same type.")
            if each.shape != arrays[0].shape:
                shapes = f"image {i} is an array of {each.shape}, image 0 of {arrays[0].shape}"
                raise DataError(f"{shapes}; give them one size, or a list of (image, label).")
    array = as_array(images)
    if array.ndim not in (3, 4) or not array.size:
        raise DataError(f"images are an array (N, H, W) or (N, H, W, C), or channels first, not {array.shape}.")
    pixels = _read_eight_bits(array) or _stack_stored(array)
    texts = _label_texts(labels, None)
    if len(texts) != len(pixels.images):
        counts = f"{format_count(len(pixels.images), 'image')} and {format_count(len(texts), 'label')}"
        raise DataError(f"there are {counts}; give one label per image.")
    return pixels, texts, None


def _read_eight_bits(array: NDArray[Any]) -> _Pixels | None:
    """Images of 1 or 3 channels whose values are 0 to 255, or floats in [0, 1]; None for others."""
    shape = array.shape
    if array.ndim == 4 and not {shape[1], shape[3]} & {1, 3}:
        return None
    try:
        pixels = _to_uint8(torch.as_tensor(array))
    except DataError:
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise
        return None
    if array.ndim == 4 and shape[3] not in (1, 3):
        pixels = pixels.permute(0, 2, 3, 1)
    return _Pixels((pixels[..., None] if array.ndim == 3 else pixels).contiguous())


def _stack_stored(array: NDArray[Any]) -> _Pixels:
    """Images of any number of channels, whose values are taken as they are."""
    try:
        first = _find_stored_format(array[0])
    except DataError as error:
        raise DataError(f"the first image {error}") from error
    return _Pixels(torch.stack([torch.from_numpy(convert_array(image, first)) for image in array]), first.dtype)


def _read_hugging_face(data: Any) -> tuple[Any, list[str], Any]:
    usual = {
        use: [name for name in data.column_names if name.lower() in names] for use, names in tables.USUAL_NAMES.items()
    }
    images = [n for n in data.column_names if type(data.features[n]).__name__ == "Image"] or usual["path"]
    labels = [n for n in data.column_names if type(data.features[n]).__name__ == "ClassLabel"] or usual["label"]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(data.column_names)
        raise UsageError(f"a data set has one column of images and one of labels, called label; these are {columns}.")
    names = getattr(data.features[labels[0]], "names", None)
    return data, _label_texts(data[labels[0]], names), itemgetter(images[0])


def _label_texts(labels: Any, names: Sequence[str] | None) -> list[str]:
    """Labels as text: names, or numbers where there are none. Raises DataError for one that is neither, or has no name."""
    if (several := _read_label_lists(labels, names)) is not None:
        return several
    values = labels.tolist() if hasattr(labels, "tolist") else [getattr(v, "item", lambda v=v: v)() for v in labels]
    values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in values]  # 1.0, as NumPy's files have it
    for i, value in enumerate(values):
        if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
            raise DataError(f"label {i} is {value!r}; labels are names or whole numbers.")
    return [_name_class(value, names, i) for i, value in enumerate(values)]


def _name_class(value: str | int, names: Sequence[str] | None, i: int) -> str:
    """The name of a class of image i; raises DataError for a number that has none."""
    if not names or isinstance(value, str):
        return str(value)
    if not 0 <= value < len(names):
        raise DataError(f"label {i} is {value}, but {format_count(len(names), 'class')} are named, counted from 0.")
    return str(names[value])


def _read_label_lists(labels: Any, names: Sequence[str] | None) -> LabelLists | None:
    """Labels of several classes each: an array (N, C) of 0 and 1, or a list of classes per image; None if each has one.

    Raises DataError for values that are neither.
    """
    lists = [
        hasattr(row, "__len__") and not isinstance(row, str) and getattr(row, "shape", None) != () for row in labels
    ]
    if not any(lists):
        return None
    if not all(lists):
        raise DataError("some images have one label, others a list of them; give a list for every image.")
    rows = [row.tolist() if hasattr(row, "tolist") else list(row) for row in labels]
    width, values = len(rows[0]), {value for row in rows for value in row}
    if width > 1 and values <= {0, 1} and all(len(row) == width for row in rows):
        classes = [str(name) for name in names or range(width)]
        return LabelLists(([c for c, value in zip(classes, row, strict=True) if value] for row in rows), classes)
    if hasattr(labels[0], "tolist") or not all(
        isinstance(value, str | int) and not isinstance(value, bool) for value in values
    ):
        raise DataError(
            "labels of several classes are an array (images, classes) of 0 and 1, or for every image a list of names."
        )
    return LabelLists([_name_class(value, names, i) for value in row] for i, row in enumerate(rows))


def load_hugging_face(name: str, read_options: ReadOptions) -> Dataset:
    """The data set `hf:NAME` or `hf:NAME:CONFIGURATION` of the Hugging Face hub, or one that `save_to_disk` wrote."""
    try:
        import datasets
    except ImportError:
        raise missing_package(name, "datasets", "datasets") from None
    place, _, configuration = name.removeprefix(HUB).partition(":")
    try:
        if Path(place).is_dir() and any(Path(place).glob("*.json")):
            loaded = datasets.load_from_disk(place)
        else:
            loaded = datasets.load_dataset(place, configuration or None)
    except Exception as error:  # of many kinds, by what is missing
        raise DataError(f"{name} cannot be loaded ({first_line(error)}).") from error
    splits = loaded
    if isinstance(loaded, Mapping):
        splits = {key: part for key, part in loaded.items() if guess_split(key)} or dict(loaded)
    return replace(dataset_from_object(splits, read_options), name=name)
