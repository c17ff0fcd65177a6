"""Fingerprints by which a model recognises the images of its training run, whatever else of the data has changed.

An image's fingerprint is a hash of its name below the data set's folder and its size in bytes. A model file stores those of
the images that its run saw (in training, or in evaluations while training) and of those that the run held out to the end. So
quarantining an image, or adding, removing or resizing one, does not make the other training images look new.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnetlab.data.dataset import Dataset, Split
from resnetlab.data.disk_split import DiskSplit

# This share of the images with a known name must have the known size; otherwise it is another folder with equal names.
MIN_SAME_SIZE = 0.1
INSIDE = "train/"  # a folder's own train/ may be given as the data

Fingerprints = NDArray[np.uint32]  # (N, 2): hash of the name, size in bytes


class SeenImages(NamedTuple):
    """Which images a model knows; both bool (N,). `seen` in training, `held_out` to the end of its run."""

    seen: Tensor
    held_out: Tensor


def record_fingerprints(
    seen: Iterable[Split], held_out: Iterable[Split], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The fingerprints of splits on disk for a model file; splits in memory never change, so the data's hash suffices.

    Args:
        before: the fingerprints of the model that training started from: the images that it saw count as seen.
    """
    old = [before["seen"].numpy()] if "seen" in before else []
    parts = {"seen": [*old, *map(_fingerprint, seen)], "held_out": [*map(_fingerprint, held_out)]}
    return {
        key: torch.from_numpy(_unpack(np.unique(_pack(np.concatenate(arrays)))))
        for key, arrays in parts.items()
        if sum(map(len, arrays))
    }


def match_fingerprints(known: Mapping[str, Tensor], data_hash: str, data: Dataset, images: Split) -> SeenImages:
    """Which images of a data set a model knows.

    Args:
        known: the fingerprints in the model's file.
        data_hash: the hash of the data that it was trained on; "" if that is not known.
    """
    seen, held_out = (
        _match(known[key].numpy(), images) if key in known else np.zeros(len(images), bool)
        for key in ("seen", "held_out")
    )
    if data_hash == data.fingerprint:
        trained_on = set(data.train.names)
        seen |= np.array([name in trained_on for name in images.names], bool)
    return SeenImages(torch.from_numpy(seen), torch.from_numpy(held_out & ~seen))


def same_name_count(known: Mapping[str, Tensor], images: Split) -> int:
    """How many images have the name but not the size of a seen one, if too few sizes agree for the same folder."""
    if "seen" not in known:
        return 0
    seen = known["seen"].numpy()
    return int((np.isin(_fingerprint(images)[:, 0], seen[:, 0]) & ~_match(seen, images)).sum())


def encode_fingerprints(known: Mapping[str, Tensor]) -> dict[str, str]:
    """Fingerprints in base64, for exported files."""
    return {key: base64.b64encode(value.numpy().astype("<u4").tobytes()).decode() for key, value in known.items()}


def decode_fingerprints(encoded: Mapping[str, str]) -> dict[str, Tensor]:
    """The fingerprints that `encode_fingerprints` encoded; raises ValueError where it did not."""
    return {
        key: torch.from_numpy(np.frombuffer(base64.b64decode(text), "<u4").reshape(-1, 2).astype(np.uint32))
        for key, text in encoded.items()
    }


def _fingerprint(split: Split, prefix: str = "") -> Fingerprints:
    if not isinstance(split, DiskSplit):
        return np.empty((0, 2), np.uint32)
    encoded = ((prefix + name).encode("utf-8", "surrogateescape") for name in split.names)
    hashes = np.frombuffer(b"".join(hashlib.blake2b(name, digest_size=4).digest() for name in encoded), "<u4")
    return np.stack([hashes.astype(np.uint32), split.source.sizes[split.indices.numpy()].astype(np.uint32)], 1)


def _pack(pairs: Fingerprints) -> NDArray[np.uint64]:
    """Each pair as one number, of the same order: numbers are sorted and found ten times as fast as rows."""
    return pairs[:, 0].astype(np.uint64) << np.uint64(32) | pairs[:, 1]


def _unpack(packed: NDArray[np.uint64]) -> Fingerprints:
    return np.stack([packed >> np.uint64(32), packed & np.uint64(2**32 - 1)], 1).astype(np.uint32)


def _match(known: Fingerprints, images: Split) -> NDArray[np.bool_]:
    """Which images are among the known ones, bool (N,): by name alone if enough sizes show that it is the same folder."""
    found = np.zeros(len(images), bool)
    if not isinstance(images, DiskSplit):
        return found
    for prefix in ("", INSIDE):
        own = _fingerprint(images, prefix)
        same_name = np.isin(own[:, 0], known[:, 0])
        same_size = np.isin(_pack(own), _pack(known))
        found |= same_name if same_size.sum() > MIN_SAME_SIZE * same_name.sum() else same_name & same_size
    return found
