"""What a data set is: pictures with labels and names, in memory here or on disk (data.stored), and class names.

Every split, wherever its pictures lie, has `labels`, `names`, `len()`, `take(indices)` and `pictures(indices)`: decoded, uint8
(H, W, C), each at its own size. Training and evaluation know no more of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from residuum.errors import DataError
from residuum.runtime import seed_for


class Pictures(Protocol):
    """A split: pictures with labels and names."""

    @property
    def labels(self) -> Tensor:
        """int64 (N,), positions in the data set's `classes`."""

    @property
    def names(self) -> Sequence[str]:
        """One for each picture: a file's name below the data set's folder, or "test/12"."""

    def __len__(self) -> int: ...

    def take(self, indices: Tensor) -> Self:
        """The pictures at `indices`, in that order."""

    def labelled(self, labels: Tensor) -> Self:
        """The same pictures with other labels."""

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        """Decoded pictures, uint8 (H, W, C), each at its own size; raises DataError for one that cannot be read."""

    def feed(self, digest: Any) -> None:
        """Feeds a hash with what the split holds."""


@dataclass(frozen=True, eq=False)
class Split:
    """Pictures of one size, held in memory.

    Attributes:
        images: uint8 (N, H, W, C).
        labels: int64 (N,), positions in the data set's `classes`.
        name: what the pictures are called by: "test" gives "test/0", "test/1", …
        where: their numbers, int64 (N,); None counts from 0.
    """

    images: Tensor
    labels: Tensor
    name: str = "pictures"
    where: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> Sequence[str]:
        numbers = range(len(self)) if self.where is None else self.where.tolist()
        return [f"{self.name}/{i}" for i in numbers]

    def take(self, indices: Tensor) -> Split:
        where = indices if self.where is None else self.where[indices]
        return Split(self.images[indices], self.labels[indices], self.name, where)

    def labelled(self, labels: Tensor) -> Split:
        return Split(self.images, labels, self.name, self.where)

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        return [self.images[i] for i in indices]

    def feed(self, digest: Any) -> None:
        digest.update(self.labels.numpy().tobytes())
        digest.update(self.images.numpy().data)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Pictures of the same classes to train on, to watch while training, and to judge by.

    Attributes:
        train: empty where the data are only for judging.
        test: touched once, at the end of a run.
        val: judged while training; None where the data have no such part.
        judged: what `test` is called where it comes from: "test", "val", or "held-out" where it was drawn from all pictures.
    """

    name: str
    classes: tuple[str, ...]
    train: Pictures
    test: Pictures
    val: Pictures | None = None
    judged: str = "test"
    whole: Pictures | None = None  # all pictures, where `test` was drawn from them
    fingerprint: str = field(init=False)  # SHA-256 of classes and of what the splits hold, the first 16 hex digits

    def __post_init__(self) -> None:
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for split in (self.train, self.test, *([self.val] if self.val is not None else [])):
            split.feed(digest)
        object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])

    @property
    def splits(self) -> dict[str, Pictures]:
        """The splits by the names that people give."""
        parts = {"train": self.train, "val": self.val, self.judged: self.test, "all": self.whole}
        return {name: split for name, split in parts.items() if split is not None and len(split)}


def stratified(labels: Tensor, count: int, seed: int = 0, names: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    """Splits positions into (rest, chosen): `count` chosen, each class in proportion, the same on every machine.

    Args:
        labels: int64 (N,).
        count: how many to choose, from 1 to N - 1.
        seed: another seed chooses others.
        names: the choice then depends on the pictures' names, not on their positions, so that one picture more moves few.

    Returns:
        Two ascending int64 tensors of positions.

    Raises:
        DataError: where nothing would be left.
    """
    n = len(labels)
    if not 0 < count < n:
        raise DataError(f"cannot hold out {count:,} of {n:,} pictures; hold out at least 1 and fewer than all.")
    sizes = torch.bincount(labels)
    quotas = sizes * count // n
    remainders = sizes * count % n  # the largest remainders get one more, until `count` is reached
    quotas[torch.argsort(remainders, descending=True, stable=True)[: count - int(quotas.sum())]] += 1
    keys = torch.tensor([seed_for(seed, "stratified", names[i] if names else i) for i in range(n)])
    shuffled = torch.argsort(keys)
    chosen = [shuffled[labels[shuffled] == c][: int(q)] for c, q in enumerate(quotas)]
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()
