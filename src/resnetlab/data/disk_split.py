"""A split whose images are on disk and decoded on access; memory holds only names, sizes and labels."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnetlab.data.dataset import Columns, Split
from resnetlab.data.decode import (
    DEEP_SUFFIXES,
    check_file_size,
    check_regular_file,
    decode_as,
    find_pixel_format,
    is_complete,
    is_deep_file,
    read_plain_size,
    warn_of_scaling,
)
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.jpeg_region import ChooseBox, cut_out, decode_region
from resnetlab.data.text_files import find_encoding, read_bytes
from resnetlab.errors import DataError, warn
from resnetlab.formatting import format_count, parse_json
from resnetlab.preprocessing import RGB, PixelFormat

CHUNK = 1 << 14  # names read at once
SAMPLED = 16  # images that are looked at where the first is no ordinary one
OPENED = 256  # images that are looked at for values of more than 8 bits


class FileNames(Sequence[str]):
    """Many names in two arrays: worker processes share them, while reading a list would copy it page by page."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]  # a name need not be UTF-8
        self._text = np.frombuffer(b"".join(encoded), np.uint8)
        ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        self._ends: NDArray[Any] = ends.astype(np.uint32) if len(self._text) < 2**32 else ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        n = len(self._ends) - 1
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(n))]
        if not -n <= i < n:
            raise IndexError(i)
        start, end = self._ends[i % n], self._ends[i % n + 1]
        return self._text[start:end].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), CHUNK):
            yield from self.read(np.arange(first, min(first + CHUNK, len(self))))

    def read(self, indices: NDArray[np.int64]) -> Iterator[str]:
        """The names at these indices; each alone, by `[i]`, takes ten times as long."""
        text, ends = self._text.data, self._ends
        for start, end in zip(ends[indices].tolist(), ends[indices + 1].tolist(), strict=True):
            yield str(text[start:end], "utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class SelectedNames(Sequence[str]):
    """The names at `indices` of others, read when they are asked for: a list of them takes ten times the memory."""

    names: Sequence[str]
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: Any) -> Any:
        chosen = self.indices[i]
        return [self.names[k] for k in chosen.tolist()] if chosen.ndim else self.names[int(chosen)]

    def __iter__(self) -> Iterator[str]:
        for chunk in torch.split(self.indices, CHUNK):
            if isinstance(self.names, FileNames):
                yield from self.names.read(chunk.numpy())
            else:
                yield from map(self.names.__getitem__, chunk.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class ImageSource(Protocol):
    """A source of encoded images."""

    @property
    def names(self) -> Sequence[str]:
        """One per image."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each image; -1 if unknown."""

    def read(self, i: int) -> bytes:
        """The encoded image; raises a DataError that names it if it cannot be read."""

    def display_name(self, i: int) -> str:
        """The image's name in messages."""


def read_image_file(file: Path) -> bytes:
    """The bytes of an image file; raises DataError if it is missing, no file, too large or not readable."""
    check_regular_file(file)
    with contextlib.suppress(OSError):  # which reading the file reports
        check_file_size(file.stat().st_size, str(file))
    return read_bytes(file)


@dataclass(frozen=True, eq=False)
class FileSource:
    """Image files below a folder."""

    root: Path
    names: Sequence[str]
    sizes: NDArray[np.int64]

    def read(self, i: int) -> bytes:
        return read_image_file(self.root / self.names[i])

    def display_name(self, i: int) -> str:
        return str(self.root / self.names[i])


@dataclass(frozen=True)
class ReadOptions:
    """How images on disk are read.

    Attributes:
        on_bad: "stop" at an unreadable image, or "skip" it: it is left out, counted and listed.
        quarantine: a file of image names, one per line (`quarantine_line`), that are left out from the start.
        workers: processes that decode while the network computes; 0 decodes in this one. The results are the same.
        groups: a column of a table, or a pattern (regular expression) found in every image's name: images of equal values
            stay together when images are held out.
        multi_label: whether data with several classes per image are taken too, or refused.
        one_class: whether data of a single class are taken too, which can be evaluated but not trained on.
        as_needed: fetch shards to train on when they are read, not before.
    """

    on_bad: str = "stop"
    quarantine: str = ""
    workers: int = 0
    groups: str = ""
    multi_label: bool = False
    one_class: bool = False
    as_needed: bool = False

    def __post_init__(self) -> None:
        ErrorPolicy(self.on_bad)  # raises UsageError for another word

    def read_quarantine(self) -> frozenset[str]:
        """The names in the quarantine file; raises DataError if it cannot be read."""
        if not self.quarantine:
            return frozenset()
        try:
            content = Path(self.quarantine).read_bytes()
            text = content.decode(find_encoding(content), "surrogateescape")  # names need not be UTF-8
        except UnicodeDecodeError as error:
            raise DataError(f"the quarantine list {self.quarantine} is damaged; save it as UTF-8.") from error
        except OSError as error:
            raise DataError(
                f"the quarantine list {self.quarantine} cannot be read ({error.strerror}); make it with "
                "`resnetlab data check DATA --quarantine FILE`."
            ) from error
        # a line that starts with "#" may be a name in a class folder "#dog"; a comment matches no image and does no harm
        names = {_unquote(line.removesuffix("\r")) for line in text.split("\n")} - {""}
        return frozenset(names | ({name.replace("\\", "/") for name in names} if os.sep == "/" else set()))

    def apply_quarantine(self, names: Mapping[str, Sequence[str]], place: str) -> dict[str, Tensor]:
        """Of every split (name -> names of its images) the positions of the images to keep, int64.

        Warns of lines of the quarantine list that name none of them.
        """
        listed = self.read_quarantine()
        if not listed:
            return {split: torch.arange(len(images)) for split, images in names.items()}
        kept: dict[str, list[int]] = {}
        found: set[str] = set()
        for split, images in names.items():
            kept[split] = [i for i, name in enumerate(images) if name not in listed]
            found.update(name for name in images if name in listed)
        wanted = {name for name in listed if not name.startswith("#")}
        unknown = sorted({name.replace("\\", "/") for name in wanted} - {name.replace("\\", "/") for name in found})
        if unknown and not found:
            example = next((images[0] for images in names.values() if len(images)), "")
            warn(
                f"no line of the quarantine list {self.quarantine} is the name of an image of {place}: the first is "
                f"{unknown[0]!r}, while images have names such as {example!r}. Nothing is left out."
            )
        elif unknown:
            warn(
                f"{format_count(len(unknown), 'line')} of the quarantine list {self.quarantine} "
                f"{'is' if len(unknown) == 1 else 'are'} the name of no image of {place}, such as {unknown[0]!r}."
            )
        return {split: torch.tensor(positions, dtype=torch.long) for split, positions in kept.items()}


def quarantine_line(name: str) -> str:
    """An image's name as a line of a quarantine list: unchanged, or as a JSON string if it would not be one line."""
    return json.dumps(name) if name.startswith('"') or "\n" in name or "\r" in name else name


def _unquote(line: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        return str(parse_json(line))
    except ValueError:
        return line


@dataclass(frozen=True, eq=False)
class DiskSplit(Split):
    """Images on disk.

    Attributes:
        indices: positions in `source`, int64 (N,).
        decode_on: what decodes JPEGs, see `Dataset.with_decode_on`.
    """

    source: ImageSource
    indices: Tensor
    labels: Tensor
    errors: ErrorPolicy = field(default_factory=ErrorPolicy)
    workers: int = 0
    columns: Columns = field(default_factory=dict)
    pixel_format: PixelFormat = RGB
    decode_on: str = "cpu"

    @property
    def names(self) -> Sequence[str]:
        return SelectedNames(self.source.names, self.indices)

    def name_of(self, i: int) -> str:
        return self.source.names[int(self.indices[i])]

    def read_file(self, i: int) -> tuple[bytes, str]:
        """The encoded image, and its name in messages; raises DataError if it cannot be read."""
        index = int(self.indices[i])
        return self.source.read(index), self.source.display_name(index)

    def read_image(self, i: int) -> Tensor:
        return decode_as(*self.read_file(i), self.pixel_format)

    def read_region(self, i: int, choose_box: ChooseBox) -> Tensor:
        content, name = self.read_file(i)
        region = decode_region(content, choose_box) if self.pixel_format == RGB else None
        return cut_out(decode_as(content, name, self.pixel_format), choose_box) if region is None else region

    def read_encoded(self, i: int) -> Tensor:
        """The bytes of a JPEG that a GPU can decode, uint8 (n,); any other image decoded, as `read_image` gives it."""
        content, name = self.read_file(i)
        if self.pixel_format == RGB and read_plain_size(content):
            return torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return decode_as(content, name, self.pixel_format)

    def find_pixel_format(self, channels: int = 0) -> PixelFormat:
        def find(i: int) -> PixelFormat:
            return find_pixel_format(*self.read_file(i), channels)

        first = next((found for _, found in self.errors.read_each(range(len(self)), find, self.name_of)), RGB)
        if first == RGB and not channels:
            self._warn_of_deep_values()
        if first.dtype != "uint16" or first.channels not in (1, 3):  # others cannot be read as 8 bits
            return first
        others = ErrorPolicy("skip").read_each(range(0, len(self), max(1, len(self) // SAMPLED)), find, self.name_of)
        if (plain := next((found for _, found in others if not found.dtype), None)) is None:
            return first
        warn(f"images of 8 bits beside {first}: all are read as 8 bits.")
        return plain

    def _warn_of_deep_values(self) -> None:
        """Warns if one of OPENED images has more than 8 bits per value; of remote shards the first are looked at."""
        n, is_far = len(self), getattr(self.source, "remote", None) is not None
        chosen = range(min(n, SAMPLED)) if is_far else range(0, n, max(1, n // OPENED))
        deep: list[str] = []
        for index in self.indices[chosen].tolist():
            name = self.source.display_name(index)
            if name.lower().endswith(DEEP_SUFFIXES):
                with contextlib.suppress(DataError):  # reading the image reports it
                    deep += [name] * is_deep_file(self.source.read(index), name)
        warn_of_scaling(deep, len(chosen) < n)

    def require_readable(self) -> None:
        """Opens every image, and decodes those that look cut short, so that a run does not find out at its end.

        Warns of values scaled to 8 bits. Raises DataError for the first image that cannot be read, or lists it as skipped.
        """
        opened = self.errors.read_each(range(len(self)), self._open, self.name_of)
        warn_of_scaling([self.source.display_name(int(self.indices[i])) for i, is_deep in opened if is_deep])

    def _open(self, i: int) -> bool:
        """Whether an image has more than 8 bits per value, which are scaled to 8."""
        content, name = self.read_file(i)
        if self.pixel_format != RGB or not is_complete(content):
            decode_as(content, name, self.pixel_format)
        return not self.pixel_format.dtype and name.lower().endswith(DEEP_SUFFIXES) and is_deep_file(content, name)

    def _select(self, indices: Tensor) -> dict[str, Any]:
        return {"indices": self.indices[indices]}

    def update_hash(self, digest: Any) -> None:
        """Hashes labels, names and sizes in bytes: reading every file would take too long at the start of a run."""
        digest.update(self.labels.numpy().tobytes())
        sizes = self.source.sizes[self.indices.numpy()].tolist()
        for size, name in zip(sizes, self.names, strict=True):
            digest.update(b"%d %s\n" % (size, name.encode("utf-8", "surrogateescape")))
