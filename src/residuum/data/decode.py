"""Decoding: any picture a person may have -> 8-bit grey or RGB, upright."""

from __future__ import annotations

import contextlib
import io
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

try:  # the extra "fast": the same pixels, sooner
    import simplejpeg
except ImportError:
    simplejpeg = None

from residuum.errors import DataError

ORIENTATION = 0x0112  # an EXIF tag
JPEG, EXIF = b"\xff\xd8\xff", b"Exif\0\0"  # what they begin with
SIXTEEN = ("PNG", "PPM")  # formats whose 16 bits Pillow may hold in 32
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".avif"}
)


def decoder() -> str:
    """What decodes JPEGs in `decode_pixels`."""
    return "pillow" if simplejpeg is None else "simplejpeg"


def decode_pixels(content: bytes, name: str) -> Tensor:
    """The picture in `content`, upright, as uint8 (H, W, 3); raises DataError as `decode` does.

    Plain JPEGs go to simplejpeg where it is installed; it and Pillow stand on libjpeg-turbo and give the same pixels. What is
    special about a picture (CMYK, a rotation in its EXIF or XMP, damage) is Pillow's business.
    """
    if simplejpeg is not None and content[:3] == JPEG and not _may_be_turned(content):
        with contextlib.suppress(ValueError):  # it is not whole, or not what its header says: `decode` finds the words
            if (array := _strictly(content)) is not None:
                return torch.from_numpy(array)
    picture = decode(content, name)
    return torch.from_numpy(np.array(picture if picture.mode == "RGB" else picture.convert("RGB")))


def damage(content: bytes, kind: str) -> str | None:
    """What is damaged in a picture that can be read all the same, as far as it can be told; None where nothing is.

    libjpeg reads on through damaged data, and only simplejpeg says so; Pillow tests a PNG's checksums and end only if asked.

    Args:
        kind: Pillow's name of the format.
    """
    try:
        if kind == "JPEG" and simplejpeg is not None:
            _strictly(content)
        elif kind == "PNG":
            with Image.open(io.BytesIO(content)) as picture:
                picture.verify()
    except Exception as error:  # whatever they raise is what they say of it
        return str(error) or type(error).__name__
    return None


def _strictly(content: bytes) -> NDArray[np.uint8] | None:
    """A JPEG's pixels as they lie in it, (H, W, 3); None for colours or sizes that are Pillow's business.

    Raises ValueError where anything in it is damaged.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    limit = Image.MAX_IMAGE_PIXELS
    if colours not in ("YCbCr", "RGB", "Gray", "GRAY") or (limit is not None and height * width > limit):
        return None
    array: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colorspace="RGB")
    return array


def _may_be_turned(content: bytes) -> bool:
    """Whether a JPEG has EXIF, or XMP with an orientation, in any of the segments before its pixels."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        kind = content[at + 1]
        if kind == 0xDA:  # the pixels begin
            return False
        end = at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if kind == 0xFF:  # a fill byte
            end = at + 1
        elif kind == 0xE1 and (content[at + 4 : at + 10] == EXIF or content.find(b"Orientation", at, end) >= 0):
            return True
        at = end
    return True  # not a JPEG's usual form


def decode(source: Path | bytes, name: str | None = None) -> Image.Image:
    """The picture in a file or in bytes, as mode L or RGB, turned upright as its EXIF orientation says.

    Transparency is laid on white, 16-bit values are scaled to 8 bits, an animation gives its first frame.

    Raises:
        DataError: the file is missing, empty, cut short, no picture, too large to be one honestly, or of 32-bit or floating
            values, whose black and white it does not say; the message names it.
    """
    name = name or (str(source) if isinstance(source, Path) else "the picture")
    if isinstance(source, Path) and source.is_dir():
        raise DataError(f"{name} is a folder, not a picture.")
    with _told(name), Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as picture:
        return _upright(picture)


def upright(picture: Image.Image) -> Image.Image:
    """A Pillow picture of any mode as `decode` gives it; raises DataError where it cannot be loaded."""
    with _told("the picture"):
        return _upright(picture)


class _WarningsSettled:
    """Pillow's warnings as decoding wants them; for several threads at once, which `warnings` alone does not allow.

    The filters belong to the whole process: the first thread that enters sets them, and the last one gives the old ones back.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._before = threading.Lock(), 0, warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._before = warnings.catch_warnings()
                self._before.__enter__()
                warnings.simplefilter("ignore")  # a suspicious but readable file is `data check`'s business
                warnings.simplefilter("error", Image.DecompressionBombWarning)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._before.__exit__(None, None, None)


_warnings_settled = _WarningsSettled()


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Whatever Pillow raises inside becomes one sentence that names the picture."""
    try:
        with _warnings_settled:
            yield
    except FileNotFoundError:
        raise DataError(f"{name} is not there.") from None
    except PermissionError:
        raise DataError(f"{name} cannot be read: no permission.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not a picture that can be read ({', '.join(sorted(SUFFIXES))}).") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise DataError(f"{name} claims more than {Image.MAX_IMAGE_PIXELS:,} pixels; make it smaller.") from None
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    except Exception as error:  # decoders of some thirty formats raise what they please
        raise DataError(f"{name} is damaged: {error or type(error).__name__}") from error


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()
    if picture.mode == "F" or (picture.mode == "I" and picture.format not in SIXTEEN):
        raise DataError("has 32 bits a value, and does not say which of them is white; save it with 8 or 16 bits.")
    turned = picture.getexif().get(ORIENTATION, 1) != 1  # the transposition copies a picture that needs none
    return _eight_bits(ImageOps.exif_transpose(picture) if turned else picture)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Any Pillow mode as L or RGB."""
    clear = picture.info.get("transparency")  # a value or a colour; of a palette, one or many alphas
    if picture.mode in ("L", "RGB") and clear is None:
        return picture
    if picture.mode.startswith("I"):  # 16 bits a value; Pillow's own conversion would clip it at 255
        values = np.asarray(picture).astype(np.int64)
        values = np.where(values == clear, 65535, values) if isinstance(clear, int) else values
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8))
    if picture.mode in ("LA", "La"):
        picture = picture.convert("RGBA")
    if picture.mode in ("RGBA", "RGBa", "PA") or clear is not None:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("L" if picture.mode == "1" else "RGB")


def picture_files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files among `paths` as they are, and every picture below the folders among them, sorted within each folder.

    Raises DataError for a folder without a picture, or one that cannot be read.
    """
    for path in paths:
        for found in listed(path):
            if isinstance(found, DataError):
                raise found
            yield found


def listed(path: Path) -> Iterator[Path | DataError]:
    """A file as it is, or the pictures below a folder, one folder's names at a time.

    What cannot be read is an error among them. The order is that of the sorted paths. As where a folder is trained on, links
    are followed, but not back to a folder above, and hidden files and folders are left out.
    """
    if not path.is_dir():
        yield path
        return
    found = False
    for one in _below(path, above(path)):
        found = True
        yield one
    if not found:
        yield DataError(f"{path} holds no picture ({', '.join(sorted(SUFFIXES))}).")


def above(folder: Path) -> frozenset[str]:
    """The folders that hold a folder, by way of links or not: a link back to one would bring what lies beside it."""
    parents = {*Path(os.path.abspath(folder)).parents, *Path(os.path.realpath(folder)).parents}
    return frozenset(map(os.path.realpath, parents))


def hidden(name: str) -> bool:
    """Whether a file or folder is none of a person's own: .DS_Store, ._1.jpg, .git, __MACOSX."""
    return name.startswith((".", "__MACOSX"))


def _below(folder: Path, parents: frozenset[str]) -> Iterator[Path | DataError]:
    real = os.path.realpath(folder)
    if real in parents:
        return
    try:
        with os.scandir(folder) as entries:
            inside = sorted((e.name, e.is_dir(), e.is_file() or e.is_symlink()) for e in entries if not hidden(e.name))
    except OSError as error:
        yield DataError(f"{folder} cannot be read ({error.strerror}); give yourself permission to read it.")
        return
    for name, is_folder, is_file in inside:
        if is_folder:
            yield from _below(folder / name, parents | {real})
        elif is_file and os.path.splitext(name)[1].lower() in SUFFIXES:
            yield folder / name
