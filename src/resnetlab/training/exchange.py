"""Gradients of a step summed over its micro-batches and all processes, bucket by bucket, while the backward passes go on.

A bucket is some 25 MB of gradients. It leaves for the other processes as soon as all micro-batches of this process have filled
it, the last layers' first, so most of the exchange is hidden behind the rest of the last backward pass. Sums have the order of
`distributed.TreeSum`: the bits depend neither on which process holds a term nor on which term is there first. Two values of
the recipe trade that for speed: `grad_reduce` and `grad_compression`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from resnetlab.distributed import Pending, TreeSum, World
from resnetlab.training.micro_batches import take_gradients

BUCKET_BYTES = 25 * 2**20
ALIGNMENT = 16  # elements: kernels may add in another order if an address is not a multiple of 64 bytes


class GradientExchange:
    """The mean gradients of parameters over all micro-batches of all processes.

    Args:
        reduce: "tree", whose bits do not depend on the number of processes, or "all_reduce", the library's own.
        compression: "none", or "bf16": gradients travel rounded to bfloat16.

    Attributes:
        own: the parameters, whose gradients are collected; a replica of the network gets a `WatchedGradients` of its own.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        world: World,
        bucket_bytes: int = BUCKET_BYTES,
        *,
        reduce: str = "tree",
        compression: str = "none",
    ) -> None:
        self._parameters, self._world = parameters, world
        self._in_tree, self._dtype = reduce == "tree", torch.bfloat16 if compression == "bf16" else None
        self.buckets = _divide(parameters, bucket_bytes)
        self._lock = threading.Lock()
        self._count = 0  # of micro-batches in this step
        self._sums: list[TreeSum] = []
        self._sent: list[tuple[Tensor, Pending]] = []
        self.own = WatchedGradients(self, parameters)

    def start(self, count: int) -> None:
        """Starts a step of so many micro-batches in this process."""
        self._count, self._sums, self._sent = count, [TreeSum() for _ in self.buckets], []

    def add(self, bucket: int, number: int, gradients: list[Tensor]) -> None:
        """Adds a bucket of a micro-batch's gradients, and takes them over; the last one's sends the bucket."""
        with self._lock:
            self._sums[bucket].add(number, gradients)
            # the buckets leave in the same order in all processes
            while len(self._sent) < len(self.buckets) and self._sums[len(self._sent)].count == self._count:
                self._send(len(self._sent), self._sums[len(self._sent)].total())

    def send(self, sums: Sequence[Tensor], count: int) -> None:
        """Sends the gradients of a step at once: of each parameter the sum over `count` micro-batches of this process."""
        self.start(count)
        for number, bucket in enumerate(self.buckets):
            self._send(number, [sums[i] for i in bucket])

    @torch.no_grad()
    def _send(self, bucket: int, total: list[Tensor]) -> None:
        views = self._views(bucket, flat := self._parameters[self.buckets[bucket][0]].new_empty(self._length(bucket)))
        torch._foreach_copy_(views, total)
        self._sent.append((flat, self._world.start_all_reduce_(flat, in_tree=self._in_tree, dtype=self._dtype)))

    def _length(self, bucket: int) -> int:
        """Elements of a bucket with its gaps; every process of every level sums an equal slice."""
        return _align(sum(_align(self._parameters[i].numel()) for i in self.buckets[bucket]), self._world.size)

    def _views(self, bucket: int, flat: Tensor) -> list[Tensor]:
        """The gradients in a flat bucket, with the strides that torch gives to gradients: those of the parameters."""
        views, start = [], 0
        for parameter in (self._parameters[i] for i in self.buckets[bucket]):
            views.append(flat.as_strided(parameter.shape, parameter.stride(), start))
            start += _align(parameter.numel())
        return views

    @torch.no_grad()
    def result(self) -> list[Tensor]:
        """The mean gradients in the order of the parameters, the same in all processes."""
        gradients: dict[int, Tensor] = {}
        for bucket, (flat, pending) in enumerate(self._sent):
            pending.wait()
            flat.mul_(1 / (self._count * self._world.size))
            gradients |= zip(self.buckets[bucket], self._views(bucket, flat), strict=True)
        self._sums, self._sent = [], []
        return [gradients[i] for i in range(len(self._parameters))]


class WatchedGradients:
    """The gradients of one network's parameters, handed over to the exchange while a backward pass computes them.

    Args:
        parameters: those of the exchange, or of a replica, of the same shapes.
    """

    def __init__(self, exchange: GradientExchange, parameters: Sequence[Tensor]) -> None:
        self._exchange, self._parameters = exchange, parameters
        self._bucket_of = {i: number for number, bucket in enumerate(exchange.buckets) for i in bucket}
        self._number: int | None = None  # of the micro-batch whose gradients are computed
        self._missing: list[int] = []  # gradients, by bucket
        for i, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._accumulated, i))  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def collecting(self, number: int) -> Iterator[None]:
        """The body is the backward pass of micro-batch `number` of this process."""
        self._number, self._missing = number, [len(bucket) for bucket in self._exchange.buckets]
        try:
            yield
            for bucket, missing in enumerate(self._missing):
                if missing:  # some parameters did not take part
                    self._hand_over(bucket)
        finally:
            self._number = None

    def _accumulated(self, i: int, _: Tensor) -> None:
        if self._number is not None:
            bucket = self._bucket_of[i]
            self._missing[bucket] -= 1
            if not self._missing[bucket]:
                self._hand_over(bucket)

    def _hand_over(self, bucket: int) -> None:
        assert self._number is not None
        parameters = (self._parameters[i] for i in self._exchange.buckets[bucket])
        self._exchange.add(bucket, self._number, take_gradients(parameters))


def _divide(parameters: Sequence[Tensor], bucket_bytes: int) -> list[list[int]]:
    """Buckets of parameters' indices, the last ones first: their gradients are the first that a backward pass computes."""
    buckets: list[list[int]] = []
    size, dtype = bucket_bytes, None
    for i, parameter in reversed(list(enumerate(parameters))):
        if size >= bucket_bytes or parameter.dtype != dtype:
            buckets.append([])
            size, dtype = 0, parameter.dtype
        buckets[-1].append(i)
        size += parameter.nbytes
    return buckets


def _align(n: int, multiple: int = ALIGNMENT) -> int:
    return -(-n // multiple) * multiple
