"""Images whose values are read as stored, in NumPy's types: .npy, TIFF of any number of channels and PNG of 16 bits.

    .npy     (H, W), (H, W, C) or (C, H, W), by the rule of `put_channels_last`
    TIFF     one sample per pixel by Pillow, others by tifffile: samples, planes, or pages that were written as one array
    PNG      16-bit grey by Pillow, 16-bit RGB by torchvision; alpha counts as a channel with channels=4 (or 2) only

Values are uint8, uint16, int16 or float32; those of float16 and float64 are rounded to float32, and a TIFF's of 9 to 15 bits
are scaled to 16. Ordinary images, 8-bit grey or RGB, are left to `data.decode`.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from resnetlab.errors import DataError, install_hint
from resnetlab.formatting import format_count
from resnetlab.preprocessing import MAX_CHANNELS, PixelFormat

NPY, PNG = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"  # first bytes of a file
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ALSO_FLOAT32 = ("float16", "float64")  # rounded to float32
DTYPES = ("uint8", "uint16", "int16", "float32")
LIKELY_CHANNELS = 32  # more are only found if their number is given
ORIENTATION, BITS, PHOTOMETRIC, DESCRIPTION, SAMPLES, EXTRA_SAMPLES, SAMPLE_FORMAT = 274, 258, 262, 270, 277, 338, 339
COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3, 8: 3}  # photometric interpretation -> samples that are colours
ALPHA = (1, 2)  # of extra samples: transparency
UNKNOWN_WHITE = "has {} and does not define which value is white; save it with 8 or 16 bits."
ARRAY_WRITERS = ('{"shape"', "ImageJ=", "<OME", "<?xml")  # how descriptions begin of TIFFs whose pages are one array


def read_array(content: bytes, channels: int = 0, max_pixels: int = 0) -> NDArray[Any] | None:
    """The values of an image as stored, (H, W, C); None for an ordinary image: 8-bit grey or RGB, or another format.

    Args:
        channels: how many there are, where that is known; 0 finds it.
        max_pixels: height times width; 0 for twice Pillow's limit, as for other images.

    Raises DataError for values of other types, values that are not finite, arrays whose channels are ambiguous, and without
    tifffile where it is needed.
    """
    limit = max_pixels or 2 * (Image.MAX_IMAGE_PIXELS or 2**40)
    if content.startswith(NPY):
        array: NDArray[Any] | None = put_channels_last(read_npy(content), channels)
    elif content.startswith(TIFF):
        array = _read_tiff(content, channels, limit)
    else:
        array = _read_other(content, channels, limit)
    if array is None:
        return None
    if array.dtype.name in ALSO_FLOAT32:
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
    if array.dtype.name not in DTYPES:
        bits = f"{8 * array.dtype.itemsize} bits per value" if array.dtype.kind in "iuf" else "values"
        raise DataError(f"has {bits} of type {array.dtype}; save it as {', '.join(DTYPES)}.")
    _require_size(array.shape[1], array.shape[0], limit)
    if array.shape[2] > MAX_CHANNELS or not array.size:
        raise DataError(f"has {array.shape[0]}x{array.shape[1]} pixels of {format_count(array.shape[2], 'channel')}.")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError("has values that are not finite (NaN, or beyond float32); put numbers in their place.")
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False))


def as_array(value: Any) -> Any:
    """A tensor, an image or a list as an array; bfloat16, which NumPy lacks, becomes float32."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def convert_array(array: NDArray[Any], pixel_format: PixelFormat) -> NDArray[np.float32]:
    """Pixels in memory, (H, W), (H, W, C) or (C, H, W), as values of a format that are read as stored; float32 (H, W, C).

    Integers of 32 and 64 bits are taken if they fit. Raises DataError for another number of channels or type.
    """
    array, dtype = put_channels_last(array, pixel_format.channels), pixel_format.dtype
    fits = array.dtype.name == dtype or (dtype == "float32" and array.dtype.name in ALSO_FLOAT32)
    if array.dtype.name in ("int32", "int64") and dtype != "float32":
        limits = np.iinfo(dtype)
        fits = bool(array.size) and limits.min <= array.min() <= array.max() <= limits.max
    if not fits or array.shape[2] != pixel_format.channels:
        found = f"{format_count(array.shape[2], 'channel')} of {array.dtype}"
        raise DataError(f"an image has {found}, where {pixel_format} ({dtype}) are expected.")
    values = array.astype(np.float32)
    if not np.isfinite(values).all():
        raise DataError("an image has values that are not finite (NaN, or beyond float32).")
    return np.ascontiguousarray(values)


def is_ordinary(array: NDArray[Any]) -> bool:
    """Whether an array (H, W, C) is 8-bit grey or RGB."""
    return array.dtype == np.uint8 and array.shape[2] in (1, 3)


def put_channels_last(array: NDArray[Any], channels: int) -> NDArray[Any]:
    """(H, W), (H, W, C) or (C, H, W) -> (H, W, C).

    The channels are the first or the last dimension: the one of length `channels` if that is given and one alone has it;
    else the one that is smaller than both others, and at most LIKELY_CHANNELS (the caller refuses another number than is
    given). Raises DataError where neither decides.
    """
    if array.ndim == 2:
        return array[..., None]
    shape = "x".join(map(str, array.shape))
    if array.ndim != 3:
        wanted = "an image is height x width, with its channels first or last"
        raise DataError(f"has {array.ndim} dimensions ({shape}); {wanted}.")
    first, _, last = array.shape
    smaller = [n < sorted(array.shape)[1] for n in (first, last)]
    if channels and (first == channels) != (last == channels):
        return array if last == channels else np.moveaxis(array, 0, -1)
    if any(smaller) and min(first, last) <= LIKELY_CHANNELS and channels not in (first, last):
        return array if smaller[1] else np.moveaxis(array, 0, -1)
    if channels:
        raise DataError(
            f"is an array of {shape}: neither its first nor its last dimension alone is {format_count(channels, 'channel')}."
        )
    raise DataError(f"is an array of {shape}, which does not tell its channels; give their number: --set channels=N.")


def read_npy(content: bytes) -> NDArray[Any]:
    """The array of a .npy; raises DataError where its header promises more than it has, ValueError for another file."""
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(content) - stream.tell():
        raise DataError("is damaged: it is cut short, or holds Python objects.")
    stream.seek(0)
    array: NDArray[Any] = np.load(stream, allow_pickle=False)
    return array


def _require_size(width: int, height: int, limit: int) -> None:
    if width * height > limit:
        raise DataError(f"has {width:,} x {height:,} pixels, more than {limit:,}; make it smaller.")


def _read_other(content: bytes, channels: int, limit: int) -> NDArray[Any] | None:
    """PNG of 16 bits, or RGBA if four channels are wanted; None for others."""
    is_png = content.startswith(PNG)
    depth, colours = content[24:26] if is_png and len(content) > 26 else (0, 0)  # colours: 0 for grey
    if depth != 16 and not (channels == 4 and (is_png or content[8:12] == b"WEBP")):
        return None
    with Image.open(io.BytesIO(content), formats=("PNG", "WEBP")) as image:
        _require_size(*image.size, limit)
        if depth == 16 and colours:
            return _turn_upright(_read_deep_colours(content, channels), read_orientation(image))
        if channels == 4 and image.mode == "RGBA":
            return _turn_upright(np.asarray(image), read_orientation(image))
        if not is_png or not image.mode.startswith("I"):
            return None
        values = np.asarray(image).astype(np.uint16)
        clear = image.info.get("transparency")
        values = np.where(values == clear, np.uint16(65_535), values) if isinstance(clear, int) else values
        return _turn_upright(values[..., None], read_orientation(image))


def _read_deep_colours(content: bytes, channels: int) -> NDArray[np.uint16]:
    """A PNG of 16 bits with colours or transparency, (H, W, C), on white unless its transparency is a wanted channel.

    Pillow drops the lower 8 bits.
    """
    from torchvision.io import ImageReadMode, decode_png

    try:
        array = decode_png(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.UNCHANGED).numpy()
    except RuntimeError as error:
        raise DataError("is damaged: its PNG data cannot be decoded.") from error
    values: NDArray[np.uint16] = np.moveaxis(array, 0, -1)
    if channels == values.shape[2] or values.shape[2] % 2:
        return values
    alpha = values[..., -1:] / 65_535
    on_white: NDArray[np.uint16] = np.rint(values[..., :-1] * alpha + 65_535 * (1 - alpha)).astype(np.uint16)
    return on_white


def _read_tiff(content: bytes, channels: int, limit: int) -> NDArray[Any] | None:
    try:
        image = Image.open(io.BytesIO(content), formats=("TIFF",))
    except UnidentifiedImageError:  # of more channels than Pillow knows
        return _read_tiff_array(content, channels, limit)
    with image:
        tags, pages = image.tag_v2, image.n_frames  # type: ignore[attr-defined]
        samples, bits = tags.get(SAMPLES, 1), max(tags.get(BITS, (1,)))
        if count_tiff_channels(image) or (pages > 1 and (bits > 8 or channels == pages)):
            return _read_tiff_array(content, channels, limit)
        if bits <= 8 and not (channels == samples == 4):
            return None
        _require_size(*image.size, limit)
        if samples > 1:
            return _read_tiff_array(content, channels, limit)
        values, kind = np.asarray(image), tags.get(SAMPLE_FORMAT, (1,))[0]
        if bits == 16 and kind == 2 and image.mode == "I":
            values = values.astype(np.int16)
        elif image.mode == "I":
            raise DataError(UNKNOWN_WHITE.format("32 bits per value"))
        values = _fill_sixteen_bits(values[..., None], bits, tags.get(PHOTOMETRIC) == 0)
        return _turn_upright(values, read_orientation(image))


def _fill_sixteen_bits(values: NDArray[Any], bits: int, white_is_zero: bool) -> NDArray[Any]:
    """Values (H, W, C) with 0 as black, those of 9 to 15 bits scaled to 16: images of several depths are then of one scale."""
    if values.dtype.kind == "u" and values.shape[2] == 1 and white_is_zero:
        values = values.dtype.type((1 << bits) - 1) - values
    return values << (16 - bits) if values.dtype == np.uint16 and 8 < bits < 16 else values


def count_tiff_channels(image: Image.Image) -> int:
    """The channels of a TIFF that has others than grey or colours, and transparency, by its header; 0 for all others."""
    tags, pages = image.tag_v2, image.n_frames  # type: ignore[attr-defined]
    if pages > 1 and str(tags.get(DESCRIPTION, "")).startswith(ARRAY_WRITERS):
        return int(pages)
    samples, extra = int(tags.get(SAMPLES, 1)), tags.get(EXTRA_SAMPLES, (0,))
    extra = extra if isinstance(extra, tuple) else (extra,)
    others = samples - COLOURS.get(tags.get(PHOTOMETRIC, 1), samples)
    return 0 if others < 1 or (others == 1 and extra[0] in ALPHA) else samples


def _read_tiff_array(content: bytes, channels: int, limit: int) -> NDArray[Any]:
    """A TIFF's first image, (H, W, C), whose channels are samples, planes, or the pages of one array."""
    try:
        import tifffile
    except ImportError:
        hint = install_hint("tiff")
        raise DataError(f"is a TIFF of several channels or pages; to read it, install: {hint}") from None
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series, page = file.series[0], file.pages.first
        _require_size(page.imagewidth, page.imagelength, limit)
        _require_size(series.size // (channels or LIKELY_CHANNELS), 1, limit)
        axes, orientation = series.axes, page.tags.get(ORIENTATION)
        array, bits, white_is_zero = np.asarray(series.asarray(maxworkers=1)), page.bitspersample, page.photometric == 0
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and (found := [axes.index(c) for c in "SC" if c in axes]):
        array = np.moveaxis(array, found[0], -1)
    elif array.ndim == 3 and "Q" in axes:
        array = put_channels_last(array, channels)
    elif array.ndim == 3 and channels == len(array):
        array = np.moveaxis(array, 0, -1)
    else:
        shape = "x".join(map(str, array.shape))
        hint = f"; channels={len(array)} takes its pages as channels" * (array.ndim == 3)
        raise DataError(f"has several pages ({shape}){hint}, or save the one that is the image.")
    array = _fill_sixteen_bits(array, int(bits), white_is_zero)
    return _turn_upright(array, 1 if orientation is None else int(orientation.value))


def read_orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if the metadata have none or are broken."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # whatever Pillow raises: the pixels are intact
        return 1


def _turn_upright(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """(H, W, C), turned by a value of EXIF's orientation, from 1 to 8."""
    if orientation in (5, 6, 7, 8):
        array = array.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array
