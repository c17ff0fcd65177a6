"""Decoding: any picture a person may have -> 8-bit grey or RGB, upright."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

try:  # the extra "fast": the same pixels in two thirds of the time
    import simplejpeg
except ImportError:
    simplejpeg = None

from residuum.errors import DataError

ORIENTATION = 0x0112  # an EXIF tag
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def decoder() -> str:
    """What decodes JPEGs in `decode_pixels`."""
    return "pillow" if simplejpeg is None else "simplejpeg"


def decode_pixels(content: bytes, name: str) -> Tensor:
    """The picture in `content`, upright, as uint8 (H, W, 3); raises DataError as `decode` does.

    Plain JPEGs go to simplejpeg where it is installed; it and Pillow stand on libjpeg-turbo and give the same pixels. What is
    special about a picture (CMYK, a rotation in its EXIF, damage) is Pillow's business.
    """
    if simplejpeg is not None and content[:3] == b"\xff\xd8\xff" and b"Exif\0\0" not in content[:65536]:
        with contextlib.suppress(ValueError):  # it is not whole, or not what its header says: `decode` finds the words
            height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
            limit = Image.MAX_IMAGE_PIXELS
            if colours in ("YCbCr", "RGB", "Gray", "GRAY") and (limit is None or height * width <= limit):
                return torch.from_numpy(simplejpeg.decode_jpeg(content, colorspace="RGB"))
    picture = decode(content, name).convert("RGB")
    return torch.from_numpy(np.array(picture))


def decode(source: Path | bytes, name: str | None = None) -> Image.Image:
    """The picture in a file or in bytes, as mode L or RGB, turned upright as its EXIF orientation says.

    Transparency is laid on white, 16-bit values are scaled to 8 bits, an animation gives its first frame.

    Raises:
        DataError: the file is missing, empty, cut short, no picture, or too large to be one honestly; the message names it.
    """
    name = name or (str(source) if isinstance(source, Path) else "the picture")
    if isinstance(source, Path) and source.is_dir():
        raise DataError(f"{name} is a folder, not a picture.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a suspicious but readable file is `data check`'s business
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as picture:
                picture.load()
                turned = (
                    picture.getexif().get(ORIENTATION, 1) != 1
                )  # the transposition copies a picture that needs none
                return _eight_bits(ImageOps.exif_transpose(picture) if turned else picture)
    except FileNotFoundError:
        raise DataError(f"{name} is not there.") from None
    except PermissionError:
        raise DataError(f"{name} cannot be read: no permission.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not a picture that can be read ({', '.join(sorted(SUFFIXES))}).") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name} claims more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller.") from None
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        ArithmeticError,
        LookupError,
    ) as error:  # what Pillow's decoders raise
        raise DataError(f"{name} is damaged: {error}") from error


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Any Pillow mode as L or RGB."""
    if picture.mode in ("L", "RGB"):
        return picture
    if picture.mode.startswith("I"):  # 16 bits a value; Pillow's own conversion would clip it at 255
        values = np.asarray(picture).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if picture.mode in ("LA", "La"):
        picture = picture.convert("RGBA")
    if picture.mode in ("RGBA", "RGBa", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("L" if picture.mode == "1" else "RGB")


def picture_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among `paths` as they are, and every picture below the folders among them, sorted within each folder.

    Raises DataError for a folder without a picture.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = False
        for file in sorted(path.rglob("*")):
            if file.suffix.lower() in SUFFIXES and file.is_file():
                found = True
                yield file
        if not found:
            raise DataError(f"{path} holds no picture ({', '.join(sorted(SUFFIXES))}).")
