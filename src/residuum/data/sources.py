"""The names that people give to data, and what stands behind them."""

from __future__ import annotations

from pathlib import Path

from residuum.data import cifar, digits, folder
from residuum.data.dataset import Dataset
from residuum.data.stored import Reading
from residuum.errors import DataError, unknown

NAMES = ("digits", "cifar10", "cifar100")


def is_name(data: str) -> bool:
    """Whether DATA is a data set's name rather than a place."""
    return data in NAMES


def short_name(data: str) -> str:
    """A folder's name for runs on data: "digits", or the last part of a path."""
    return data if is_name(data) else Path(data).resolve().name or "photos"


def load(name: str, data_dir: Path, reading: Reading | None = None) -> Dataset:
    """The data set of a name, or of a folder of class folders.

    Args:
        name: "digits", "cifar10", "cifar100" or a path.
        data_dir: where archives lie.
        reading: how pictures on disk are read.

    Raises UsageError for an unknown name, DataError where the files are not there or damaged.
    """
    reading = reading or Reading()
    if name == "digits":
        return digits.load()
    if name in cifar.VERSIONS:
        return cifar.load(data_dir, name)
    path = Path(name)
    if path.is_dir():
        return folder.load(path, reading)
    if path.exists():
        raise DataError(f"{name} is a file; give the folder that holds the class folders.")
    if "/" in name:
        raise DataError(f"{name} is not there; give a folder of class folders, or one of {', '.join(NAMES)}.")
    raise unknown("data set", name, NAMES)
