"""A permutation of any number of images without a table: each position is computed when it is asked for."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnetlab.random import seed_for

ROUNDS = 8
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of SplitMix64's finalizer


class KeyedPermutation:
    """A permutation of range(n) that a key decides; `permutation[start:stop]` are its values there, int64.

    A Feistel network on the smallest even number of bits that holds n, applied again to values outside (cycle walking; Black &
    Rogaway 2002, "Ciphers with arbitrary finite domains"). It takes no memory, where a table of n takes 8·n bytes in every
    process that reads images.
    """

    def __init__(self, n: int, key: int) -> None:
        self.n = n
        half = max(1, ((n - 1).bit_length() + 1) // 2)
        self._half, self._mask = np.uint64(half), np.uint64(2**half - 1)
        self._keys = [np.uint64(seed_for(key, "round", r)) for r in range(ROUNDS)]

    def __getitem__(self, positions: slice) -> Tensor:
        x = self._encrypt(np.arange(*positions.indices(self.n), dtype=np.uint64))
        while len(outside := np.flatnonzero(x >= self.n)):
            x[outside] = self._encrypt(x[outside])
        return torch.from_numpy(x.astype(np.int64))

    def _encrypt(self, x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> self._half, x & self._mask
        for key in self._keys:
            mixed = right + key  # modulo 2^64
            for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
                mixed = (mixed ^ (mixed >> np.uint64(shift))) * multiplier
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & self._mask)
        return left << self._half | right


def keyed_epoch(seed: int, n: int, epoch: int) -> KeyedPermutation:
    """The order of n images in an epoch."""
    return KeyedPermutation(n, seed_for(seed, "keyed order", epoch))
