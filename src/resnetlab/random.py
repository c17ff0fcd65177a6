"""Randomness as a function: every random draw has a seed of its own, made from the run's seed and what is drawn."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_DRAWING = {  # torch's functions and methods that draw; all take a generator
    "rand", "randn", "randint", "randperm", "bernoulli", "normal", "multinomial", "poisson", "uniform_", "normal_",
    "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_",
}  # fmt: skip
_active = threading.local()
SAMPLING_VERSION = 2  # of StepDraws
MAX_UNDIVIDED = 1024  # images of a step whose numbers come from one generator
BLOCK = 256  # images of a larger step whose numbers do


def seed_for(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2^63) for one use of randomness: the same (seed, parts) give the same number on every machine.

    >>> seed_for(0, "order", 3) == seed_for(0, "order", 3) != seed_for(0, "order", 4)
    True
    """
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def seeds_for(seed: int, use: str, parts: Iterable[int | str]) -> NDArray[np.int64]:
    """`seed_for(seed, use, part)` of each of many parts, int64 (N,); a third of the time of as many calls."""
    prefix = hashlib.blake2b(f"{seed}/{use}/".encode(), digest_size=8)
    digests = []
    for part in parts:
        digest = prefix.copy()
        digest.update(str(part).encode())
        digests.append(digest.digest())
    return (np.frombuffer(b"".join(digests), ">u8") >> 1).astype(np.int64)


def make_generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_for(seed, *parts)`."""
    return torch.Generator().manual_seed(seed_for(seed, *parts))


def active_generator() -> torch.Generator | None:
    """The generator that this thread draws from, inside `draw_from`."""
    return getattr(_active, "generator", None)


@contextlib.contextmanager
def draw_from(generator: torch.Generator) -> Iterator[None]:
    """Makes what a network draws in this thread, on the CPU, come from a generator instead of torch's global one.

    The numbers are those that the global generator would give in the same state. Threads side by side would take numbers from
    the global one in an order that changes from run to run.
    """
    before, _active.generator = active_generator(), generator
    try:
        with _DrawFrom(generator):
            yield
    finally:
        _active.generator = before


class _DrawFrom(TorchFunctionMode):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.dropout:
            return self._dropout(*args, **kwargs)
        if getattr(function, "__name__", "") in _DRAWING and kwargs.get("generator") is None:
            kwargs = kwargs | {"generator": self._generator}
        return function(*args, **kwargs)

    def _dropout(self, x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        """F.dropout, which takes no generator, computed as torch computes it on a CPU."""
        if not training or p == 0:
            return x
        kept = torch.empty_like(x).bernoulli_(1 - p, generator=self._generator)
        kept = kept if p == 1 else kept.div_(1 - p)
        return x.mul_(kept) if inplace else x * kept


class StepDraws(NamedTuple):
    """Random numbers of the images at some positions of a step: those that they get among all of its images.

    In a large step each BLOCK of positions has a generator of its own, so that a process draws little more than its share.

    Attributes:
        size: images of the step.
        positions: ascending int64 (B,); None for all.
        version: 1 takes one generator for a step of any size.
    """

    seed: int
    step: int
    size: int
    positions: Tensor | None = None
    version: int = SAMPLING_VERSION

    def __call__(self, use: str, *draws: Callable[[int, torch.Generator], Tensor]) -> list[Tensor]:
        """The numbers (B, …) of each of some draws, one after the other from the same generator.

        Args:
            use: part of the seed.
            draws: number of images n and generator -> numbers (n, …).
        """
        in_blocks = self.version > 1 and self.size > MAX_UNDIVIDED
        length = BLOCK if in_blocks else self.size
        positions = torch.arange(self.size) if self.positions is None else self.positions
        blocks, counts = torch.unique_consecutive(positions // length, return_counts=True)
        found = []
        for block, own in zip(blocks.tolist(), torch.split(positions, counts.tolist()), strict=True):
            generator = make_generator(self.seed, use, self.step, *([block] if in_blocks else []))
            n = min(length, self.size - block * length)
            found.append([draw(n, generator)[own - block * length] for draw in draws])
        return [torch.cat(parts) for parts in zip(*found, strict=True)]


ROUNDS = 8  # of the Feistel network
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

    def __getitem__(self, positions: slice) -> torch.Tensor:
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
