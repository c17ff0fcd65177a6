"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009), in the binary or the Python version, held as uint8 in memory.

A record of the binary version is one label byte (CIFAR-100: two, coarse and fine), then 1,024 red, green and blue values, row
by row. A folder that lies unpacked is read as it is; an archive beside it is held to its published checksum and unpacked; where
there is neither, the binary version is fetched.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from residuum.data import pickles, remote
from residuum.data.dataset import Dataset, Split
from residuum.errors import DataError, RunError
from residuum.records import writing_error

SITE = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Version:
    """One published form of a data set.

    Attributes:
        meta: the file that names the classes; its presence tells the folder.
        label: binary version: which byte of a record is the label, of `labels` bytes. Python version: the label's key.
        md5: of the archive, as published.
    """

    what: str
    folder: str
    archive: str
    md5: str
    meta: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label: int | str
    labels: int = 1


FIVE = range(1, 6)
VERSIONS = {
    "cifar10": (
        Version("CIFAR-10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
                "batches.meta.txt", tuple(f"data_batch_{i}.bin" for i in FIVE), ("test_batch.bin",), 0),
        Version("CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
                "batches.meta", tuple(f"data_batch_{i}" for i in FIVE), ("test_batch",), "labels"),
    ),
    "cifar100": (
        Version("CIFAR-100", "cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
                "fine_label_names.txt", ("train.bin",), ("test.bin",), 1, 2),
        Version("CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
                "meta", ("train",), ("test",), "fine_labels"),
    ),
}  # fmt: skip
FOLDER = VERSIONS["cifar10"][0].folder
RECORDS = {"cifar10": (10_000, 10_000), "cifar100": (50_000, 10_000)}  # pictures in each file for training, for testing


def load(data_dir: Path, name: str = "cifar10") -> Dataset:
    """The data set from `data_dir`, or from its published folder in there.

    Raises DataError where files are missing, damaged or not those published, and there is no network to fetch them.
    """
    for version in VERSIONS[name]:
        for folder in (data_dir / version.folder, data_dir):
            if (folder / version.meta).is_file():
                return _load(name, version, folder)
    for version in VERSIONS[name]:
        if (archive := data_dir / version.archive).is_file():
            return _load(name, version, _unpacked(archive, version, data_dir))
    version = VERSIONS[name][0]
    try:
        with remote.alone(archive := data_dir / version.archive):
            if not archive.is_file():  # else another process fetched it meanwhile
                url = SITE + version.archive
                remote.download(url, archive, remote.published(url, version.md5))
    except (DataError, RunError) as error:
        raise DataError(
            f"{version.what} is not under {data_dir}: put the binary version's folder {version.folder} ({version.meta}, "
            f"{version.train[0]} … {version.test[0]}) or its archive {version.archive} there, or say where it is with "
            f"--data-dir ({str(error).rstrip('.')})."
        ) from error
    return _load(name, version, _unpacked(archive, version, data_dir))


def _unpacked(archive: Path, version: Version, data_dir: Path) -> Path:
    """Unpacks an archive that is the published one, to the bit."""
    if remote.checksum(archive) != version.md5:
        raise DataError(f"{archive} is damaged or another file: its MD5 is not {version.md5}; fetch it again.")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(data_dir, filter="data")
    except tarfile.TarError as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); fetch it again.") from error
    except OSError as error:
        raise writing_error(data_dir, error) from error
    return data_dir / version.folder


def _load(name: str, version: Version, folder: Path) -> Dataset:
    if isinstance(version.label, str):
        key = version.label[:-1] + "_names"  # "label_names", "fine_label_names"
        classes = tuple(map(str, pickles.read(folder / version.meta).get(key, ())))
    else:
        classes = tuple(_text(folder / version.meta).split())
    if any("\ufffd" in name for name in classes):
        raise DataError(
            f"{folder / version.meta} is damaged: its names are no text in UTF-8; unpack the archive again."
        )
    if len(set(classes)) < max(2, len(classes)):
        raise DataError(
            f"{folder / version.meta} names {len(classes)} classes, some twice or too few; unpack it again."
        )
    train, test = (
        _read(folder, files, version, count, classes, split)
        for files, count, split in zip((version.train, version.test), RECORDS[name], ("train", "test"), strict=True)
    )
    return Dataset(name, classes, train, test)


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); unpack the archive again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is damaged: it is no text in UTF-8; unpack the archive again.") from error


def _read(
    folder: Path, files: tuple[str, ...], version: Version, count: int, classes: tuple[str, ...], split: str
) -> Split:
    parts = [_pickled(folder / file, version) if isinstance(version.label, str) else _binary(folder / file, version)
             for file in files]  # fmt: skip
    for file, (found, _) in zip(files, parts, strict=True):
        if len(found) != count:
            raise DataError(
                f"{folder / file} has {len(found):,} pictures, the published file {count:,}: it ends early or is another; "
                "unpack it again."
            )
    labels = torch.from_numpy(np.concatenate([labels for labels, _ in parts]).astype(np.int64))
    if int(labels.max()) >= len(classes) or int(labels.min()) < 0:
        wrong = int(labels.max()) if int(labels.max()) >= len(classes) else int(labels.min())
        raise DataError(f"{folder} has the label {wrong}, but {version.meta} names {len(classes)} classes.")
    planes = np.concatenate([pixels for _, pixels in parts]).reshape(-1, 3, 32, 32)
    images = torch.from_numpy(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))  # (N, 32, 32, 3)
    return Split(images, labels, split)


def _binary(file: Path, version: Version) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Labels (N,) and planes (N, 3072) of a file of the binary version."""
    assert isinstance(version.label, int)
    record = version.labels + PIXELS
    try:
        raw = np.fromfile(file, np.uint8)
    except OSError as error:
        raise DataError(
            f"{file} cannot be read ({error.strerror}); unpack the binary version's archive again."
        ) from error
    if not len(raw) or len(raw) % record:
        raise DataError(
            f"{file} has {len(raw):,} bytes, not a whole number of {record:,}-byte records; unpack it again."
        )
    records = raw.reshape(-1, record)
    return records[:, version.label], records[:, version.labels :]


def _pickled(file: Path, version: Version) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Labels (N,) and planes (N, 3072) of a file of the Python version."""
    content = pickles.read(file)
    labels, pixels = content.get(str(version.label)), content.get("data")
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list) or pixels.shape != (len(labels), PIXELS):
        raise DataError(f"{file} has no {version.label} with as many pictures of 32x32; unpack the archive again.")
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"{file} has labels that are no numbers; unpack the archive again.")
    return np.array(labels, dtype=np.int64), pixels
