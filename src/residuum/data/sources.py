"""The names that people give to data, and what stands behind them."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

from residuum.data import cifar, digits, folder, remote, shards
from residuum.data.dataset import Dataset
from residuum.data.fetched import is_address
from residuum.data.stored import Reading
from residuum.errors import DataError, UsageError, unknown

NAMES = ("digits", "cifar10", "cifar100")


def is_name(data: str) -> bool:
    """Whether DATA is a data set's name rather than a place."""
    return data in NAMES


def unsigned(data: str) -> str:
    """DATA as files and messages may have it: without an address's query, which may be a signature."""
    return remote.shown(data) if is_address(data) else data


def short_name(data: str) -> str:
    """A folder's name for runs on data: "digits", or the last part of a path."""
    data = unsigned(data)
    if is_name(data):
        return data
    if shards.is_pattern(data) and not Path(data).is_dir():
        return re.sub(r"\W+", "-", data.rsplit("/", 2)[-2] if data.count("/") > 1 else "shards").strip("-") or "shards"
    return Path(data).resolve().name or "photos"


def located(data: str, start: Path) -> str:
    """DATA as seen from here, where a path in it starts from the folder `start`."""
    return data if is_name(data) or "://" in data or not data.strip() else str(start / data)


def load(name: str, data_dir: Path, reading: Reading | None = None) -> Dataset:
    """The data set of a name, of a folder of class folders, or of tar shards.

    Args:
        name: "digits", "cifar10", "cifar100", a path, or a pattern of tar shards.
        data_dir: where archives lie.
        reading: how pictures on disk are read.

    Raises UsageError for an unknown name, DataError where the files are not there or damaged.
    """
    reading = reading or Reading()
    if not name.strip():
        raise UsageError(f"the data set's name is empty; give a folder of class folders, or one of {', '.join(NAMES)}.")
    if name == "digits":
        return digits.load()
    if name in cifar.VERSIONS:
        return _in_memory(name, data_dir.resolve())
    if shards.is_pattern(name):
        return shards.load(name, data_dir, reading)
    path = Path(name)
    if path.is_dir():
        return folder.load(path, reading)
    if path.exists():
        raise DataError(f"{name} is a file; give the folder that holds the class folders.")
    if "/" in name:
        raise DataError(f"{name} is not there; give a folder of class folders, or one of {', '.join(NAMES)}.")
    raise unknown("data set", name, NAMES)


@lru_cache(maxsize=1)  # runs that follow each other in one process read the files once
def _in_memory(name: str, data_dir: Path) -> Dataset:
    return cifar.load(data_dir, name)
