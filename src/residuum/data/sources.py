"""The names that people give to data, and what they stand for."""

from __future__ import annotations

from pathlib import Path

from residuum.data import cifar, digits
from residuum.data.dataset import Dataset
from residuum.errors import UsageError, unknown

NAMES = ("digits", "cifar10")


def load(name: str, data_dir: Path) -> Dataset:
    """The data set of a name; archives are looked for under `data_dir`.

    Raises UsageError for an unknown name, DataError where the files are not there or damaged.
    """
    if name == "digits":
        return digits.load()
    if name == "cifar10":
        return cifar.load(data_dir)
    if Path(name).exists():
        raise UsageError(f"{name} is a path; this version trains on {' and '.join(NAMES)}.")
    raise unknown("data set", name, NAMES)
