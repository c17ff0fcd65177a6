"""A data set in memory: uint8 pictures, labels, class names, and a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from residuum.errors import DataError
from residuum.runtime import seed_for


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
        """What a person finds each picture by."""
        numbers = range(len(self)) if self.where is None else self.where.tolist()
        return [f"{self.name}/{i}" for i in numbers]

    def take(self, indices: Tensor) -> Split:
        """The pictures at `indices`, in that order."""
        where = indices if self.where is None else self.where[indices]
        return Split(self.images[indices], self.labels[indices], self.name, where)

    def pictures(self, indices: Sequence[int]) -> list[Tensor]:
        """The pictures at `indices`, each uint8 (H, W, C)."""
        return [self.images[i] for i in indices]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test pictures of the same classes."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    fingerprint: str = field(
        init=False
    )  # SHA-256 of classes, labels and pixels of both splits, the first 16 hex digits

    def __post_init__(self) -> None:
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(split.labels.numpy().tobytes())
            digest.update(split.images.numpy().data)
        object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])


def stratified(labels: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Splits positions into (rest, chosen): `count` chosen, each class in proportion, the same on every machine.

    Args:
        labels: int64 (N,).
        count: how many to choose, from 1 to N - 1.
        seed: another seed chooses others.

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
    keys = torch.tensor([seed_for(seed, "stratified", i) for i in range(n)])
    shuffled = torch.argsort(keys)
    chosen = [shuffled[labels[shuffled] == c][: int(q)] for c, q in enumerate(quotas)]
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()
