"""Images in every form that people have: paths, addresses, bytes, files, Pillow images, arrays, tensors, and many of these."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from torch import Tensor, from_numpy

from resnetlab.data.array_files import as_array, convert_array
from resnetlab.data.decode import convert_image, decode, decode_as, is_image_name, list_images
from resnetlab.data.disk_split import read_image_file
from resnetlab.data.download import TIMEOUT
from resnetlab.data.object_store import is_address, is_store, open_at, refuse_password, strip_secrets
from resnetlab.data.shards import expand_braces
from resnetlab.data.tar_index import iterate_files
from resnetlab.errors import DataError, UsageError
from resnetlab.preprocessing import Preprocessing

# a file is a path, an address, the bytes of an encoded image in any buffer, or an open binary file; arrays are (H, W),
# (H, W, C) or (C, H, W), or the bytes of a file
ImageInput = Any
NamedImage = tuple[str, "ImageInput | DataError"]
KINDS = (
    "a path, an address, the bytes of a file, an open file, a Pillow image, a NumPy array or a tensor, or a list, a folder "
    "or a pattern of them"
)
MAX_BYTES = 200_000_000  # of an image behind an address
CHANNELS = (1, 3, 4)


def is_many(images: Any) -> bool:
    """Whether an input is several images: a list, an iterator, a folder, a pattern such as photos/*.jpg, tar shards, a 4-D
    array, or an array of objects, such as Ray Data's batches have.
    """
    if isinstance(images, str | os.PathLike):
        path = str(os.fspath(images))
        is_pattern = glob.has_magic(path) and not os.path.lexists(path)
        return not is_address(path) and (os.path.isdir(path) or is_pattern or _is_shard(path))
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim == 4 or (images.ndim == 1 and images.dtype == np.object_)
    return isinstance(images, Iterable) and not (
        isinstance(images, Image.Image | Mapping) or _is_file(images) or _view_buffer(images) is not None
    )


def expand_images(images: Any) -> Iterator[NamedImage]:
    """Yields the name of each image and the image, or a DataError in its place; folders are listed lazily.

    Raises UsageError for a pattern that matches nothing.
    """
    if not is_many(images):
        yield get_name(images), images
    elif isinstance(images, str | os.PathLike):
        path = str(os.fspath(images))
        if _is_shard(path):
            for shard in expand_braces(path):
                yield from _list_members(Path(shard))
            return
        paths = [path] if os.path.isdir(path) else sorted(glob.glob(path, recursive=True))
        if not paths:
            raise UsageError(f"no file matches {path}.")
        for each in paths:
            for found in list_images(Path(each)):
                yield (each if isinstance(found, DataError) else str(found)), found
    else:
        for image in images:
            try:
                yield from expand_images(image)
            except UsageError as error:  # one of many: the others are still predicted
                yield str(image), DataError(str(error))


def get_name(image: ImageInput) -> str:
    """The name of an image in predictions: its path or address (without a signature), else "image"."""
    if isinstance(image, str | os.PathLike):
        text = str(os.fspath(image))
        return strip_secrets(text) if is_address(text) else text
    return "image"


class DecodedImage(NamedTuple):
    """An image whose values were read as stored: float32 (H, W, C)."""

    pixels: Tensor


def decode_input(image: ImageInput | DataError, preprocessing: Preprocessing) -> Image.Image | DecodedImage:
    """An image for a model as `read_input` takes it again; raises as that does."""
    decoded = read_input(image, preprocessing)
    return DecodedImage(decoded) if isinstance(decoded, Tensor) else decoded


def read_input(image: ImageInput | DataError, preprocessing: Preprocessing) -> Image.Image | Tensor:
    """An image for a model: mode L or RGB, or float32 (H, W, C) where it takes values as stored.

    Raises DataError and UsageError as `read_image`.
    """
    if isinstance(image, DecodedImage):
        return image.pixels
    if not preprocessing.dtype:
        return read_image(image)
    content, name = _load_input(image)
    if isinstance(content, bytes):
        return decode_as(content, name, preprocessing.pixel_format)
    array = np.asarray(as_array(content))
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    return from_numpy(convert_array(array, preprocessing.pixel_format))


def read_image(image: ImageInput | DataError) -> Image.Image:
    """An image as mode L or RGB, upright.

    Raises DataError if it cannot be read or is such an error itself, UsageError if it is of another type.
    """
    content, name = _load_input(image)
    if isinstance(content, bytes):
        return decode(content, name)
    return convert_image(content if isinstance(content, Image.Image) else Image.fromarray(_to_uint8(content)))


def _load_input(image: ImageInput | DataError) -> tuple[Any, str]:
    """The bytes of an encoded image and its name for messages; or a Pillow image, an array or a tensor, and ""."""
    if isinstance(image, DataError):
        raise image
    if isinstance(image, str | os.PathLike) and not is_address(str(image)):
        return read_image_file(Path(image)), str(image)
    if (content := _read_encoded(image)) is not None:
        return content, strip_secrets(image) if isinstance(image, str) else "the image"
    if isinstance(image, Image.Image | np.ndarray | Tensor):
        return image, ""
    raise UsageError(f"an image is {KINDS}, not {type(image).__name__}.")


def _read_encoded(image: ImageInput) -> bytes | None:
    """The bytes of an encoded image: behind an address, in an array, an open file or a buffer; None for pixels."""
    if isinstance(image, str) and is_address(image):
        return _fetch(image)
    if isinstance(image, np.ndarray | Tensor):
        return bytes(np.asarray(image)) if image.ndim == 1 and "uint8" in str(image.dtype) else None
    if isinstance(image, Image.Image):
        return None
    return _read_file(image) if _is_file(image) else _view_buffer(image)


def _is_shard(path: str) -> bool:
    return path.endswith(".tar") and not os.path.isdir(path)


@dataclass(frozen=True)
class _TarMember:
    """An image in a tar, which is opened when the image is read."""

    tar: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def _list_members(tar: Path) -> Iterator[NamedImage]:
    """The images in a tar, in its order, named TAR/MEMBER; a damaged tar ends with an error."""
    try:
        for member in iterate_files(tar):
            if is_image_name(os.path.normpath(member.name)):
                yield f"{tar}/{member.name}", _TarMember(tar, member.offset_data, member.size)
    except DataError as error:
        yield str(tar), error


def _view_buffer(image: Any) -> bytes | None:
    """The bytes of an object with Python's buffer protocol, such as bytes or a buffer of Arrow; None for another."""
    try:
        return bytes(memoryview(image))
    except TypeError:
        return None


def _is_file(image: Any) -> bool:
    return callable(getattr(image, "read", None))


def _read_file(file: Any) -> bytes:
    try:
        content = file.read()
    except (OSError, ValueError) as error:
        raise DataError(f"the open file cannot be read: {error}.") from error
    if not isinstance(content, bytes):
        raise UsageError("an open file of an image must be opened for bytes: open(path, 'rb').")
    return content


def _fetch(url: str) -> bytes:
    """The bytes behind an address; raises DataError if there are none, or too many, UsageError for one with a password."""
    refuse_password(url)
    name = strip_secrets(url)
    try:
        request = Request(url, headers={"User-Agent": "resnetlab"}) if not is_store(url) else None
        with open_at(url, 0) if request is None else urlopen(request, timeout=TIMEOUT) as response:
            content = bytes(response.read(MAX_BYTES + 1))
    except (OSError, ValueError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it holds the connection
        reason = str(error) or type(error).__name__
        raise DataError(f"{name} cannot be downloaded ({reason}).") from error
    if len(content) > MAX_BYTES:
        raise DataError(f"{name} has more than {MAX_BYTES:,} bytes; download and shrink it.")
    return content


def _to_uint8(image: Any) -> Any:
    """An array or tensor as uint8 (H, W) or (H, W, C).

    Values are 0 to 255, or of a floating type 0 to 1. Tensors are (C, H, W), as torchvision's, and arrays (H, W, C), as
    Pillow's, unless only the other reading has 1, 3 or 4 channels.
    """
    shape = "x".join(map(str, image.shape)) or "no dimension"
    array = as_array(image)
    if array.ndim == 4 and len(array) == 1:
        array = array[0]
    if array.ndim == 3:
        first, last = array.shape[0] in CHANNELS, array.shape[-1] in CHANNELS
        if first and (isinstance(image, Tensor) or not last):
            array = np.moveaxis(array, 0, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or 0 in array.shape or (array.ndim == 3 and array.shape[-1] not in CHANNELS):
        raise UsageError(
            f"an image is an array of (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, not of {shape}."
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not np.issubdtype(array.dtype, np.number):
        raise UsageError(f"an image is an array of numbers, not of {array.dtype}.")
    low, high = float(array.min()), float(array.max())
    if np.issubdtype(array.dtype, np.floating) and low >= 0 and high <= 1:
        return (array * 255).round().astype(np.uint8)
    if np.issubdtype(array.dtype, np.integer) and low >= 0 and high <= 255:
        return array.astype(np.uint8)
    raise UsageError(
        f"the values of an image are whole numbers from 0 to 255, or of a floating type from 0 to 1; these are {array.dtype} "
        f"from {low:g} to {high:g}. Normalised images cannot be used: the model normalises them itself."
    )
