"""Decodes image files of any kind to 8-bit grey or RGB, upright, or reads their values as stored."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import math
import os
import stat
import struct
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

try:  # the extra "fast": the same pixels, faster
    import simplejpeg
except ImportError:
    simplejpeg = None

from resnetlab.data import array_files
from resnetlab.data.array_files import NPY, PNG, TIFF, count_tiff_channels, is_ordinary, read_array, read_orientation
from resnetlab.errors import DataError, install_hint, warn
from resnetlab.formatting import format_count
from resnetlab.preprocessing import RGB, PixelFormat, pil_to_tensor, tensor_to_pil
from resnetlab.shared_context import SharedContext

TRANSPOSITIONS = {  # a value of EXIF's orientation -> what turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
START_OF_SCAN = 0xDA  # a JPEG's marker before its pixels
PNG_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # what may hold an orientation in a PNG
TURNED = (5, 6, 7, 8)  # its values that exchange width and height
MAX_SAMPLE_VALUE = 281  # a TIFF tag
# bytes that a PNG's profile, text or XMP may unpack to: Photoshop's and scanners' are larger than Pillow's limit of 1 MiB
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20
JPEG, EXIF = b"\xff\xd8\xff", b"Exif\0\0"  # their first bytes
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # Pillow may hold their 16 bits in 32
DEEP_SUFFIXES = (".png", ".tif", ".tiff", ".pgm", ".ppm")  # of images that may have more than 8 bits per value
MAX_FILE_BYTES = 2**29
SUFFIXES = frozenset((
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jfif", ".avif",
    ".heic", ".heif", ".npy",
))  # fmt: skip
OTHER_KINDS = {  # what files that are no images begin with, in small letters
    b"<!doctype html": "is a web page, which a download may give in place of an image",
    b"<html": "is a web page, which a download may give in place of an image",
    b"version https://git-lfs": "is a pointer of Git LFS: `git lfs pull` fetches the image",
    b"<svg": "is an SVG drawing",
    b"<?xml": "is an XML file",
    b"%pdf": "is a PDF file",
    b"pk\3\4": "is a zip archive",
}
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # at byte 8 of a file


def jpeg_decoder() -> str:
    """The library that decodes JPEGs in `decode_pixels`."""
    return "pillow" if simplejpeg is None else "simplejpeg"


def decode_pixels(content: bytes, name: str) -> Tensor:
    """The image in `content`, upright, as uint8 (H, W, 3); raises DataError as `decode` does.

    Plain JPEGs are decoded by simplejpeg if it is installed; it and Pillow use libjpeg-turbo and give the same pixels. Special
    cases (CMYK, a rotation in EXIF or XMP, damage) are left to Pillow.
    """
    if simplejpeg is not None and content[:3] == JPEG and not _may_be_rotated(content):
        with contextlib.suppress(ValueError):  # damaged, or not what its header says: `decode` finds the message
            if (array := _decode_strictly(content)) is not None:
                return torch.from_numpy(array)
    image = decode(content, name)
    return torch.from_numpy(np.array(image if image.mode == "RGB" else image.convert("RGB")))


def decode_as(content: bytes, name: str, pixel_format: PixelFormat = RGB, max_pixels: int = 0) -> Tensor:
    """The image in `content`, upright, (H, W, C): uint8 grey or RGB, or float32 of the values as stored.

    Args:
        max_pixels: height times width of values as stored; 0 for Pillow's limit.

    Raises DataError as `decode` does, and for an image of another number of channels or type than `pixel_format`.
    """
    if not pixel_format.dtype:
        pixels = decode_pixels(content, name)
        return pixels if pixel_format.channels == 3 else pil_to_tensor(tensor_to_pil(pixels).convert("L"))
    with _name_errors(name):
        array = read_array(content, pixel_format.channels, max_pixels)
    if array is None or PixelFormat(array.shape[2], array.dtype.name) != pixel_format:
        found = "8 bits, grey or RGB" if array is None else PixelFormat(array.shape[2], array.dtype.name)
        raise DataError(f"{name} has {found}, where {pixel_format} are expected; give images of one kind.")
    return torch.from_numpy(array.astype(np.float32))


def find_pixel_format(content: bytes, name: str, channels: int = 0) -> PixelFormat:
    """How the values of an image are read so that nothing of them is lost.

    Args:
        channels: how many are wanted, 0 for those that there are. Of 8-bit images (or greys of 16 bits) 3 gives RGB, 1 grey.

    Raises DataError if the image cannot be read, or has another number of channels.
    """
    with _name_errors(name):
        array = read_array(content, channels)
    if array is None or is_ordinary(array) or (channels == 3 and array.shape[2] == 1 and array.dtype == np.uint16):
        found = PixelFormat(channels or 3)
    else:
        found = PixelFormat(array.shape[2], array.dtype.name)
    if channels not in (0, found.channels) or (not found.dtype and channels not in (0, 1, 3)):
        raise DataError(
            f"{name} has {'grey or RGB of 8 bits' if not found.dtype else found}, not {format_count(channels, 'channel')}."
        )
    return found


def find_damage(content: bytes, kind: str) -> str | None:
    """Describes the damage of an image that can be read nevertheless; None if none is found.

    libjpeg decodes past damaged data, and only simplejpeg reports it; Pillow checks a PNG's checksums and end only in `verify`.

    Args:
        kind: Pillow's name of the format.
    """
    try:
        if kind == "JPEG" and simplejpeg is not None:
            _decode_strictly(content)
        elif kind == "PNG":
            with Image.open(io.BytesIO(content)) as image:
                image.verify()
    except Exception as error:  # the decoders raise errors of many types
        return str(error) or type(error).__name__
    return None


def _decode_strictly(content: bytes) -> NDArray[np.uint8] | None:
    """A JPEG's pixels as stored, (H, W, 3); None for colour spaces and sizes that are left to Pillow.

    Raises ValueError if anything in it is damaged.
    """
    height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    limit = Image.MAX_IMAGE_PIXELS
    if colours not in ("YCbCr", "RGB", "Gray", "GRAY") or (limit is not None and height * width > limit):
        return None
    array: NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colorspace="RGB")
    return array


def _read_segments(content: bytes) -> Iterator[tuple[int, int, int]]:
    """The marker of every segment of a JPEG, and where its content begins and ends, up to the pixels' (START_OF_SCAN)."""
    at = 2
    while at + 4 <= len(content) and content[at] == 0xFF:
        kind, end = content[at + 1], at + 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if kind == 0xFF:  # a fill byte
            at += 1
            continue
        yield kind, at + 4, end
        if kind == START_OF_SCAN:
            return
        at = end


def _may_be_rotated(content: bytes) -> bool:
    """Whether a JPEG has EXIF, or XMP with an orientation, in any of the segments before its pixels."""
    for kind, start, end in _read_segments(content):
        if kind == START_OF_SCAN:
            return False
        if kind == 0xE1 and (content.startswith(EXIF, start) or content.find(b"Orientation", start, end) >= 0):
            return True
    return True  # not a JPEG's usual form


def read_plain_size(content: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that any decoder gives alike: whole, upright, YCbCr in 8 bits; None for any other file.

    Also None for a size that is refused.
    """
    if not content.startswith(JPEG) or not is_complete(content) or _may_be_rotated(content):
        return None
    limit, size = Image.MAX_IMAGE_PIXELS or math.inf, None
    for kind, start, _ in _read_segments(content):
        if kind == 0xEE and content.startswith(b"Adobe", start) and content[start + 11] != 1:  # RGB, or CMYK
            return None
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):  # a frame: baseline, extended or progressive
            bits, height, width, colours = struct.unpack_from(">BHHB", content, start)
            ids = content[start + 6 : start + 15 : 3]
            plain = kind <= 0xC2 and bits == 8 and colours == 3 and ids != b"RGB" and 0 < height * width <= limit
            size = (height, width) if plain else None
    return size


def decode_on_gpu(files: list[Tensor], device: torch.device) -> list[Tensor]:
    """JPEGs, uint8 (bytes,) each, decoded by torchvision on a GPU: uint8 (H, W, 3) on it.

    Raises RuntimeError if one of them cannot be decoded, or this torchvision cannot decode on GPUs.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    # torchvision decodes on a stream of its own, which does not wait for what is still to read the memory that it writes to:
    # so that comes from a stream that has no other use
    caller = torch.cuda.current_stream(device)
    own = _decoding_stream(caller.device)
    with _warning_filters, torch.cuda.stream(own):  # it is deprecated since 0.29
        decoded = decode_jpeg(files, ImageReadMode.RGB, device)
    caller.wait_stream(own)
    for x in decoded:
        x.record_stream(caller)
    return [x.permute(1, 2, 0) for x in decoded]


@functools.cache
def _decoding_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def decode(source: Path | bytes, name: str | None = None) -> Image.Image:
    """The image in a file or in bytes, as mode L or RGB, turned upright by its EXIF orientation.

    Transparency is composited on white, 16-bit values are scaled to 8 bits, an animation gives its first frame.

    Raises:
        DataError: the file is missing, empty, truncated, not an image, implausibly large, or has 32-bit or floating-point
            values without a known range; the message names it.
    """
    name = name or (str(source) if isinstance(source, Path) else "the image")
    if isinstance(source, Path):
        check_regular_file(source)
    with _name_errors(name), _open(source) as image:
        if image.format == "TIFF" and (channels := count_tiff_channels(image)):
            raise DataError(f"has {format_count(channels, 'channel')}, where grey or RGB of 8 bits are expected.")
        return _apply_orientation(image)


def is_complete(content: bytes) -> bool:
    """Whether a JPEG or a PNG has its first and last bytes; False for other formats, which only decoding can tell."""
    tail = content[-4096:]
    return (content.startswith(JPEG) and b"\xff\xd9" in tail) or (content.startswith(PNG) and b"IEND" in tail)


def check_regular_file(file: Path) -> None:
    """Raises DataError for a folder, and for a pipe or device, also behind a link: reading one would wait for ever."""
    try:
        mode = os.stat(file).st_mode
    except (OSError, ValueError):  # opening it gives the reason
        return
    if stat.S_ISDIR(mode):
        raise DataError(f"{file} is a folder, not an image.")
    if not stat.S_ISREG(mode):
        raise DataError(f"{file} is a pipe or a device, not an image.")


def _open(source: Path | bytes) -> Image.Image:
    try:
        return Image.open(source if isinstance(source, Path) else io.BytesIO(source))
    except UnidentifiedImageError:
        with contextlib.closing(open(source, "rb") if isinstance(source, Path) else io.BytesIO(source)) as file:
            head = file.read(32)
        if head.startswith((NPY, *TIFF)):  # of more channels than Pillow knows
            array = read_array(source if isinstance(source, bytes) else source.read_bytes())
            if array is None or not is_ordinary(array):
                given = array if array is None else PixelFormat(array.shape[2], array.dtype.name)
                raise DataError(f"has {given}, where grey or RGB of 8 bits are expected.") from None
            return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        if head[4:8] != b"ftyp" or head[8:12] not in HEIF_BRANDS:
            if kind := _describe_other_kind(head):
                raise DataError(f"is not an image that can be read: it {kind}.") from None
            raise
    try:
        import pillow_heif  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError(f"is a HEIC image; to read it, install: {install_hint('heic')}") from None
    pillow_heif.register_heif_opener()
    return Image.open(source if isinstance(source, Path) else io.BytesIO(source))


def _describe_other_kind(head: bytes) -> str:
    """What a file that is no image is, by its first bytes; "" if they do not tell."""
    start = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
    kind = next((words for begin, words in OTHER_KINDS.items() if start.startswith(begin)), "")
    return kind or ("is empty" if not head else "is a text" if head.isascii() and start.decode().isprintable() else "")


def check_file_size(size: int, name: str) -> None:
    """Raises DataError for a file that is larger than any image: it would be read into memory."""
    if size > MAX_FILE_BYTES:
        raise DataError(f"{name} has {size:,} bytes, more than the {MAX_FILE_BYTES:,} that are read of an image.")


def convert_image(image: Image.Image) -> Image.Image:
    """Converts a Pillow image of any mode as `decode` does; raises DataError if it cannot be loaded."""
    with _name_errors("the image"):
        return _apply_orientation(image)


# `data check` reports suspicious but readable files; `warnings` alone does not allow several threads
_warning_filters = SharedContext(lambda: warnings.catch_warnings(action="ignore"))


@contextlib.contextmanager
def _name_errors(name: str) -> Iterator[None]:
    """Turns whatever Pillow raises inside into a DataError that names the image."""
    try:
        with _warning_filters:
            yield
    except FileNotFoundError:
        raise DataError(f"{name} is not there.") from None
    except PermissionError:
        raise DataError(f"{name} cannot be read: no permission.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image that can be read ({', '.join(sorted(SUFFIXES))}).") from None
    except Image.DecompressionBombError:  # phones take images of 108 megapixels, at which Pillow only warns
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{name} claims more than {limit:,} pixels; make it smaller.") from None
    except DataError as error:
        raise DataError(f"{name} {error}") from None
    except Exception as error:  # the decoders of some thirty formats raise errors of many types
        raise DataError(f"{name} is damaged: {error or type(error).__name__}") from error


def read_header(file: Path) -> tuple[tuple[int, int], bool]:
    """(height, width) of an image as `decode` gives it, and whether that scales its values to 8 bits; without decoding it.

    Raises DataError if that cannot be read.
    """
    check_regular_file(file)
    with _name_errors(str(file)), _open(file) as image:
        (width, height), is_deep = image.size, has_deep_values(image)
        content = file.read_bytes() if image.format == "PNG" else b""
        if content and not any(mark in content for mark in PNG_METADATA):
            return (height, width), is_deep  # Pillow decodes a PNG to find that it has no EXIF
        return ((width, height) if read_orientation(image) in TURNED else (height, width)), is_deep


def has_deep_values(image: Image.Image) -> bool:
    """Whether an image, opened and not yet loaded, has more than 8 bits per value, which `decode` scales to 8."""
    return image.mode.startswith("I") or any(";16" in str(tile) for tile in getattr(image, "tile", ()))


def is_deep_file(content: bytes, name: str) -> bool:
    """Whether an encoded image has more than 8 bits per value, which `decode` scales to 8; raises DataError as that does."""
    with _name_errors(name), _open(content) as image:
        return has_deep_values(image)


def warn_of_scaling(files: Sequence[str], may_be_more: bool = False) -> None:
    """Warns of images, if there are any, that `decode` scales to 8 bits."""
    if files:
        count = "at least " * may_be_more + format_count(len(files), "image")
        words = f"{count} with more than 8 bits per value, scaled to 8, such as {files[0]}."
        warn(words)


def _apply_orientation(image: Image.Image) -> Image.Image:
    image.load()
    if image.mode == "RGBX" and image.format == "TIFF":
        raise DataError("has a fourth channel that is not transparency, where grey or RGB of 8 bits are expected.")
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BIT_FORMATS):
        tags = getattr(image, "tag_v2", {})
        signed = tags.get(array_files.SAMPLE_FORMAT) == (2,) and tags.get(array_files.BITS) == (16,)
        kind = "signed values of 16 bits" if signed else "32 bits per value"
        raise DataError(array_files.UNKNOWN_WHITE.format(kind))
    return _to_eight_bits(turn_upright(image), *_read_grey_scale(image))


def turn_upright(image: Image.Image) -> Image.Image:
    """The image, turned by its EXIF orientation; no copy of one that is upright."""
    transposition = TRANSPOSITIONS.get(read_orientation(image))
    return image if transposition is None else image.transpose(transposition)


def _read_grey_scale(image: Image.Image) -> tuple[int, bool]:
    """(bits of a value, whether 0 is white) as a TIFF declares them; (16, False) for other formats."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return 16, False
    bits, largest = tags.get(array_files.BITS, (16,))[0], tags.get(MAX_SAMPLE_VALUE)
    if largest:  # 12 bits in words of 16
        bits = min(bits, int(largest[0] if isinstance(largest, tuple) else largest).bit_length())
    return max(bits, 8), tags.get(array_files.PHOTOMETRIC) == 0


def _to_eight_bits(image: Image.Image, bits: int, white_is_zero: bool) -> Image.Image:
    """Converts any Pillow mode to L or RGB; `bits` and `white_is_zero` are for modes of 16 bits per value."""
    clear = image.info.get("transparency")  # a value or a colour; for a palette, one or many alphas
    if image.mode in ("L", "RGB") and clear is None:
        return image
    if image.mode.startswith("I"):  # 16 bits per value; Pillow's own conversion would clip it at 255
        white = (1 << bits) - 1
        values = np.asarray(image).astype(np.int64).clip(0, white)
        values = white - values if white_is_zero else values
        values = np.where(values == clear, white, values) if isinstance(clear, int) else values
        return Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    if image.mode in ("LA", "La"):
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "RGBa", "PA") or clear is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("L" if image.mode == "1" else "RGB")


def find_image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Yields the files among `paths` and every image below the folders among them, sorted within each folder.

    Raises DataError for a folder without an image, or one that cannot be read.
    """
    for path in paths:
        for found in list_images(path):
            if isinstance(found, DataError):
                raise found
            yield found


def list_images(path: Path) -> Iterator[Path | DataError]:
    """Yields a file itself, or the images below a folder in the order of their paths, reading one folder at a time.

    A folder that cannot be read yields an error. As in data sets, links are followed, except to a folder above, and hidden
    files and folders are left out.
    """
    if not path.is_dir():
        yield path
        return
    found = False
    for entry in walk_folder(path):
        if isinstance(entry, DataError) or is_image_name(entry.name):
            found = True
            yield entry if isinstance(entry, DataError) else Path(entry.path)
    if not found:
        yield DataError(f"{path} holds no image ({', '.join(sorted(SUFFIXES))}).")


def is_image_name(name: str) -> bool:
    """Whether a file, by its name or its path with slashes, is one to read as an image: a known suffix, nothing hidden."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not any(map(is_hidden, name.split("/")))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden or made by the system: .DS_Store, ._1.jpg, .git, __MACOSX."""
    return name.startswith((".", "__MACOSX"))


def walk_folder(folder: str | Path, parents: frozenset[str] = frozenset()) -> Iterator[os.DirEntry[str] | DataError]:
    """Yields the files below a folder, by name within each, without hidden ones; an error for one that cannot be read.

    Links are followed, but not back to `parents`: by default the folders above, with and without links resolved.
    """
    real = os.path.realpath(folder)
    parents = parents or frozenset(map(os.path.realpath, (*Path(os.path.abspath(folder)).parents, *Path(real).parents)))
    if real in parents:
        return
    try:
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_dir(), entry) for entry in entries if not is_hidden(entry.name))
    except OSError as error:
        yield DataError(f"{folder} cannot be read ({error.strerror}); give yourself permission to read it.")
        return
    for _, is_folder, entry in found:
        if is_folder:
            yield from walk_folder(entry.path, parents | {real})
        else:
            yield entry
