"""Images in every form that people have: paths, addresses, bytes, files, Pillow images, arrays, tensors, and many of these."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image
from torch import Tensor

from resnetlab.data.decode import convert_image, decode, list_images
from resnetlab.data.download import TIMEOUT, strip_query
from resnetlab.data.remote_shards import is_url
from resnetlab.errors import DataError, UsageError

# a file is a path, an address, the bytes of an encoded image, or an open binary file; arrays are (H, W), (H, W, C) or (C, H, W)
ImageInput = Any
KINDS = (
    "a path, an address, the bytes of a file, an open file, a Pillow image, a NumPy array or a tensor, or a list, a folder "
    "or a pattern of them"
)
MAX_BYTES = 200_000_000  # of an image behind an address
CHANNELS = (1, 3, 4)


def is_many(images: Any) -> bool:
    """Whether an input is several images: a list, an iterator, a folder, a pattern such as photos/*.jpg, or a 4-D array."""
    if isinstance(images, str | os.PathLike):
        path = os.fspath(images)
        return not is_url(str(path)) and (os.path.isdir(path) or _is_pattern(str(path)))
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim == 4
    return (
        isinstance(images, Iterable)
        and not isinstance(images, bytes | bytearray | Image.Image)
        and not _is_file(images)
    )


def expand_images(images: Any) -> Iterator[tuple[str, ImageInput | DataError]]:
    """Yields the name of each image and the image, or a DataError in its place; folders are listed lazily.

    Raises UsageError for a pattern that matches nothing.
    """
    if not is_many(images):
        yield get_name(images), images
    elif isinstance(images, str | os.PathLike):
        path = str(os.fspath(images))
        paths = [path] if os.path.isdir(path) else sorted(glob.glob(path, recursive=True))
        if not paths:
            raise UsageError(f"no file matches {path}.")
        for each in paths:
            for found in list_images(Path(each)):
                yield (each if isinstance(found, DataError) else str(found)), found
    else:
        for image in images:
            yield from expand_images(image)


def get_name(image: ImageInput) -> str:
    """The name of an image in predictions: its path or address (without a signature), else "image"."""
    if isinstance(image, str | os.PathLike):
        text = str(os.fspath(image))
        return strip_query(text) if is_url(text) else text
    return "image"


def read_image(image: ImageInput | DataError) -> Image.Image:
    """An image as mode L or RGB, upright.

    Raises DataError if it cannot be read or is such an error itself, UsageError if it is of another type.
    """
    if isinstance(image, DataError):
        raise image
    if isinstance(image, Image.Image):
        return convert_image(image)
    if isinstance(image, str) and is_url(image):
        return decode(_fetch(image), strip_query(image))
    if isinstance(image, str | os.PathLike):
        return decode(Path(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(bytes(image))
    if isinstance(image, np.ndarray | Tensor):
        return convert_image(Image.fromarray(_to_uint8(image)))
    if _is_file(image):
        return decode(_read_file(image))
    raise UsageError(f"an image is {KINDS}, not {type(image).__name__}.")


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not os.path.lexists(path)


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
    """The bytes behind an address; raises DataError if there are none, or too many."""
    name = strip_query(url)
    try:
        with urlopen(Request(url, headers={"User-Agent": "resnetlab"}), timeout=TIMEOUT) as response:
            content = bytes(response.read(MAX_BYTES + 1))
    except (OSError, ValueError, HTTPException) as error:
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
    array = image.detach().cpu().numpy() if isinstance(image, Tensor) else image
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
