"""Pictures of a split made ready in batches, by this process or by workers, always the same and in the same order."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as Jobs

from residuum.data.dataset import Pictures, Split
from residuum.data.stored import Stored
from residuum.errors import DataError
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine

T = TypeVar("T")


class Gathered(NamedTuple):
    """Pictures of one size.

    Attributes:
        pixels: uint8 (B, h, w, C).
        kept: which of those asked for they are, int64 (B,).
        bad: (name, why) of the others.
    """

    pixels: Tensor
    kept: Tensor
    bad: list[tuple[str, str]]


def gather(split: Pictures, indices: Sequence[int], make: Callable[[int, Tensor], Tensor]) -> Gathered:
    """The pictures at `indices`, each decoded and then made ready by `make(k, pixels)`, k counting from 0.

    Under "stop" the first that cannot be read ends it (the caller raises, in the process where that is seen).
    """
    ready, kept, bad = [], [], []
    for k, i in enumerate(indices):
        try:
            picture = split.pictures([i])[0]
        except DataError as error:
            assert isinstance(split, Stored)
            bad.append((split.name(i), str(error)))
            if split.reading.on_bad == "stop":
                break
            continue
        ready.append(make(k, picture))
        kept.append(k)
    pixels = torch.stack(ready) if ready else torch.empty(0, 1, 1, 1, dtype=torch.uint8)
    return Gathered(pixels, torch.tensor(kept, dtype=torch.long), bad)


def accept(split: Pictures, gathered: Gathered) -> Gathered:
    """What was gathered; notes what was left out. Raises DataError where a bad picture is to stop the work."""
    if gathered.bad:
        assert isinstance(split, Stored)
        if split.reading.on_bad == "stop":
            raise DataError(
                f"{gathered.bad[0][1].rstrip('.')}; mend or remove it, or go on without it: --on-bad-image skip."
            )
        split.skipped.update(gathered.bad)
    return gathered


def spare_processes(engine: Engine) -> int:
    """How many processes decode by default: none beside a CPU that trains (it is busy itself), up to 12 beside a GPU."""
    return 0 if engine.device.type == "cpu" else min(12, max(1, (os.cpu_count() or 1) - 1))


@dataclass
class _Jobs(Jobs[T]):
    """What DataLoader calls a data set: a function of a number."""

    job: Callable[[int], T]

    def __getitem__(self, key: int) -> T:
        return self.job(key)


def _deaf(_: int) -> None:
    """In a worker: Ctrl-C is the main process's business, and its handlers are not ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def in_order(job: Callable[[int], T], keys: Iterable[int], workers: int, pin: bool = False) -> Iterator[T]:
    """job(key) for every key, in order; worker processes run ahead by two keys each."""
    if not workers:
        yield from map(job, keys)
        return
    own = torch.Generator().manual_seed(0)  # DataLoader draws a number; torch's own generator is left alone
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "This DataLoader will create"
        )  # more workers than cores are the caller's wish
        loader = DataLoader(
            _Jobs(job),
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            worker_init_fn=_deaf,
            pin_memory=pin,
            generator=own,
        )
        results = iter(loader)
    try:
        yield from results
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        raise DataError(
            f"a process that decodes pictures died ({str(error).splitlines()[0]}); memory may be short: use fewer --workers."
        ) from error


@dataclass(frozen=True, eq=False)
class Views:
    """The pictures of a split as a network gets them, before normalisation; made when asked for."""

    split: Pictures
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.split)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, h, w, C)."""
        return (len(self.split), *self.preprocessing.size, self.preprocessing.channels)

    def __getitem__(self, i: int) -> Tensor:
        return view(self.preprocessing, self.split.pictures([i])[0])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(pixels uint8 (B, h, w, C), labels int64 (B,)) of all pictures in order; unreadable ones stop it or are left out."""
        split = self.split
        if isinstance(split, Split) and tuple(split.images.shape[1:]) == self.shape[1:]:
            yield from zip(torch.split(split.images, size), torch.split(split.labels, size), strict=True)
            return

        workers = split.reading.workers if isinstance(split, Stored) else 0
        starts = range(0, len(split), size)
        chunks = in_order(_Chunk(split, self.preprocessing, size), starts, workers)
        for start, gathered in zip(starts, chunks, strict=True):
            pixels, kept, _ = accept(split, gathered)
            if len(kept):
                yield pixels, split.labels[start + kept]


@dataclass(frozen=True, eq=False)
class _Chunk:
    """`size` pictures from a start on; a value, so that it can travel to a worker."""

    split: Pictures
    preprocessing: Preprocessing
    size: int

    def __call__(self, start: int) -> Gathered:
        indices = range(start, min(start + self.size, len(self.split)))
        return gather(self.split, indices, lambda _, pixels: view(self.preprocessing, pixels))


def view(preprocessing: Preprocessing, pixels: Tensor) -> Tensor:
    """One decoded picture, uint8 (H, W, C) -> resized and cropped, uint8 (h, w, C)."""
    array = pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy()
    return preprocessing(Image.fromarray(array))
