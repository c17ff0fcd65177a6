"""Randomness as a function: every random draw has a seed of its own, made from the run's seed and what is drawn."""

from __future__ import annotations

import hashlib

import torch


def seed_for(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2^63) for one use of randomness: the same (seed, parts) give the same number on every machine.

    >>> seed_for(0, "order", 3) == seed_for(0, "order", 3) != seed_for(0, "order", 4)
    True
    """
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def make_generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_for(seed, *parts)`."""
    return torch.Generator().manual_seed(seed_for(seed, *parts))
