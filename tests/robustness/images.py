"""Damaged images of every format are read, or refused in a sentence: never another error, nor much time or memory."""

from __future__ import annotations

import io
import random
import resource
import time

from harness import damage, run
from PIL import Image

from images import photo
from resnetlab.data.decode import decode_pixels
from resnetlab.errors import DataError

FORMATS = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "L", "P", "RGBA", "I;16", "1"), "WEBP": ("RGB", "RGBA"), "GIF": ("P",),
           "BMP": ("RGB", "L"), "TIFF": ("RGB", "L", "I;16"), "PPM": ("RGB", "L"), "AVIF": ("RGB",)}  # fmt: skip
SECONDS = 20.0
MEMORY = 6 * 2**30  # bytes of address space


def encode(kind: str, mode: str) -> bytes:
    image = photo(1, 60, 45).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = image.convert("I").point(lambda v: v * 256).convert("I;16")
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


CONTENTS = [encode(kind, mode) for kind, modes in FORMATS.items() for mode in modes]


def attack(draw: random.Random) -> str | None:
    content, began = damage(draw.choice(CONTENTS), draw), time.monotonic()
    try:
        pixels = decode_pixels(content, "the image")
    except DataError as error:
        if "\n" in str(error) or not str(error):
            return f"not a sentence: {error}"
    else:
        if pixels.ndim != 3 or pixels.shape[2] != 3:
            return f"pixels of shape {tuple(pixels.shape)}"
    seconds = time.monotonic() - began
    return f"took {seconds:.0f} s" if seconds > SECONDS else None


if __name__ == "__main__":
    Image.init()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    run("damaged images", attack, 5000)
