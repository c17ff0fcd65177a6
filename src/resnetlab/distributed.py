"""The processes of a job, started by torchrun or `--procs`, and their collective operations."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from resnetlab.errors import PROCESS_GONE, RunError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that share a job: the rank of this one, and how many there are.

    Every method raises RunError if another process is gone.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def all_reduce_(self, x: Tensor) -> None:
        """Replaces a CPU tensor by its sum over all processes."""
        if self.size > 1:
            with _connection_errors():
                torch.distributed.all_reduce(x)

    def tree_all_reduce_(self, x: Tensor) -> None:
        """The same for a tensor on any device, summed as a balanced tree if the number of processes is a power of two."""
        if self.size & (self.size - 1):
            return self.all_reduce_(x)
        distance = 1
        while distance < self.size:  # with the neighbour, then pairs with pairs, …: a + b and b + a are bit-identical
            received, partner = torch.empty_like(x), self.rank ^ distance
            send = torch.distributed.P2POp(torch.distributed.isend, x, partner)
            receive = torch.distributed.P2POp(torch.distributed.irecv, received, partner)
            with _connection_errors():
                for work in torch.distributed.batch_isend_irecv([send, receive]):
                    work.wait()
            x += received
            distance *= 2
        return None

    @contextlib.contextmanager
    def first_process_first(self) -> Iterator[None]:
        """The first process of each machine runs the body first, such as a download; the others wait for it, up to a day."""
        if self.size == 1:
            yield
            return
        leads, token = os.environ.get("LOCAL_RANK", "0") == "0", torch.zeros(1)
        with _connection_errors():
            group: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
            if not leads:
                torch.distributed.all_reduce(token, group=group)
        yield
        if leads:
            with _connection_errors():
                torch.distributed.all_reduce(token, group=group)

    def all_reduce_max(self, *numbers: int) -> tuple[int, ...]:
        """The maximum over all processes, of each number."""
        if self.size == 1:
            return numbers
        maxima = torch.tensor(numbers)
        with _connection_errors():
            torch.distributed.all_reduce(maxima, torch.distributed.ReduceOp.MAX)
        return tuple(maxima.tolist())

    def merge_dicts(self, values: Mapping[str, str]) -> dict[str, str]:
        """The union of the dictionaries of all processes."""
        parts: list[Mapping[str, str]] = [values] * self.size
        if self.size > 1:
            with _connection_errors():
                torch.distributed.all_gather_object(parts, dict(values))
        return {key: value for part in parts for key, value in part.items()}

    def broadcast(self, value: T, *tensors: Tensor) -> T:
        """Returns the first process's value; its tensors are copied into `tensors`."""
        if self.size == 1:
            return value
        values = [value]
        with _connection_errors():
            torch.distributed.broadcast_object_list(values)
            for tensor in tensors:
                contiguous = tensor.detach().contiguous()
                torch.distributed.broadcast(contiguous, 0)
                tensor.detach().copy_(contiguous)
        return values[0]


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what torch raises for a broken connection
        raise RunError(
            f"{PROCESS_GONE} ({str(error).splitlines()[0][:120]}); resume with: resnetlab train --resume RUN"
        ) from error


@contextlib.contextmanager
def join_process_group() -> Iterator[World]:
    """Joins the process group that torchrun started (gloo, and NCCL for GPU tensors); without torchrun, this process alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # a restarted job must not wait long for a lost process
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(minutes=5))
    try:
        yield World(torch.distributed.get_rank(), size)
    except BaseException:
        # destroy_process_group waits for work on the GPU that a lost or failed process never completes
        with contextlib.suppress(RuntimeError):
            torch.distributed.distributed_c10d._abort_process_group()
        raise
    torch.distributed.destroy_process_group()


def was_restarted() -> bool:
    """Whether torchrun has restarted this job's processes after a failure."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def local_process_count() -> int:
    """The number of this job's processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 1


def is_first_process() -> bool:
    """Whether this is the process that prints and writes files."""
    return os.environ.get("RANK", "0") == "0"


def leave_if_imported_again() -> None:
    """Ends a process that imports the caller's script because a worker of it starts: its parent says what is missing."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise SystemExit(1)
