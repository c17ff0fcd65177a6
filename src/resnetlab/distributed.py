"""The processes of a job, started by torchrun or `--procs`, and their collective operations.

Sums are taken in the order of a balanced tree over the processes' ranks, so the number of processes that hold the terms does
not change the bits. They cost no more bytes than a ring: every process sums one slice, which it gets from all
(`all_to_all_single`), and sends it to all (`all_gather_into_tensor`). On several machines this happens inside each machine
first, so that each process sends only its own slice to other machines.
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from resnetlab.errors import PROCESS_GONE, RunError, first_line
from resnetlab.process_place import read_process_place

T = TypeVar("T")
TIMEOUT = timedelta(minutes=5)  # after which a silent process counts as gone
PATIENCE = 0.5  # seconds between two signs of life of a process that the others wait for


class Links:
    """The connections of this process to the others.

    Collectives on CPU tensors are carried out by one thread, in the order of the calls, which is the same in every process.
    Those on GPU tensors are queued on a stream of their own.

    Attributes:
        levels: process groups from the inside out: those of this machine, then those of the same place on every machine;
            or one of all processes (None).
        stream: of the collectives on a GPU.
    """

    def __init__(self, levels: Sequence[Any]) -> None:
        self.levels = levels
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        self._jobs: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="collectives", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        """Carries out a job after those submitted before it. Once one has failed the others fail too, without waiting."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return future

    def close(self, seconds: float | None = None) -> None:
        """Waits for the jobs that were submitted, at most so long, and takes no more.

        A process must not end while one of them is under way: its thread would be ended inside gloo, which aborts the process.
        """
        self._jobs.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            future, job = item
            if self._error is None:
                try:
                    with _connection_errors():
                        future.set_result(job())
                    continue
                except BaseException as error:
                    self._error = error
            future.set_exception(self._error)


class Pending:
    """A sum that is under way: `wait` returns when the tensor may be used on this thread's stream."""

    def __init__(self, future: Future[object] | None = None, stream: Any = None) -> None:
        self._future, self._stream = future, stream
        self._event = stream.record_event() if stream is not None else None

    def wait(self) -> None:
        """Waits for the sum; on a GPU the stream waits, not the caller."""
        if self._future is not None:
            self._future.result()
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


@dataclass(frozen=True)
class World:
    """The processes that share a job: the rank of this one, and how many there are.

    Every method raises RunError if another process is gone.

    Attributes:
        restarted: whether the launcher has started this job's processes again, after a failure.
    """

    rank: int = 0
    size: int = 1
    restarted: bool = False
    links: Links | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[type[World], tuple[int, int, bool]]:
        return World, (self.rank, self.size, self.restarted)  # workers that read images communicate with nobody

    def __deepcopy__(self, _: object) -> Self:
        return self

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def all_reduce_(self, x: Tensor) -> None:
        """Replaces a CPU tensor by its sum over all processes, in any order."""
        if self.size > 1:
            self._submit(lambda: torch.distributed.all_reduce(x)).result()

    def tree_all_reduce_(self, x: Tensor) -> None:
        """Replaces a contiguous tensor on any device by its sum over all processes, in the order of a tree over the ranks.

        The tree is balanced over the largest power of two of ranks, then over that of the rest, and so on.
        """
        if self.size > 1:
            self.start_all_reduce_(x).wait()

    def start_all_reduce_(self, x: Tensor, *, in_tree: bool = True, dtype: torch.dtype | None = None) -> Pending:
        """The same beside the caller's work, which must not use the tensor before `Pending.wait`.

        Args:
            in_tree: in the order of the tree, or in that of the library's own all_reduce.
            dtype: of what travels; None sends x as it is. The tree's terms are added in the dtype of x.
        """
        dtype = dtype or x.dtype

        def all_reduce(_: Sequence[Any]) -> None:
            torch.distributed.all_reduce(sent := x.to(dtype))
            if sent is not x:
                x.copy_(sent)

        return self._start(x, partial(_tree_all_reduce, x.view(-1), dtype) if in_tree else all_reduce)

    def all_gather(self, x: Tensor) -> Tensor:
        """The contiguous tensors of all processes, equal in shape, by their ranks: (…) -> (processes, …)."""
        gathered = x.new_empty(self.size * x.numel())
        self._start(gathered, lambda _: torch.distributed.all_gather_into_tensor(gathered, x.view(-1))).wait()
        return gathered.view(self.size, *x.shape)

    def _start(self, x: Tensor, job: Callable[[Sequence[Any]], object]) -> Pending:
        """Starts a job on a tensor, which is called with the process groups of every level."""
        assert self.links is not None
        levels, stream = self.links.levels, self.links.stream
        if not x.is_cuda or stream is None:
            return Pending(self.links.submit(lambda: job(levels)))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), _connection_errors():
            job(levels)
        x.record_stream(stream)
        return Pending(stream=stream)

    @contextlib.contextmanager
    def first_process_first(self) -> Iterator[None]:
        """The first process of each machine runs the body first, such as a download; the others wait for it.

        They wait as long as it takes, but no longer than the time-out for the next sign of life.
        """
        if self.size == 1:
            yield
            return
        done, failed = threading.Event(), threading.Event()
        if not read_process_place().is_first_here:
            done.set()
            self._wait_for_turns(done, failed)
            yield
            return
        errors: list[BaseException] = []
        thread = threading.Thread(target=self._wait_for_turns, args=(done, failed, errors), daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            failed.set()  # the others see that this process ends
            raise
        done.set()
        thread.join()
        if errors:
            raise errors[0]

    def _wait_for_turns(
        self, done: threading.Event, failed: threading.Event, errors: list[BaseException] | None = None
    ) -> None:
        """Returns when every process is done; shows the others every PATIENCE seconds that this one is alive."""
        busy = torch.ones(1)
        try:
            while busy.item() and not failed.is_set():
                done.wait(PATIENCE)
                busy.fill_(not done.is_set())
                self.all_reduce_(busy)
        except RunError as error:
            if errors is None:
                raise
            errors.append(error)

    def all_reduce_max(self, *numbers: int) -> tuple[int, ...]:
        """The maximum over all processes, of each number."""
        return self.start_all_reduce_max(*numbers).result()

    def start_all_reduce_max(self, *numbers: int) -> Future[tuple[int, ...]]:
        """The same beside the caller's work."""
        maxima = torch.tensor(numbers)

        def job() -> tuple[int, ...]:
            torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX)
            return tuple(maxima.tolist())

        if self.size > 1:
            return self._submit(job)
        future: Future[tuple[int, ...]] = Future()
        future.set_result(numbers)
        return future

    def merge_dicts(self, values: Mapping[str, str]) -> dict[str, str]:
        """The union of the dictionaries of all processes."""
        parts: list[Mapping[str, str]] = [values] * self.size
        if self.size > 1:
            self._submit(lambda: torch.distributed.all_gather_object(parts, dict(values))).result()
        return {key: value for part in parts for key, value in part.items()}

    def broadcast(self, value: T, *tensors: Tensor) -> T:
        """Returns the first process's value; its tensors are copied into `tensors`."""
        if self.size == 1:
            return value
        values = [value]
        self._submit(lambda: torch.distributed.broadcast_object_list(values)).result()
        for tensor in tensors:
            contiguous = tensor.detach().contiguous()
            self._start(contiguous, lambda _: torch.distributed.broadcast(contiguous, 0)).wait()  # noqa: B023
            tensor.detach().copy_(contiguous)
        return values[0]

    def _submit(self, job: Callable[[], T]) -> Future[T]:
        assert self.links is not None
        return self.links.submit(job)


class TreeSum:
    """The sum of lists of tensors in the order of a balanced tree over their numbers, in whatever order they are added.

    Its order is that of the largest power of two of them, then that of the rest, and so on: of 12 as 8 + 4.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[tuple[int, int], list[Tensor]] = {}  # by level in the tree, and number in that level

    @torch.no_grad()
    def add(self, number: int, tensors: list[Tensor]) -> None:
        """Adds the tensors of a number from 0 up; takes them over and may modify them."""
        self.count += 1
        level = 0
        while (other := self._sums.pop((level, number ^ 1), None)) is not None:
            left, right = (other, tensors) if number & 1 else (tensors, other)
            torch._foreach_add_(left, right)
            tensors, level, number = left, level + 1, number // 2
        self._sums[level, number] = tensors

    @torch.no_grad()
    def total(self) -> list[Tensor]:
        """The sum, once the tensors of all numbers below `count` are added."""
        total, *before = (self._sums.pop(key) for key in sorted(self._sums))  # from the last numbers to the first
        for left in before:
            torch._foreach_add_(left, total)
            total = left
        return total


def _tree_all_reduce(x: Tensor, dtype: torch.dtype, levels: Sequence[Any]) -> None:
    """Replaces x, (n,), by its sum over the processes of all levels; `dtype` is that of what travels."""
    group, *outer = levels
    processes = torch.distributed.get_world_size(group)
    slices = torch.nn.functional.pad(x, (0, -len(x) % processes)).to(dtype) if len(x) % processes else x.to(dtype)
    received = torch.empty_like(slices)  # every process's terms of this one's slice
    torch.distributed.all_to_all_single(received, slices, group=group)
    tree = TreeSum()
    for number, terms in enumerate(received.to(x.dtype).view(processes, -1).unbind()):
        tree.add(number, [terms])
    (mine,) = tree.total()
    if outer:
        _tree_all_reduce(mine, dtype, outer)
    torch.distributed.all_gather_into_tensor(slices, mine.to(dtype), group=group)
    if slices is not x:
        x.copy_(slices[: len(x)])


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch raises for a broken connection
        raise RunError(
            f"{PROCESS_GONE} ({first_line(error)}); start the command again, a run with --resume RUN"
        ) from error


@contextlib.contextmanager
def join_process_group() -> Iterator[World]:
    """Joins the process group that torchrun started (gloo, and NCCL for GPU tensors); without torchrun, this process alone."""
    place = read_process_place()
    if place.size == 1:
        yield World()
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # connect only those that talk to each other: fewer open files
    try:
        store, rank, _ = next(rendezvous("env://", timeout=TIMEOUT))
        store, restarted = _meet(store, rank, place.size)
        backend = "cpu:gloo,cuda:nccl" if can_exchange(torch.device("cuda")) else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=place.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RunError(
            f"the {place.size:,} processes of this job did not meet at {address} ({first_line(error)}); check "
            "that all of them run, and reach that address."
        ) from error
    links: Links | None = None
    try:
        with _connection_errors():
            links = Links(_connect_levels(rank, place.size))
        yield World(rank, place.size, restarted, links)
    except BaseException:
        if links is not None:  # processes that stop at one step complete what is under way; others may never do
            links.close(PATIENCE)
        # destroy_process_group waits for work on the GPU that a lost or failed process never completes
        with contextlib.suppress(RuntimeError):
            torch.distributed.distributed_c10d._abort_process_group()
        if links is not None:
            links.close(PATIENCE)  # what was under way fails now
        raise
    links.close()
    torch.distributed.destroy_process_group()


def _meet(store: Any, rank: int, size: int) -> tuple[Any, bool]:
    """A part of the store that only this attempt of all processes uses, and whether there were earlier attempts.

    A launcher that restarts processes keeps its store, with what the failed attempt wrote, and its count of restarts may differ
    between machines. So every process writes a new word, and the first one names the attempt by the words of all.
    """
    own, interval = f"{uuid.uuid4().hex}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 0.01 + size / 2000
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    store.set(f"word {rank}", own)
    attempt = f"{store.add('attempts', 1) - 1}" if rank == 0 else ""
    name = ""
    while time.monotonic() < deadline:
        if rank == 0:
            words = [store.get(f"word {r}").decode() for r in range(size)]
            store.set("words", " ".join([attempt, *words]))
        if store.check(["words"]) and own in (words := store.get("words").decode().split()):
            new = hashlib.sha256(" ".join(words).encode()).hexdigest()
            if new != name:
                store.set(f"seen {rank}", new)
            name = new
        seen = [f"seen {r}" for r in range(size)]
        if rank == 0 and store.check(seen) and all(store.get(key).decode() == name for key in seen):
            store.set("name", name)
        if name and store.check(["name"]) and store.get("name").decode() == name:
            restarted = words[0] != "0" or any(not word.endswith("/0") for word in words[1:])
            return PrefixStore(name, store), restarted
        time.sleep(interval)
    raise RuntimeError(f"waited {TIMEOUT.total_seconds():.0f} seconds")


def _connect_levels(rank: int, size: int) -> list[Any]:
    """The process groups that a sum goes through: of a machine, then of the same place on every machine; [None] for one of all.

    Two levels need machines with as many processes each, a power of two, or the order of the sum would be another.
    """
    _, _, *local = read_process_place()
    places: list[list[int]] = [local] * size
    torch.distributed.all_gather_object(places, local)
    here = local[1]
    regular = all(place == [r % here, here] for r, place in enumerate(places))
    if not (regular and 1 < here < size and size % here == 0 and here & (here - 1) == 0):
        return [None]
    first, position = rank - rank % here, rank % here
    return [
        torch.distributed.new_group(list(ranks), timeout=TIMEOUT, use_local_synchronization=True)
        for ranks in (range(first, first + here), range(position, size, here))
    ]


def can_exchange(device: torch.device) -> bool:
    """Whether processes can sum tensors on a kind of device: on a GPU that needs NCCL, which torch has on Linux."""
    kind = device.type
    return kind == "cpu" or (kind == "cuda" and torch.cuda.is_available() and torch.distributed.is_nccl_available())


def leave_if_imported_again() -> None:
    """Ends a process that imports the caller's script because a worker of it starts: its parent says what is missing."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)
