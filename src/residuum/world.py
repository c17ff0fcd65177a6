"""The processes that share a piece of work, as torchrun or `--procs` started them, and what they say to each other."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from residuum.errors import RunError

T = TypeVar("T")
GONE = "another process of this job is gone"


@dataclass(frozen=True)
class World:
    """The processes that share a piece of work: which one this is, and how many there are.

    Raises RunError, from every method, where another process is gone.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def sum_(self, x: Tensor) -> None:
        """Replaces a CPU tensor by its sum over all processes, in each of them."""
        if self.size > 1:
            with _talking():
                torch.distributed.all_reduce(x)

    def add_up_(self, x: Tensor) -> None:
        """The same for a tensor on any device, in the order of a balanced tree where their number is a power of two."""
        if self.size & (self.size - 1):
            return self.sum_(x)
        distance = 1
        while distance < self.size:  # with the neighbour, then pairs with pairs, …: a + b and b + a are the same bits
            theirs, partner = torch.empty_like(x), self.rank ^ distance
            send = torch.distributed.P2POp(torch.distributed.isend, x, partner)
            receive = torch.distributed.P2POp(torch.distributed.irecv, theirs, partner)
            with _talking():
                for work in torch.distributed.batch_isend_irecv([send, receive]):
                    work.wait()
            x += theirs
            distance *= 2
        return None

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process of each machine goes first, the others after it, however long it takes to fetch and to read."""
        if self.size == 1:
            yield
            return
        early, word = os.environ.get("LOCAL_RANK", "0") == "0", torch.zeros(1)
        with _talking():
            patient: Any = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
            if not early:
                torch.distributed.all_reduce(word, group=patient)
        yield
        if early:
            with _talking():
                torch.distributed.all_reduce(word, group=patient)

    def agree(self, *numbers: int) -> tuple[int, ...]:
        """The largest that any process says, for each number."""
        if self.size == 1:
            return numbers
        said = torch.tensor(numbers)
        with _talking():
            torch.distributed.all_reduce(said, torch.distributed.ReduceOp.MAX)
        return tuple(said.tolist())

    def union(self, values: Mapping[str, str]) -> dict[str, str]:
        """What any of the processes holds, in each of them."""
        parts: list[Mapping[str, str]] = [values] * self.size
        if self.size > 1:
            with _talking():
                torch.distributed.all_gather_object(parts, dict(values))
        return {key: value for part in parts for key, value in part.items()}

    def from_first(self, value: T, *tensors: Tensor) -> T:
        """The first process's value; the tensors become its tensors."""
        if self.size == 1:
            return value
        said = [value]
        with _talking():
            torch.distributed.broadcast_object_list(said)
            for tensor in tensors:
                dense = tensor.detach().contiguous()
                torch.distributed.broadcast(dense, 0)
                tensor.detach().copy_(dense)
        return said[0]


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's only word for a connection that broke
        raise RunError(
            f"{GONE} ({str(error).splitlines()[0][:120]}); go on with: residuum train --resume RUN"
        ) from error


@contextlib.contextmanager
def processes() -> Iterator[World]:
    """The processes that torchrun started, joined inside (by gloo, and by NCCL for what lies on GPUs); else this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # a restarted job must not wait long for a process that is gone
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=timedelta(minutes=5))
    try:
        yield World(torch.distributed.get_rank(), size)
    finally:
        torch.distributed.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started this job's processes again after one of them had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def first_process() -> bool:
    """Whether this process is the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"
