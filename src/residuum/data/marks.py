"""Marks by which a model tells the pictures that it was trained with again, whatever else of the data has changed.

A picture's mark is a hash of its name below the data set's folder and its size in bytes; a model file keeps those of the
pictures that its run saw (it learnt from them, or they were judged while it learnt) and of those that the run held out to the
end. So a quarantine, or a picture that was added, removed or resized, does not make a training picture a new one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residuum.data.dataset import Dataset, Pictures
from residuum.data.stored import Stored

SAME = (
    0.1  # of the pictures of a known name must have the known size too; else it is another folder with the same names
)
INSIDE = "train/"  # a folder's own train/ may be given as the data

Marks = NDArray[np.uint32]  # (N, 2): hash of the name, size in bytes


class Known(NamedTuple):
    """What a model knows of pictures; both bool (N,). `seen` in training, `kept` for the end by its run."""

    seen: Tensor
    kept: Tensor


def marked(seen: Iterable[Pictures], kept: Iterable[Pictures], before: Mapping[str, Any]) -> dict[str, str]:
    """The marks as a model file has them, of splits on disk; those in memory are fixed, and their fingerprint says enough.

    Args:
        before: what the model file has that training started from: what that one saw, this one knows too.
    """
    old = [_read(str(before["seen"]))] if before.get("seen") else []
    parts = {"seen": [*old, *map(_marks, seen)], "kept": [*map(_marks, kept)]}
    return {key: _written(np.concatenate(marks)) for key, marks in parts.items() if sum(map(len, marks))}


def known(about: Mapping[str, Any], data: Dataset, pictures: Pictures) -> Known:
    """What the model whose file says `about` of its data knows of some pictures of a data set."""
    seen, kept = (
        _found(_read(str(about[key])), pictures) if key in about else np.zeros(len(pictures), bool)
        for key in ("seen", "kept")
    )
    if about.get("fingerprint") == data.fingerprint:
        learnt = set(data.train.names)
        seen |= np.array([name in learnt for name in pictures.names], bool)
    return Known(torch.from_numpy(seen), torch.from_numpy(kept & ~seen))


def namesakes(about: Mapping[str, Any], pictures: Pictures) -> int:
    """How many pictures have the name, but not the size, of one that was seen, where too few agree to be the same folder."""
    if "seen" not in about:
        return 0
    seen = _read(str(about["seen"]))
    return int((np.isin(_marks(pictures)[:, 0], seen[:, 0]) & ~_found(seen, pictures)).sum())


def _marks(split: Pictures, inside: str = "") -> Marks:
    if not isinstance(split, Stored):
        return np.empty((0, 2), np.uint32)
    names = [_hash(inside + name) for name in split.names]
    return np.stack([np.array(names, np.uint32), split.source.sizes[split.where.numpy()].astype(np.uint32)], 1)


def _hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=4).digest()
    return int.from_bytes(digest, "little")


def _found(those: Marks, pictures: Pictures) -> NDArray[np.bool_]:
    """Which of the pictures are among those marked, bool (N,): by name, if sizes show that it is the same folder."""
    found = np.zeros(len(pictures), bool)
    size_of = dict(those.tolist())
    if not isinstance(pictures, Stored):
        return found
    for inside in ("", INSIDE):
        ours = _marks(pictures, inside)
        named = np.isin(ours[:, 0], those[:, 0])
        same = np.array([size_of.get(name) == size for name, size in ours.tolist()], bool)
        found |= named if same.sum() > SAME * named.sum() else named & same
    return found


def _written(marks: Marks) -> str:
    return base64.b64encode(np.unique(marks, axis=0).astype("<u4").tobytes()).decode()


def _read(text: str) -> Marks:
    return np.frombuffer(base64.b64decode(text), "<u4").reshape(-1, 2).astype(np.uint32)
