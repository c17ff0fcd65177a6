"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009), in the binary or the Python version, held as uint8 in memory.

A record of the binary version is one label byte (CIFAR-100: two, coarse and fine), then 1,024 red, green and blue values, row
by row. An unpacked folder is read as it is; an archive is checked against its published checksum and unpacked; without either
the binary version is downloaded. The pickles of the Python version are read without letting a file call anything.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from resnetlab.data import download
from resnetlab.data.dataset import Dataset, MemorySplit
from resnetlab.errors import DataError, RunError
from resnetlab.run_folder import temporary_folder, write_error

SITE = "https://www.cs.toronto.edu/~kriz/"
PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarVersion:
    """One published form of a data set.

    Attributes:
        md5: of the archive, as published.
        meta: the file that names the classes; a folder is recognised by it.
        label: binary version: the index of the label among the `labels` label bytes. Python version: the key of the labels.
    """

    title: str
    folder: str
    archive: str
    md5: str
    meta: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label: int | str
    labels: int = 1


BATCHES = range(1, 6)
VERSIONS = {
    "cifar10": (
        CifarVersion("CIFAR-10", "cifar-10-batches-bin", "cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530",
                "batches.meta.txt", tuple(f"data_batch_{i}.bin" for i in BATCHES), ("test_batch.bin",), 0),
        CifarVersion("CIFAR-10", "cifar-10-batches-py", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a",
                "batches.meta", tuple(f"data_batch_{i}" for i in BATCHES), ("test_batch",), "labels"),
    ),
    "cifar100": (
        CifarVersion("CIFAR-100", "cifar-100-binary", "cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8",
                "fine_label_names.txt", ("train.bin",), ("test.bin",), 1, 2),
        CifarVersion("CIFAR-100", "cifar-100-python", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85",
                "meta", ("train",), ("test",), "fine_labels"),
    ),
}  # fmt: skip
FOLDER = VERSIONS["cifar10"][0].folder
RECORDS = {"cifar10": (10_000, 10_000), "cifar100": (50_000, 10_000)}  # images per training file, per test file


def load_cifar(data_dir: Path, name: str = "cifar10") -> Dataset:
    """Loads the data set from `data_dir` or from its published folder in it, downloading it if it is missing.

    Raises DataError if files are damaged or not those published, or cannot be downloaded.
    """
    for version in VERSIONS[name]:
        for folder in (data_dir / version.folder, data_dir):
            if (folder / version.meta).is_file():
                return _load_version(name, version, folder)
    version = next((v for v in VERSIONS[name] if (data_dir / v.archive).is_file()), VERSIONS[name][0])
    archive, folder = data_dir / version.archive, data_dir / version.folder
    with contextlib.ExitStack() as lock:
        try:
            lock.enter_context(download.file_lock(archive))
            if not archive.is_file():
                url = SITE + version.archive
                download.download_file(url, archive, download.md5_check(url, version.md5))
        except (DataError, RunError) as error:
            raise DataError(
                f"{version.title} is not under {data_dir}: put the binary version's folder {version.folder} ({version.meta}, "
                f"{version.train[0]} … {version.test[0]}) or its archive {version.archive} there, or give the folder with "
                f"--data-dir ({str(error).rstrip('.')})."
            ) from error
        if not (folder / version.meta).is_file():  # another process may have unpacked it meanwhile
            _unpack(archive, version, folder)
    return _load_version(name, version, folder)


def _unpack(archive: Path, version: CifarVersion, folder: Path) -> None:
    """Unpacks an archive if its checksum is the published one; the file by which the folder is recognised comes last."""
    if download.compute_md5(archive) != version.md5:
        raise DataError(f"{archive} is damaged or another file: its MD5 is not {version.md5}; fetch it again.")
    try:
        folder.mkdir(exist_ok=True)
        with temporary_folder(folder.parent, ".unpack-") as place, tarfile.open(archive) as tar:
            tar.extractall(place, filter="data")
            for file in sorted((place / version.folder).iterdir(), key=lambda file: file.name == version.meta):
                os.replace(file, folder / file.name)
    except tarfile.TarError as error:
        raise DataError(f"{archive} cannot be unpacked ({error}); fetch it again.") from error
    except OSError as error:
        raise write_error(folder, error) from error


def _load_version(name: str, version: CifarVersion, folder: Path) -> Dataset:
    if isinstance(version.label, str):
        key = version.label[:-1] + "_names"  # "label_names", "fine_label_names"
        classes = tuple(map(str, read_cifar_pickle(folder / version.meta).get(key, ())))
    else:
        classes = tuple(_read_meta(folder / version.meta).split())
    if any("\ufffd" in name for name in classes):
        raise DataError(f"{folder / version.meta} is damaged: its names are not valid UTF-8; unpack the archive again.")
    if len(set(classes)) < max(2, len(classes)):
        raise DataError(
            f"{folder / version.meta} names {len(classes)} classes, some twice or too few; unpack it again."
        )
    train, test = (
        _read_split(folder, files, version, count, split)
        for files, count, split in zip((version.train, version.test), RECORDS[name], ("train", "test"), strict=True)
    )
    for label in (int(x) for split in (train, test) for x in split.labels.aminmax()):
        if not 0 <= label < len(classes):
            raise DataError(f"{folder} has the label {label}, but {version.meta} names {len(classes)} classes.")
    return Dataset(name, classes, train, test)


def _read_meta(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); unpack the archive again.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is damaged: it is not valid UTF-8; unpack the archive again.") from error


def _read_split(folder: Path, files: tuple[str, ...], version: CifarVersion, count: int, split: str) -> MemorySplit:
    read = _read_pickled if isinstance(version.label, str) else _read_binary
    parts = [read(folder / file, version) for file in files]
    for file, (found, _) in zip(files, parts, strict=True):
        if len(found) != count:
            raise DataError(
                f"{folder / file} has {len(found):,} images, the published file {count:,}: it ends early or is another; "
                "unpack it again."
            )
    labels = torch.from_numpy(np.concatenate([labels for labels, _ in parts]).astype(np.int64))
    planes = np.concatenate([pixels for _, pixels in parts]).reshape(-1, 3, 32, 32)
    images = torch.from_numpy(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))  # (N, 32, 32, 3)
    return MemorySplit(images, labels, split)


def _read_binary(file: Path, version: CifarVersion) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
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


def _read_pickled(file: Path, version: CifarVersion) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Labels (N,) and planes (N, 3072) of a file of the Python version."""
    content = read_cifar_pickle(file)
    labels, pixels = content.get(str(version.label)), content.get("data")
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, list) or pixels.shape != (len(labels), PIXELS):
        raise DataError(f"{file} has no {version.label} with as many images of 32x32; unpack the archive again.")
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"{file} has labels that are not numbers; unpack the archive again.")
    return np.array(labels, dtype=np.int64), pixels


# A pickle names functions that its reader is to call. Here the four names that CIFAR's files need give inert values, and
# any other name is an error.


class _Array:
    """Takes the place of an array while the pickle is read; `state` is (version, shape, type, Fortran order, bytes)."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _Type:
    """Takes the place of a numpy type; keeps only its name."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        return None


def _new_array(*_: Any) -> _Array:
    return _Array()


def _encode_latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _new_array,
    ("numpy._core.multiarray", "_reconstruct"): _new_array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode_latin1,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no published file does")
        return ALLOWED[module, name]


def read_cifar_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in a file of CIFAR's Python version; arrays are uint8, names str.

    Raises DataError if the file is missing, truncated, or names anything that CIFAR does not need.
    """
    try:
        value = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); unpack the archive again.") from error
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(
            f"{path} is not a file of CIFAR's Python version ({error}); unpack the archive again."
        ) from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a file of CIFAR's Python version; unpack the archive again.")
    return {_decode_text(key): _to_plain(item, path) for key, item in value.items()}


def _decode_text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _to_plain(value: Any, path: Path) -> Any:
    if isinstance(value, _Array):
        return _byte_array(value, path)
    return [_decode_text(item) for item in value] if isinstance(value, list) else _decode_text(value)


def _byte_array(value: _Array, path: Path) -> NDArray[np.uint8]:
    try:
        _, shape, kind, fortran, content = value.state
        if _decode_text(kind.name) != "u1":
            raise ValueError(f"its values are {_decode_text(kind.name)}, not bytes")
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds no images ({error}); unpack the archive again.") from error
