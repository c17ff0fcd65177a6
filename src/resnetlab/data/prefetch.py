"""Loads images of a split in batches, in this process or in workers that run ahead; both give the same batches."""

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
from torch.utils.data import Dataset as TorchDataset

from resnetlab.data.dataset import MemorySplit, Split
from resnetlab.data.disk_split import DiskSplit
from resnetlab.device import DeviceConfig
from resnetlab.errors import DataError
from resnetlab.preprocessing import Preprocessing

T = TypeVar("T")


class ImageBatch(NamedTuple):
    """Images of one size.

    Attributes:
        pixels: uint8 (B, h, w, C).
        positions: their positions among the requested images, int64 (B,).
        unreadable: (name, reason) of the other requested images.
    """

    pixels: Tensor
    positions: Tensor
    unreadable: list[tuple[str, str]]


def load_batch(split: Split, indices: Sequence[int], transform: Callable[[int, Tensor], Tensor]) -> ImageBatch:
    """Decodes the images at `indices` and applies `transform(k, pixels)` to each, k counting from 0.

    Under "stop" it ends at the first unreadable image; the main process raises the error (`handle_unreadable`).
    """
    images, positions, unreadable = [], [], []
    for k, i in enumerate(indices):
        try:
            image = split.read_images([i])[0]
        except DataError as error:
            assert isinstance(split, DiskSplit)
            unreadable.append((split.name(i), str(error)))
            if split.read_options.on_bad == "stop":
                break
            continue
        images.append(transform(k, image))
        positions.append(k)
    pixels = torch.stack(images) if images else torch.empty(0, 1, 1, 1, dtype=torch.uint8)
    return ImageBatch(pixels, torch.tensor(positions, dtype=torch.long), unreadable)


def handle_unreadable(split: Split, batch: ImageBatch) -> ImageBatch:
    """Returns the batch and records what was skipped. Raises DataError under "stop" if an image is unreadable."""
    if batch.unreadable:
        assert isinstance(split, DiskSplit)
        if split.read_options.on_bad == "stop":
            raise DataError(
                f"{batch.unreadable[0][1].rstrip('.')}; fix or remove it, or go on without it: --on-bad-image skip."
            )
        split.skipped.update(batch.unreadable)
    return batch


def default_workers(device_config: DeviceConfig) -> int:
    """How many processes decode by default: none if a CPU trains (it is busy itself), up to 12 for a GPU."""
    return 0 if device_config.device.type == "cpu" else min(12, max(1, (os.cpu_count() or 1) - 1))


@dataclass
class _JobDataset(TorchDataset[T]):
    """A job as the map-style data set that DataLoader expects."""

    job: Callable[[int], T]

    def __getitem__(self, key: int) -> T:
        return self.job(key)


def _ignore_sigint(_: int) -> None:
    """In a worker: leaves Ctrl-C to the main process, and drops the main process's signal handlers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def prefetch(job: Callable[[int], T], keys: Iterable[int], workers: int, pin: bool = False) -> Iterator[T]:
    """Yields job(key) for every key, in order; worker processes run ahead by two keys each."""
    if not workers:
        yield from map(job, keys)
        return
    own = torch.Generator().manual_seed(0)  # DataLoader draws a number; torch's global generator stays untouched
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "This DataLoader will create"
        )  # more workers than cores are the user's choice
        loader = DataLoader(
            _JobDataset(job),
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            worker_init_fn=_ignore_sigint,
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
            f"a process that decodes images died ({str(error).splitlines()[0]}); memory may be short: use fewer --workers."
        ) from error


@dataclass(frozen=True, eq=False)
class PreprocessedSplit:
    """The images of a split resized and cropped for a network, before normalisation; computed on access."""

    split: Split
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.split)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, h, w, C)."""
        return (len(self.split), *self.preprocessing.size, self.preprocessing.channels)

    def __getitem__(self, i: int) -> Tensor:
        return preprocess_image(self.preprocessing, self.split.read_images([i])[0])

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (pixels uint8 (B, h, w, C), labels int64 (B,)) of all images in order, without those that are skipped."""
        split = self.split
        if isinstance(split, MemorySplit) and tuple(split.images.shape[1:]) == self.shape[1:]:
            yield from zip(torch.split(split.images, size), torch.split(split.labels, size), strict=True)
            return

        workers = split.read_options.workers if isinstance(split, DiskSplit) else 0
        starts = range(0, len(split), size)
        chunks = prefetch(_ChunkReader(split, self.preprocessing, size), starts, workers)
        for start, batch in zip(starts, chunks, strict=True):
            pixels, positions, _ = handle_unreadable(split, batch)
            if len(positions):
                yield pixels, split.labels[start + positions]


@dataclass(frozen=True, eq=False)
class _ChunkReader:
    """Loads `size` images from an index on. Picklable, so that workers can run it."""

    split: Split
    preprocessing: Preprocessing
    size: int

    def __call__(self, start: int) -> ImageBatch:
        indices = range(start, min(start + self.size, len(self.split)))
        return load_batch(self.split, indices, lambda _, pixels: preprocess_image(self.preprocessing, pixels))


def preprocess_image(preprocessing: Preprocessing, pixels: Tensor) -> Tensor:
    """Resizes and crops one decoded image, uint8 (H, W, C) -> uint8 (h, w, C)."""
    array = pixels.squeeze(-1).numpy() if pixels.shape[-1] == 1 else pixels.numpy()
    return preprocessing(Image.fromarray(array))
