"""Zip and tar files of class folders, read without unpacking; a compressed tar is decompressed once into the data folder.

photos.zip      daisy/1.jpg …, or photos/daisy/1.jpg …, or with train/, val/ and test/ above the classes, as in a folder
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resnetlab.data import folder
from resnetlab.data.dataset import Dataset
from resnetlab.data.decode import check_file_size, is_image_name
from resnetlab.data.disk_split import FileNames, ImageSource, ReadOptions
from resnetlab.data.folder import LabelledImages, guess_split, make_dataset
from resnetlab.data.shards import ShardSource
from resnetlab.data.tar_index import iterate_files
from resnetlab.errors import DataError
from resnetlab.formatting import format_list
from resnetlab.run_folder import move_into_place, remove_old_temporary_files, write_error
from resnetlab.stopping import check_stop

COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".tgz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
MAX_RATIO, SMALL_ARCHIVE = 100, 2**30  # a compressed tar unpacks to at most so many times its size, or so many bytes
PEEK = 64  # members of a tar: among so many, a shard has a label
LOCAL_HEADER = 30  # bytes before the name of a zip's member; its last four are the lengths of name and extra field


class _ArchiveMember(NamedTuple):
    """An image of `size` bytes in an archive. `offset` is that of its content; in a zip that of the member's header."""

    name: str
    offset: int
    size: int
    method: int = zipfile.ZIP_STORED
    crc: int = 0
    stored_size: int = 0


@dataclass(frozen=True, eq=False)
class ZipSource:
    """Images inside a zip file. Reads by offset, so that threads and processes can share it."""

    file: Path
    names: Sequence[str]
    sizes: NDArray[np.int64]
    members: NDArray[np.int64]  # (N, 4): offset of the header, method, CRC, stored bytes

    def read(self, i: int) -> bytes:
        check_file_size(int(self.sizes[i]), self.display_name(i))
        offset, method, crc, stored_size = map(int, self.members[i])
        try:
            with open(self.file, "rb") as file:
                file.seek(offset)
                header = file.read(LOCAL_HEADER)
                file.seek(sum(int.from_bytes(header[k : k + 2], "little") for k in (26, 28)), os.SEEK_CUR)
                content = file.read(stored_size)
            if method == zipfile.ZIP_DEFLATED:  # no more than the member claims to have
                content = zlib.decompressobj(-15).decompress(content, int(self.sizes[i]) + 1)
        except (OSError, zlib.error) as error:
            raise DataError(f"{self.display_name(i)} cannot be read ({error}).") from error
        if zlib.crc32(content) != crc:
            raise DataError(f"{self.display_name(i)} is damaged: its checksum differs.")
        return content

    def display_name(self, i: int) -> str:
        return f"{self.file}/{self.names[i]}"


def is_archive(data: str) -> bool:
    """Whether DATA is a zip or a tar of class folders; a tar with labels beside its images is a shard instead."""
    path = Path(data)
    if path.suffix.lower() == ".zip" or _is_compressed_tar(path):
        return path.is_file()
    if path.suffix.lower() != ".tar" or not path.is_file():
        return False
    try:
        files = [_normalise_path(member.name) for member in islice(iterate_files(path), PEEK)]
    except DataError:
        return False  # reported by data.shards
    in_folders = any("/" in name and is_image_name(name) for name in files)
    return in_folders and not any(name.endswith((".cls", ".json")) for name in files)


def _is_compressed_tar(path: Path) -> bool:
    return path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def load_archive(path: Path, data_dir: Path, read_options: ReadOptions) -> Dataset:
    """Loads the class folders in an archive. Raises DataError if it is damaged or holds none."""
    file = _decompress(path, data_dir) if _is_compressed_tar(path) else path
    members = _list_zip(file) if path.suffix.lower() == ".zip" else _list_tar(file)
    # of two members of one name the later one, as when the archive is unpacked
    members = list({member.name: member for member in members if is_image_name(member.name)}.values())
    prefix, parts = _find_splits(path, [member.name for member in members])
    images, classes = {}, set()
    for split, depth in parts.items():
        own = [m for m in members if not split or guess_split(m.name[len(prefix) :].split("/")[0]) == split]
        rows = sorted((m.name[len(prefix) :].split("/")[depth], m.name[len(prefix) :], m) for m in own)
        images[split] = LabelledImages(_make_source(file, path, rows), [label for label, _, _ in rows])
        classes.add(frozenset(images[split].labels))
    if len(classes) > 1:
        every = sorted(frozenset.union(*classes) - frozenset.intersection(*classes))
        raise DataError(f"{path}: the splits hold different classes ({format_list(every)}); give them the same ones.")
    names = folder.require_classes(str(path), next(iter(classes)), read_options)
    return make_dataset(str(path), path.with_suffix(""), names, images, read_options)


def _make_source(file: Path, path: Path, rows: list[tuple[str, str, _ArchiveMember]]) -> ImageSource:
    names, sizes = FileNames(name for _, name, _ in rows), np.array([m.size for _, _, m in rows], np.int64)
    if path.suffix.lower() == ".zip":
        values = np.array([[m.offset, m.method, m.crc, m.stored_size] for _, _, m in rows], np.int64)
        return ZipSource(file, names, sizes, values)
    offsets = np.array([m.offset for _, _, m in rows], np.int64)
    return ShardSource((file,), names, sizes, np.zeros(len(rows), np.int64), offsets)


def _list_zip(file: Path) -> list[_ArchiveMember]:
    try:
        with zipfile.ZipFile(file) as archive:
            infos = [i for i in archive.infolist() if is_image_name(_normalise_path(i.filename)) and not i.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error) as error:
        raise DataError(f"{file} cannot be read as a zip file ({error}); copy or pack it again.") from error
    for info in infos:
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "encrypted" if info.flag_bits & 1 else "compressed in a way that is not read"
            raise DataError(f"{info.filename} in {file} is {kind}; unpack it, and give the folder.")
    names = (_normalise_path(info.filename) for info in infos)
    return [
        _ArchiveMember(name, i.header_offset, i.file_size, i.compress_type, i.CRC, i.compress_size)
        for name, i in zip(names, infos, strict=True)
    ]


def _list_tar(file: Path) -> list[_ArchiveMember]:
    return [_ArchiveMember(_normalise_path(m.name), m.offset_data, m.size) for m in iterate_files(file)]


def _normalise_path(name: str) -> str:
    """A member's path with slashes, also where a program on Windows wrote backslashes alone."""
    return posixpath.normpath(name if "/" in name else name.replace("\\", "/"))


def _find_splits(path: Path, names: list[str]) -> tuple[str, dict[str, int]]:
    """The folder around everything ("" or "photos/"), and of each split the depth of its class folders below that."""
    prefix = ""
    while True:
        parts = [name[len(prefix) :].split("/") for name in names]
        tops = sorted({each[0] for each in parts})
        if len(tops) != 1 or len(parts[0]) < 3 or guess_split(tops[0]):
            break
        prefix += f"{tops[0]}/"
    if not names or min(map(len, parts)) < 2:
        loose = next((name for name, each in zip(names, parts, strict=True) if len(each) < 2), "no image")
        raise DataError(f"{path} holds {loose} outside class folders; give each class a folder of its own.")
    splits = {top: guess_split(top) for top in tops}
    if not all(splits.values()) or min(map(len, parts)) < 3:
        return prefix, {"": 0}
    if len(set(splits.values())) < len(tops):
        raise DataError(f"{path} holds {format_list(tops)}; give each split one folder: train, val or test.")
    return prefix, dict.fromkeys(splits.values(), 1)


def _copy_bounded(source: BinaryIO, target: BinaryIO, limit: int, path: Path) -> None:
    """Copies what is decompressed; raises DataError if it is damaged, or more than `limit` bytes."""
    written = 0
    while True:
        check_stop()
        try:
            chunk = source.read(2**20)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:  # bz2 and gzip raise an OSError
            raise DataError(f"{path} is damaged ({error}); copy it again.") from error
        if not chunk:
            return
        written += len(chunk)
        if written > limit:
            raise DataError(
                f"{path} unpacks to more than {limit:,} bytes, far more than images do; it is refused. If it is right, unpack "
                "it, and give the folder."
            )
        target.write(chunk)


def _decompress(path: Path, data_dir: Path) -> Path:
    """The tar in a compressed file, decompressed into the data folder if it is not there yet."""
    status = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:12]
    target = data_dir / "archives" / f"{path.name.split('.')[0]}-{key}.tar"
    if target.is_file():
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_old_temporary_files(target)
        with COMPRESSED[path.suffix.lower()](path, "rb") as source, open(part, "wb") as file:
            _copy_bounded(source, file, max(SMALL_ARCHIVE, MAX_RATIO * status.st_size), path)
        move_into_place(part, target)
    except OSError as error:
        raise write_error(target, error) from error
    finally:
        part.unlink(missing_ok=True)
    return target
