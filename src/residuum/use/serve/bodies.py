"""From the bytes of a request to pictures ready for the network. Nothing is written anywhere; names are only echoed."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import FormParser, parse_options_header

from residuum.data.decode import decode_pixels, upright
from residuum.errors import DataError
from residuum.runtime import give_back_memory
from residuum.use.serve.limits import PICTURES, Limits, Refusal

# Of Pillow's formats those that people's pictures have; some of the others start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
FIELD = "picture"
LARGE = 2**24  # pixels of a picture whose memory goes back to the system; that of smaller ones is kept for the next
NAME = 200  # characters of a file name that are echoed


@dataclass(frozen=True, eq=False)
class Shown:
    """A picture of a request: ready for the network, or why not."""

    name: str
    picture: Any  # as `prepare` made it; None where it cannot be read
    refusal: Refusal | None


def opened(
    content_type: str,
    body: bytes,
    prepare: Callable[[Image.Image], Any],
    limits: Limits,
    given_up: Callable[[], bool] = lambda: False,
) -> list[Shown]:
    """The pictures of a request, in order, made ready; no more of them once `given_up` says that nobody waits for them.

    Raises Refusal where the request as a whole cannot be read: its type, its form, its number of pictures.
    """
    return [_shown(name, content, prepare, limits) for name, content in parts(content_type, body) if not given_up()]


def parts(content_type: str, body: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of each picture of a body, which is one picture itself or a form."""
    kind, options = parse_options_header(content_type)
    if not body:
        raise Refusal(400, "the body is empty; send a picture.")
    if kind == b"multipart/form-data":
        return _form(body, options.get(b"boundary", b""))
    if kind.startswith(b"image/") or kind in (b"", b"application/octet-stream"):
        return [("picture", body)]
    raise Refusal(
        415,
        f"{kind.decode(errors='replace')[:NAME]} is no type of a picture; send image/jpeg, image/png, …, "
        f"application/octet-stream, or multipart/form-data with the field {FIELD!r}.",
    )


def _form(body: bytes, boundary: bytes) -> list[tuple[str, bytes]]:
    """The pictures of a form: every part is called FIELD."""
    found: list[tuple[str, bytes]] = []
    ended: list[bool] = []

    def take(name: bytes | None, file_name: bytes | None, content: bytes) -> None:
        called = (name or b"").decode(errors="replace")
        if called != FIELD:
            raise Refusal(422, f"unknown field {called[:NAME]!r}; pictures are sent as {FIELD!r}.")
        if len(found) == PICTURES:
            raise Refusal(413, f"a request may hold {PICTURES} pictures; send more requests.")
        found.append(((file_name or b"picture").decode(errors="replace")[:NAME], content))

    def on_file(file: Any) -> None:
        file.file_object.seek(0)
        take(file.field_name, file.file_name, file.file_object.read())
        file.close()

    try:
        parser = FormParser(
            "multipart/form-data",
            lambda field: take(field.field_name, None, field.value or b""),
            on_file,
            on_end=lambda: ended.append(True),
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": len(body) + 1},  # in memory: nothing goes to disk
        )
        parser.write(body)
        parser.finalize()
    except (FormParserError, ValueError) as error:
        raise Refusal(400, f"the form cannot be read ({str(error)[:NAME]}).") from error
    if not ended:
        raise Refusal(400, "the form is cut short.")
    if not found:
        raise Refusal(422, f"the form holds no picture; send it as the field {FIELD!r}.")
    return found


def _shown(name: str, content: bytes, prepare: Callable[[Image.Image], Any], limits: Limits) -> Shown:
    try:
        picture = _decoded(content, limits)
        ready, large = prepare(picture), picture.width * picture.height > LARGE
    except Refusal as refusal:
        return Shown(name, None, refusal)
    if large:
        del picture
        give_back_memory(torch.device("cpu"))
    return Shown(name, ready, None)


def _decoded(content: bytes, limits: Limits) -> Image.Image:
    if not content:
        raise Refusal(400, "the picture is empty.")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:  # reads the header alone
            width, height = picture.size
            if width * height > limits.max_pixels:
                raise Refusal(
                    413,
                    f"the picture has {width:,} x {height:,} pixels, more than {limits.max_pixels:,}; make it smaller.",
                )
            if picture.format == "JPEG":  # the extra `fast` is quicker
                return Image.fromarray(decode_pixels(content, "the picture").numpy())
            return upright(picture)
    except UnidentifiedImageError:
        raise Refusal(415, f"that is not a picture that can be read ({', '.join(FORMATS)}).") from None
    except Image.DecompressionBombError:
        raise Refusal(413, f"the picture has more than {limits.max_pixels:,} pixels; make it smaller.") from None
    except DataError as error:
        raise Refusal(422, str(error)) from error
    except Refusal:
        raise
    except Exception as error:  # headers of some formats raise what they please
        raise Refusal(422, f"the picture is damaged: {str(error)[:NAME] or type(error).__name__}") from error
