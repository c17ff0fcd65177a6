"""From a request's body to prepared images. Nothing is written to disk; file names are only echoed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser, parse_options_header

from resnetlab.data.decode import convert_image, decode_pixels
from resnetlab.device import release_memory
from resnetlab.errors import DataError
from resnetlab.serve.limits import MAX_IMAGES, Limits, RequestError

# The Pillow formats that photographs come in; some of the others start programs (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
FIELD = "image"
LARGE = 2**24  # pixels; memory of larger images is returned to the system, that of smaller ones is reused
MAX_NAME = 200  # characters of a file name that are echoed


@dataclass(frozen=True, eq=False)
class Upload:
    """An uploaded image, prepared for the network, or the reason why it cannot be."""

    name: str
    image: Any  # what `prepare` returned; None where there is an error
    error: RequestError | None


def decode_uploads(
    content_type: str,
    body: bytes,
    prepare: Callable[[Image.Image], Any],
    limits: Limits,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Upload]:
    """The prepared images of a request, in order; stops decoding once `cancelled` returns true.

    Raises RequestError where the request as a whole is wrong: its type, its form, its number of images.
    """
    return [
        _decode_upload(name, content, prepare, limits)
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
    if kind.startswith(b"image/") or kind in (b"", b"application/octet-stream"):
        return [("image", body)]
    raise RequestError(
        415,
        f"{kind.decode(errors='replace')[:MAX_NAME]} is not an image type; send image/jpeg, image/png, …, "
        f"application/octet-stream, or multipart/form-data with the field {FIELD!r}.",
    )


def _parse_form(body: bytes, boundary: bytes) -> list[tuple[str, bytes]]:
    """The images of a form, whose fields are all called FIELD."""
    images: list[tuple[str, bytes]] = []
    complete = False

    def add(field: bytes | None, file_name: bytes | None, content: bytes) -> None:
        name = (field or b"").decode(errors="replace")
        if name != FIELD:
            raise RequestError(422, f"unknown field {name[:MAX_NAME]!r}; images are sent as {FIELD!r}.")
        if len(images) == MAX_IMAGES:
            raise RequestError(413, f"a request may contain {MAX_IMAGES} images; send more requests.")
        images.append(((file_name or b"image").decode(errors="replace")[:MAX_NAME], content))

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        add(file.field_name, file.file_name, file.file_object.read())
        file.close()

    def on_end() -> None:
        nonlocal complete
        complete = True

    try:
        parser = FormParser(
            "multipart/form-data",
            lambda field: add(field.field_name, None, field.value or b""),
            on_file,
            on_end=on_end,
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},  # keep it in memory, off the disk
        )
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise RequestError(400, f"the form cannot be read ({str(error)[:MAX_NAME]}).") from error
    if not complete:
        raise RequestError(400, "the form is cut short.")
    if not images:
        raise RequestError(422, f"the form contains no image; send it as the field {FIELD!r}.")
    return images


def _decode_upload(name: str, content: bytes, prepare: Callable[[Image.Image], Any], limits: Limits) -> Upload:
    try:
        image = _decode_image(content, limits)
        prepared, large = prepare(image), image.width * image.height > LARGE
    except RequestError as error:
        return Upload(name, None, error)
    if large:
        del image
        release_memory(torch.device("cpu"))
    return Upload(name, prepared, None)


def _decode_image(content: bytes, limits: Limits) -> Image.Image:
    if not content:
        raise RequestError(400, "the image is empty.")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # reads the header only
            width, height = image.size
            if width * height > limits.max_pixels:
                raise RequestError(
                    413,
                    f"the image has {width:,} x {height:,} pixels, more than {limits.max_pixels:,}; make it smaller.",
                )
            if image.format == "JPEG":  # faster with the extra `fast`
                return Image.fromarray(decode_pixels(content, "the image").numpy())
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
