"""One picture looked at closely: what it is, what is odd about it, and what to find it again by."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from residuum.data.decode import damage, decode
from residuum.errors import DataError

SMALL = 16  # pixels: a shorter side below it is told
NARROW = 10  # longer to shorter side: above it is told
FLAT = 2.0  # grey levels: a deviation below it is told
STEP = 4  # grey levels: less is not brighter but noise, of which compressing a plain border anew makes another one
THUMB = 16  # pixels on a side of the small picture that near copies are compared by
SUFFIXES = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "GIF": (".gif",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
}


@dataclass(frozen=True)
class Seen:
    """What there is to know of a picture that can be read.

    Attributes:
        kind: format and mode of the file, "JPEG RGB".
        size: (width, height) in pixels, upright.
        content: a hash of the file's bytes (or of the pixels in memory).
        shape: 128 bits that say where the picture gets brighter, to the right and downwards, on a grid of 8 x 8: near copies
            (resized, compressed again) differ in few of them. None for a picture of one colour or of few pixels, which
            looks like many others.
        thumb: where there is a shape, the picture in THUMB x THUMB grey levels, one byte each.
        odd: what is suspicious, in words.
    """

    kind: str
    size: tuple[int, int]
    content: bytes
    shape: int | None
    odd: tuple[str, ...] = ()
    thumb: bytes = b""


def look_at_file(content: bytes, name: str) -> Seen:
    """Decodes an encoded picture in full; raises DataError where it cannot be read."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        picture = decode(content, name)
        try:
            with Image.open(io.BytesIO(content)) as header:
                kind, mode = header.format or "?", header.mode
                header.getexif()
        except Exception as error:  # pixels are whole, but what stands beside them is not
            raise DataError(f"{name} is damaged: {error}") from error
    odd = [f"Pillow says: {str(w.message).strip()}" for w in told if not issubclass(w.category, DeprecationWarning)]
    if (broken := damage(content, kind)) is not None:
        odd.append(f"it is damaged, though it can be read: {broken}")
    suffix = os.path.splitext(name)[1].lower()
    if kind in SUFFIXES and suffix and suffix not in SUFFIXES[kind]:
        odd.append(f"it is a {kind} file but is called {suffix}")
    return _seen(picture, f"{kind} {mode}", hashlib.blake2b(content, digest_size=16).digest(), odd)


def look_at_pixels(pixels: Tensor) -> Seen:
    """A decoded picture, uint8 (H, W, C)."""
    array = pixels.squeeze(-1).numpy()
    content = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=16).digest()
    picture = Image.fromarray(array)
    return _seen(picture, f"pixels {picture.mode}", content, [])


def _seen(picture: Image.Image, kind: str, content: bytes, odd: list[str]) -> Seen:
    width, height = picture.size
    if min(width, height) < SMALL and not kind.startswith("pixels"):
        odd.append(f"it is tiny: {width}x{height} pixels")
    if max(width, height) > NARROW * min(width, height):
        odd.append(f"it is very narrow: {width}x{height} pixels")
    if min(width, height) < SMALL:  # too few pixels to tell likeness from chance
        return Seen(kind, picture.size, content, None, tuple(odd))
    grey = picture.convert("L")
    across = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    down = np.asarray(grey.resize((8, 9), Image.Resampling.BOX), dtype=np.int16)
    if across.std() < FLAT:
        if np.asarray(grey).std() < FLAT:
            odd.append("it is of one colour")
        return Seen(kind, picture.size, content, None, tuple(odd))
    bits = np.concatenate([(np.diff(across) > STEP).ravel(), (np.diff(down, axis=0) > STEP).ravel()])
    shape = int.from_bytes(np.packbits(bits).tobytes(), "big")
    thumb = grey.resize((THUMB, THUMB), Image.Resampling.BOX).tobytes()
    return Seen(kind, picture.size, content, shape, tuple(odd), thumb)
