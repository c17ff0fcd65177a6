"""Lists the samples of a tar shard, from the index beside it (NAME.index.json, written by data.pack) or the tar's headers."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from resnetlab.data.decode import SUFFIXES, is_hidden
from resnetlab.data.disk_split import FileNames
from resnetlab.errors import DataError
from resnetlab.formatting import parse_json

FORMAT = 1
MAX_INDEX = 2**28  # bytes of an index, or of a list of class names
MAX_TEXT = 2**20  # bytes of a .cls or .json, and of a tar's extended header


class TarSample(NamedTuple):
    """One image: `size` bytes of a tar from `offset` on. `label` is a number if the shard does not name the class."""

    key: str
    name: str
    label: str | int
    offset: int
    size: int


class TarIndex(NamedTuple):
    """The content of a shard, in arrays: N samples as Python objects would take ten times the memory.

    Attributes:
        labels: the different ones.
        numbers: int64 (N, 3): position in `labels`, offset, size.
        classes: None if the shard does not list them.
        shards: how many of its split there are; None if that is not known.
    """

    keys: FileNames
    names: FileNames
    labels: tuple[str | int, ...]
    numbers: NDArray[np.int64]
    classes: tuple[str, ...] | None
    shards: int | None = None

    @staticmethod
    def from_samples(
        samples: Iterable[TarSample], classes: tuple[str, ...] | None = None, shards: int | None = None
    ) -> TarIndex:
        samples, positions = list(samples), dict[str | int, int]()
        rows = [(positions.setdefault(s.label, len(positions)), s.offset, s.size) for s in samples]
        return TarIndex(
            FileNames(s.key for s in samples),
            FileNames(s.name for s in samples),
            tuple(positions),
            np.array(rows, np.int64).reshape(-1, 3),
            classes,
            shards,
        )


def index_path(tar: Path) -> Path:
    """The path of a shard's index."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".index.json")


def read_index(tar: Path) -> TarIndex:
    """The content of a shard, from the index beside it or from the tar itself."""
    file = index_path(tar)
    if not file.is_file():
        return scan_tar(tar)
    try:
        if file.stat().st_size > MAX_INDEX:
            raise ValueError(f"it has more than {MAX_INDEX:,} bytes")
        values = parse_json(file.read_bytes())
        classes, length = tuple(values["classes"]), int(values["bytes"])
        if not all(isinstance(name, str) for name in classes):
            raise ValueError("a class is no text")
        samples = (_validate(TarSample(*sample), length) for sample in values["samples"])
        index = TarIndex.from_samples(samples, classes, values.get("shards"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the index {file} cannot be read ({error}); remove it, or pack the shards again.") from error
    if tar.exists() and (found := tar.stat().st_size) != length:  # else it is fetched when it is needed
        raise DataError(
            f"{tar} has {found:,} bytes, its index says {length:,}: it ends early or is another; copy it again."
        )
    return index


def _validate(sample: TarSample, length: int) -> TarSample:
    """Returns the sample; raises ValueError if a value is impossible in a tar of `length` bytes."""
    key, name, label, offset, size = sample
    if not (isinstance(key, str) and isinstance(name, str)):
        raise ValueError(f"the key and the name must be text, not {key!r} and {name!r}")
    if type(label) not in (str, int) or label == "":
        raise ValueError(f"the class must be a name or a number, not {label!r}")
    if not (type(offset) is type(size) is int and 0 <= offset <= offset + size <= length):
        raise ValueError(f"{name} cannot be at {offset!r} with {size!r} bytes")
    return sample


def scan_tar(tar: Path) -> TarIndex:
    """The content of a shard without an index, from the tar's headers."""
    images: dict[str, tuple[int, int, str]] = {}
    texts: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(tar, "r:", tarinfo=BoundedHeader) as file:
            for member in file:
                folder, _, last = member.name.rpartition("/")
                stem, _, kind = last.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile() or is_hidden(last):  # macOS adds ._0.jpg for 0.jpg
                    continue
                refuse_sparse(tar, member)
                if os.path.splitext(last)[1].lower() in SUFFIXES:
                    if key in images:
                        raise DataError(f"{tar} has two images of the key {key}; give each sample a key of its own.")
                    images[key] = (member.offset_data, member.size, member.name)
                elif kind in ("cls", "json"):
                    if kind in texts.setdefault(key, {}):
                        raise DataError(f"{tar} has two files {member.name}; give each sample a key of its own.")
                    if member.size > MAX_TEXT:
                        raise DataError(
                            f"{member.name} in {tar} has {member.size:,} bytes, far more than a class needs."
                        )
                    texts[key][kind] = file.extractfile(member).read()  # type: ignore[union-attr]
            ended = file.offset
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} ends early or is not a tar ({error}); copy or pack it again.") from error
    last_byte = max((offset + size for offset, size, _ in images.values()), default=0)
    if not images or tar.stat().st_size < max(last_byte, ended) + 512:  # a complete tar ends with empty blocks
        raise DataError(f"{tar} ends early or holds no image; copy or pack it again.")
    if orphans := sorted(set(texts) - set(images)):
        raise DataError(
            f"{orphans[0]} in {tar} has a class and no image that is read ({len(orphans):,} such); links inside a tar are not "
            f"followed, and images end in {', '.join(sorted(SUFFIXES))}."
        )
    return TarIndex.from_samples(_make_sample(tar, key, place, texts.get(key, {})) for key, place in images.items())


def _make_sample(tar: Path, key: str, place: tuple[int, int, str], texts: dict[str, bytes]) -> TarSample:
    offset, size, name = place
    try:
        values = parse_json(texts.get("json", b"{}"))
        text = texts.get("cls", b"").decode().strip()
        cls: str | int = int(text) if text.removeprefix("-").isdecimal() else text
        label = values.get("class", cls)
        if type(label) is type(cls) and cls not in ("", label):
            raise ValueError(f"{key}.cls says {cls}, {key}.json {label}")
        if label != "":
            return _validate(TarSample(key, values.get("name", name), label, offset, size), tar.stat().st_size)
    except (ValueError, AttributeError) as error:
        raise DataError(f"the class of {key} in {tar} cannot be read ({error}); pack it again.") from error
    raise DataError(f"{key} in {tar} has no class: there is neither {key}.cls nor a class in {key}.json.")


def iterate_files(tar: Path) -> Iterator[tarfile.TarInfo]:
    """Yields the files in a tar, in its order; raises DataError for a damaged one, or a sparse file: its size may be any."""
    try:
        with tarfile.open(tar, "r:", tarinfo=BoundedHeader) as file:
            for member in filter(tarfile.TarInfo.isfile, file):
                refuse_sparse(tar, member)
                yield member
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} cannot be read, or ends early ({error}); copy or pack it again.") from error


def refuse_sparse(tar: Path, member: tarfile.TarInfo) -> None:
    """Raises DataError for a sparse member: its bytes in the tar are not the file's."""
    if member.issparse():
        raise DataError(f"{member.name} in {tar} is stored as a sparse file; pack it without tar's --sparse.")


class BoundedHeader(tarfile.TarInfo):
    """A member whose extended header, which tarfile keeps in memory, is not larger than names are."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in (*tarfile.REGULAR_TYPES, tarfile.GNUTYPE_SPARSE, tarfile.DIRTYPE) and self.size > MAX_TEXT:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return cast(tarfile.TarInfo, super()._proc_member(tar))  # type: ignore[misc]
