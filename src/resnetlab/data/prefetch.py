"""Reads images in batches, in this process or in workers that run ahead; both give the same batches."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from resnetlab.data.dataset import MemorySplit, Split
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.device import DeviceConfig, count_cores, map_in_order
from resnetlab.errors import DataError, first_line, warn
from resnetlab.preprocessing import Preprocessing, round_to_bytes
from resnetlab.process_place import read_process_place
from resnetlab.stopping import check_stop

POLL = 0.5  # seconds between looks at a request to stop, while a batch is waited for
PARENT_POLL = 5.0  # seconds between a worker's looks at its parent
END = object()
AHEAD = 4  # images that each thread of `read_in_threads` may be ahead
SHARED_MEMORY = (
    "/dev/shm must be writable and large enough (docker run --shm-size=2g, or --ipc=host), or use fewer --workers"
)

T = TypeVar("T")
K = TypeVar("K")


class LoadedBatch(NamedTuple, Generic[T]):
    """The part of a batch that could be read.

    Attributes:
        samples: the samples, collated.
        positions: their positions among the requested images.
        unreadable: name -> reason, of the other requested images.
    """

    samples: T
    positions: list[int]
    unreadable: dict[str, str]


@dataclass(frozen=True, eq=False)
class BatchReader(Generic[T]):
    """Reads the images of a batch. Picklable, so that workers can run it.

    Attributes:
        arguments: batch number -> the arguments of `read` for each image: its index, and its random numbers.
        read: returns one sample; raises DataError if the image cannot be read.
        name_of: index -> name of the image.
        collate: list of samples -> samples of the batch.
    """

    arguments: Callable[[int], Sequence[tuple[Any, ...]]]
    read: Callable[..., Any]
    name_of: Callable[[int], str]
    collate: Callable[[list[Any]], T]

    def __call__(self, batch: int) -> LoadedBatch[T]:
        images, errors = self.arguments(batch), ErrorPolicy("skip")  # the main process decides whether to stop
        positions = range(len(images))
        samples = dict(
            errors.read_each(positions, lambda k: self.read(*images[k]), lambda k: self.name_of(images[k][0]))
        )
        return LoadedBatch(self.collate(list(samples.values())), list(samples), errors.skipped)


def stack_images(images: list[Tensor]) -> Tensor:
    """(B, h, w, C) of the images' type; B may be 0."""
    return torch.stack(images) if images else torch.empty(0, 1, 1, 1, dtype=torch.uint8)


class Prefetcher(Generic[T]):
    """Returns the batches of a reader step by step; a step out of order restarts the workers."""

    def __init__(self, reader: BatchReader[T], errors: ErrorPolicy, workers: int, pin: bool = False) -> None:
        """`errors` handles the images that cannot be read; `pin` returns tensors in pinned memory."""
        self._reader, self._errors, self._workers, self._pin = reader, errors, workers, pin
        self._results: Iterator[LoadedBatch[T]] | None = None
        self._next = -1  # the step that `_results` yields next
        self.seconds = 0.0  # spent in `get`, reading or waiting for the workers

    def get(self, step: int) -> LoadedBatch[T]:
        """The batch of a step. Raises DataError under "stop" if an image cannot be read."""
        if self._results is None or step != self._next:
            self.close()
            self._results = prefetch(self._reader, count(step), self._workers, self._pin)
        self._next = step + 1
        start = time.perf_counter()
        batch = next(self._results)
        self.seconds += time.perf_counter() - start
        self._errors.handle(batch.unreadable)
        return batch

    def close(self) -> None:
        """Stops the workers, if any."""
        results, self._results = self._results, None
        if results is not None:
            results.close()  # type: ignore[attr-defined]  # a generator


def default_workers(device_config: DeviceConfig) -> int:
    """How many processes decode by default: none if a CPU trains (it is busy itself), up to 12 for a GPU.

    A process takes its part of the cores that this job may use on the machine, and leaves one of them to itself.
    """
    if device_config.device.type == "cpu":
        return 0
    return min(12, max(1, count_cores() // read_process_place().local_size - 1))


@dataclass(frozen=True)
class _PipedTensor:
    """A tensor that travels from a worker through its pipe, because shared memory is full."""

    array: NDArray[Any]


@dataclass
class _JobDataset(TorchDataset[T]):
    """A job as the map-style data set that DataLoader expects."""

    job: Callable[[int], T]

    def __getitem__(self, key: int) -> T:
        result = self.job(key)
        try:  # here, where an error reaches the main process: torch would lose the batch, and be waited for in vain
            return cast(T, tree_map_only(Tensor, Tensor.share_memory_, result))
        except RuntimeError:
            return cast(T, tree_map_only(Tensor, lambda x: _PipedTensor(x.numpy()), result))


def _start_worker(_: int) -> None:
    """In a worker: leaves Ctrl-C to the main process, drops the main process's signal handlers, and ends with it."""
    main, parent = multiprocessing.parent_process(), os.getppid()
    if main is not None and multiprocessing.get_start_method() != "forkserver":  # whose server ends too
        parent = main.pid or parent  # which may have died already
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end_with(parent: int) -> None:
    """Ends this process once another one is its parent: torch's own end waits for a reader of its pipe, and none is left."""
    while os.getppid() == parent:
        time.sleep(PARENT_POLL)
    os._exit(1)


def prefetch(job: Callable[[int], T], keys: Iterable[int], workers: int, pin: bool = False) -> Iterator[T]:
    """Yields job(key) for every key, in order; worker processes run ahead by two keys each.

    Raises DataError if the processes cannot start, or one dies.
    """
    if not workers:
        for key in keys:
            check_stop()
            yield job(key)
        return
    first = True
    try:
        results = _start_loader(_JobDataset(job), keys, workers, pin)
        while (result := _next_result(results)) is not END:
            first = False
            yield cast(T, tree_map_only(_PipedTensor, _rebuild_tensor, result))
    except RuntimeError as error:
        if "worker" not in str(error):
            raise
        reason = f"a process that decodes images died ({first_line(error)}); "
        if "shared memory" in str(error):
            raise DataError(f"{reason}{SHARED_MEMORY}.") from error
        if first and multiprocessing.get_start_method() != "fork":
            guard = 'it ran your script again: put the call under if __name__ == "__main__":, or use workers=0'
            raise DataError(f"{reason}{guard}.") from error
        raise DataError(f"{reason}memory may be short: use fewer --workers.") from error


def _start_loader(jobs: _JobDataset[T], keys: Iterable[int], workers: int, pin: bool) -> Iterator[T]:
    generator = torch.Generator().manual_seed(0)  # DataLoader draws a number; torch's global generator stays untouched
    with warnings.catch_warnings():
        # more workers than cores are the user's choice
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            jobs,
            batch_size=None,
            sampler=keys,
            num_workers=workers,
            worker_init_fn=_start_worker,
            pin_memory=pin,
            generator=generator,
            timeout=POLL,
        )
        try:
            multiprocessing.get_context().Lock()  # fails where DataLoader would, which leaves a half-made one
            return iter(loader)
        except OSError as error:
            raise DataError(f"processes that decode images cannot be started ({error}); {SHARED_MEMORY}.") from error


def _next_result(results: Iterator[Any]) -> Any:
    """The next result, or END; a stop is noticed while it is waited for."""
    while True:
        check_stop()
        try:
            return next(results, END)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise


def _rebuild_tensor(piped: _PipedTensor) -> Tensor:
    warn(f"shared memory is short, so batches travel through pipes, which is slower; {SHARED_MEMORY}.")
    return torch.from_numpy(piped.array)


@contextlib.contextmanager
def read_in_threads(read: Callable[[K], T], keys: Iterable[K], threads: int) -> Iterator[Callable[[K], T]]:
    """`read`, to be called for these keys in order; so many threads are ahead with it, 0 for none. May raise DataError."""
    if not threads:
        yield read
        return

    def attempt(key: K) -> T | DataError:
        try:
            return read(key)
        except DataError as error:
            return error

    def read_next(_: K) -> T:
        result = next(results)
        if isinstance(result, DataError):
            raise result
        return result

    with ThreadPoolExecutor(threads) as pool:
        results = map_in_order(pool, AHEAD * threads, attempt, keys)
        with contextlib.closing(results):  # type: ignore[type-var]  # a generator
            yield read_next


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
        return preprocess_image(self.preprocessing, self.split.read_image(i))

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (pixels (B, h, w, C), labels int64 (B,)) of all images in order, without those that are skipped."""
        split = self.split
        if isinstance(split, MemorySplit) and tuple(split.images.shape[1:]) == self.shape[1:]:
            for pixels, labels in zip(torch.split(split.images, size), torch.split(split.labels, size), strict=True):
                check_stop()
                yield pixels, labels
            return
        starts = range(0, len(split), size)
        reader = BatchReader(partial(_list_chunk, len(split), size), self.__getitem__, split.name_of, stack_images)
        for start, batch in zip(starts, prefetch(reader, starts, split.workers), strict=True):
            split.errors.handle(batch.unreadable)
            if batch.positions:
                yield batch.samples, split.labels[start + torch.tensor(batch.positions)]


def _list_chunk(n: int, size: int, start: int) -> list[tuple[int]]:
    return [(i,) for i in range(start, min(start + size, n))]


def preprocess_image(preprocessing: Preprocessing, pixels: Tensor) -> Tensor:
    """Resizes and crops one decoded image, uint8 or float32 (H, W, C) -> (h, w, C) of the same type."""
    if pixels.device.type != "cpu" and not pixels.is_floating_point():
        return round_to_bytes(preprocessing(pixels.float()))
    return preprocessing(pixels)
