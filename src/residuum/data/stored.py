"""A split whose pictures lie on disk and are decoded when asked for; memory holds names, sizes and labels alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residuum.data.decode import decode_pixels
from residuum.errors import DataError, unknown

ON_BAD = ("stop", "skip")


class Names(Sequence[str]):
    """Many names in two arrays: worker processes share them, where a list would be copied page by page as it is read."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [name.encode("utf-8", "surrogateescape") for name in names]  # a name need not be UTF-8
        self._text = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends: NDArray[np.int64] = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        start, end = self._ends[i % len(self)], self._ends[i % len(self) + 1]
        return self._text[start:end].tobytes().decode("utf-8", "surrogateescape")


class Source(Protocol):
    """Where encoded pictures come from."""

    @property
    def names(self) -> Sequence[str]:
        """One for each picture."""

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each; -1 where it could not be told."""

    def read(self, i: int) -> bytes:
        """The encoded picture; raises DataError, naming it, where it cannot be read."""

    def label(self, i: int) -> str:
        """What messages call it."""


@dataclass(frozen=True, eq=False)
class Files:
    """Picture files below a folder."""

    root: Path
    names: Sequence[str]
    sizes: NDArray[np.int64]

    def read(self, i: int) -> bytes:
        try:
            return (self.root / self.names[i]).read_bytes()
        except FileNotFoundError:
            raise DataError(f"{self.label(i)} is not there.") from None
        except PermissionError:
            raise DataError(f"{self.label(i)} cannot be read: no permission.") from None
        except OSError as error:
            raise DataError(f"{self.label(i)} cannot be read ({error.strerror or error}).") from error

    def label(self, i: int) -> str:
        return str(self.root / self.names[i])


@dataclass(frozen=True)
class Reading:
    """How pictures on disk are read.

    Attributes:
        on_bad: "stop" at a picture that cannot be read, or "skip" it: it is left out, counted and listed.
        quarantine: a file with one picture's name a line (`quarantine_line`); these are left out from the start.
        workers: processes that decode while the network computes; 0 decodes in this one. The result is the same.
    """

    on_bad: str = "stop"
    quarantine: str = ""
    workers: int = 0

    def __post_init__(self) -> None:
        if self.on_bad not in ON_BAD:
            raise unknown("on_bad_image", self.on_bad, ON_BAD)

    def quarantined(self) -> frozenset[str]:
        """The names in the quarantine file; raises DataError where it cannot be read."""
        if not self.quarantine:
            return frozenset()
        try:
            text = Path(self.quarantine).read_bytes().decode("utf-8-sig", "surrogateescape")
        except OSError as error:
            raise DataError(
                f"the quarantine list {self.quarantine} cannot be read ({error.strerror}); make it with "
                "`residuum data check DATA --quarantine FILE`."
            ) from error
        # a line that starts with "#" may be a name, as of a class folder "#dog"; a remark is no picture's and does no harm
        return frozenset(_unquoted(line.removesuffix("\r")) for line in text.split("\n"))


def quarantine_line(name: str) -> str:
    """A picture's name as a line of a quarantine list: as it is, or as a JSON string where it would not be one line."""
    return json.dumps(name) if name.startswith('"') or "\n" in name or "\r" in name else name


def _unquoted(line: str) -> str:
    if not line.startswith('"'):
        return line
    try:
        return str(json.loads(line))
    except ValueError:
        return line


@dataclass(frozen=True, eq=False)
class Stored:
    """Pictures on disk.

    Attributes:
        where: positions in `source`, int64 (N,).
        labels: int64 (N,), positions in the data set's `classes`.
        skipped: name -> why, of the pictures that were left out so far because they could not be read.
    """

    source: Source
    where: Tensor
    labels: Tensor
    reading: Reading = field(default_factory=Reading)
    skipped: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> Sequence[str]:
        return [self.source.names[i] for i in self.where.tolist()]

    def name(self, i: int) -> str:
        """names[i], without a list of all."""
        return self.source.names[int(self.where[i])]

    def take(self, indices: Tensor) -> Stored:
        return replace(self, where=self.where[indices], labels=self.labels[indices])

    def labelled(self, labels: Tensor) -> Stored:
        return replace(self, labels=labels)

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        places = (int(self.where[i]) for i in indices)
        return [decode_pixels(self.source.read(i), self.source.label(i)) for i in places]

    def readable(self) -> Stored:
        """Without the pictures that were found to be unreadable."""
        if not self.skipped:
            return self
        kept = [k for k, i in enumerate(self.where.tolist()) if self.source.names[i] not in self.skipped]
        return self.take(torch.tensor(kept, dtype=torch.long))

    def feed(self, digest: Any) -> None:
        """Labels, names and sizes in bytes: to read every file would take too long at the start of a run."""
        digest.update(self.labels.numpy().tobytes())
        for i in self.where.tolist():
            name = self.source.names[i].encode("utf-8", "surrogateescape")
            digest.update(b"%d %s\n" % (int(self.source.sizes[i]), name))
