"""From a request's body to prepared images. Nothing is written to disk; file names are only echoed."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import torch
from PIL import Image, UnidentifiedImageError
from python_multipart.multipart import parse_options_header
from torch import Tensor

from resnetlab.data.decode import convert_image, decode_as, decode_pixels, read_plain_size
from resnetlab.device import release_memory
from resnetlab.errors import DataError
from resnetlab.preprocessing import RGB, PixelFormat
from resnetlab.serve.limits import MAX_IMAGES, Limits, RequestError

# The Pillow formats that photographs come in; some of the others start programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
FIELD = "image"
LARGE = 2**24  # pixels; memory of larger images is returned to the system, that of smaller ones is reused
MAX_NAME = 200  # characters of a file name that are echoed
MAX_HEAD = 16_384  # bytes of the headers of a form's part
# of a body that is an image: no type, any bytes, or what curl's --data-binary and Python's urllib say unless another is given
RAW_TYPES = (b"", b"application/octet-stream", b"application/x-www-form-urlencoded")
ENCODED_NAME = re.compile(rb"filename\*=(utf-8|iso-8859-1)'[^']*'([^\s;]*)", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Upload:
    """An uploaded image, prepared for the network, or the reason why it cannot be."""

    name: str
    image: Any  # what `prepare` returned; None where there is an error
    error: RequestError | None


def decode_uploads(
    content_type: str,
    body: bytes,
    prepare: Callable[[Any], Any],
    limits: Limits,
    cancelled: Callable[[], bool] = lambda: False,
    pixel_format: PixelFormat = RGB,
) -> list[Upload]:
    """The prepared images of a request, in order; stops decoding once `cancelled` returns true.

    Args:
        pixel_format: `prepare` gets Pillow images or uint8 (H, W, 3); values as stored, float32 (H, W, C), where it says so.

    Raises RequestError where the request as a whole is wrong: its type, its form, its number of images.
    """
    return [
        _decode_upload(name, content, prepare, limits, pixel_format)
        for name, content in split_body(content_type, body)
        if not cancelled()
    ]


def split_body(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of each image of a body, which is an image or a form."""
    kind, options = parse_options_header(content_type)
    if not body:
        raise RequestError(400, "the body is empty; send an image.")
    if kind == b"multipart/form-data":
        return _parse_form(body, options.get(b"boundary", b""))
    if kind.startswith(b"image/") or kind in RAW_TYPES:
        return [("image", body)]
    raise RequestError(
        415,
        f"{kind.decode(errors='replace')[:MAX_NAME]} is not an image type; send image/jpeg, image/png, …, "
        f"application/octet-stream, or multipart/form-data with files.",
    )


def _parse_form(body: bytes, boundary: bytes) -> list[tuple[str, bytes]]:
    """The images of a form: its files, whatever their fields are called, and other fields called FIELD.

    Parts are found by searching, which takes as long for any content; parsers that look at single bytes may hold Python's
    lock for seconds.
    """
    images: list[tuple[str, bytes]] = []
    delimiter = b"--" + boundary
    at = body.find(delimiter) if boundary else -1
    if at < 0:
        raise RequestError(400, "the form cannot be read (its boundary is not in it).")
    at += len(delimiter)
    while body[at : at + 2] != b"--":
        head_end = body.find(b"\r\n\r\n", at, at + MAX_HEAD)
        end = body.find(b"\r\n" + delimiter, head_end + 2)
        if head_end < 0 or end < 0:
            raise RequestError(400, "the form is cut short, or the head of a part is too long.")
        if len(images) == MAX_IMAGES:
            raise RequestError(413, f"a request may contain {MAX_IMAGES} images; send more requests.")
        images.append((_read_part_name(body[at:head_end]), body[head_end + 4 : end]))
        at = end + 2 + len(delimiter)
    if not images:
        raise RequestError(422, "the form contains no image; send it as a file in a field of any name.")
    return images


def _read_part_name(head: bytes) -> str:
    """The file name of a form's part from its headers. Raises RequestError for a part that is no image."""
    headers = dict(line.lower().partition(b":")[::2] for line in head.split(b"\r\n") if b":" in line)
    if headers.get(b"content-transfer-encoding", b"binary").strip() not in (b"binary", b"7bit", b"8bit"):
        raise RequestError(415, "a part of the form is encoded; send its bytes as they are.")
    disposition = next((line for line in head.split(b"\r\n") if line.lower().startswith(b"content-disposition:")), b"")
    options = parse_options_header(disposition.partition(b":")[2].strip())[1]
    field, name = options.get(b"name", b"").decode(errors="replace"), options.get(b"filename")
    if encoded := ENCODED_NAME.search(disposition):  # RFC 5987, as clients send names that are not ASCII
        return unquote(encoded[2].decode("latin-1"), encoded[1].decode("latin-1"), "replace")[:MAX_NAME]
    if name is None and field != FIELD:
        raise RequestError(
            422,
            f"unknown field {field[:MAX_NAME]!r}; images are sent as files, values in the address, as /predict?top=3.",
        )
    return (name or b"image").decode(errors="replace")[:MAX_NAME]


def unpack_body(body: bytes, encoding: str, limits: Limits) -> bytes:
    """A body without its content encoding, gzip or deflate, within the limit of all bodies."""
    for coding in reversed([part.strip().lower() for part in encoding.split(",")][:3]):
        if coding in ("", "identity"):
            continue
        if coding not in ("gzip", "x-gzip", "deflate"):
            raise RequestError(
                415, f"the content encoding {coding[:MAX_NAME]} is not read; send the body as it is, or as gzip.",
                headers={"accept-encoding": "gzip, deflate, identity"},
            )  # fmt: skip
        unpacker = zlib.decompressobj(zlib.MAX_WBITS + (32 if "gzip" in coding else 0))
        try:
            body = unpacker.decompress(body, limits.max_body + 1)
        except zlib.error as error:
            raise RequestError(400, f"the body is not {coding}, as its content encoding says ({error}).") from error
        if len(body) > limits.max_body:
            raise RequestError(413, f"the unpacked body is larger than {limits.max_body / 1e6:g} MB; send less.")
        if not unpacker.eof:
            raise RequestError(400, f"the {coding} body is cut short.")
        if unpacker.unused_data:
            raise RequestError(400, f"the {coding} body goes on after its end; send one part.")
    return body


def _decode_upload(
    name: str, content: bytes, prepare: Callable[[Any], Any], limits: Limits, pixel_format: PixelFormat
) -> Upload:
    try:
        if not content:
            raise RequestError(400, "the image is empty.")
        image = _read_stored(content, limits, pixel_format) if pixel_format.dtype else _decode_image(content, limits)
        height, width = image.shape[:2] if isinstance(image, Tensor) else (image.height, image.width)
        prepared, large = prepare(image), width * height > LARGE
    except RequestError as error:
        return Upload(name, None, error)
    if large:
        del image
        release_memory(torch.device("cpu"))
    return Upload(name, prepared, None)


def _read_stored(content: bytes, limits: Limits, pixel_format: PixelFormat) -> Tensor:
    """An image's values as stored, float32 (H, W, C)."""
    try:
        return decode_as(content, "the image", pixel_format, limits.max_pixels)
    except DataError as error:
        raise RequestError(422, str(error)) from error


def _decode_image(content: bytes, limits: Limits) -> Image.Image | Tensor:
    """A Pillow image, or uint8 (H, W, 3) of a JPEG."""
    size = read_plain_size(content)
    try:
        # most images: Pillow takes longer to read a header
        if size is not None and math.prod(size) <= limits.max_pixels:
            return decode_pixels(content, "the image")
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # reads the header only
            width, height = image.size
            if width * height > limits.max_pixels:
                raise RequestError(
                    413,
                    f"the image has {width:,} x {height:,} pixels, more than {limits.max_pixels:,}; make it smaller.",
                )
            if image.format == "JPEG":  # faster with the extra `fast`
                return decode_pixels(content, "the image")
            return convert_image(image)
    except UnidentifiedImageError:
        raise RequestError(415, f"this is not an image that can be read ({', '.join(FORMATS)}).") from None
    except Image.DecompressionBombError:
        raise RequestError(413, f"the image has more than {limits.max_pixels:,} pixels; make it smaller.") from None
    except DataError as error:
        raise RequestError(422, str(error)) from error
    except RequestError:
        raise
    except Exception as error:  # the headers of some formats raise any exception
        raise RequestError(422, f"the image is damaged: {str(error)[:MAX_NAME] or type(error).__name__}") from error
