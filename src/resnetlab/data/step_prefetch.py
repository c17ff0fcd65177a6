"""Computes what training steps need, in order, in this process or in workers that run ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, TypeVar

from resnetlab.data.prefetch import prefetch

T = TypeVar("T")


class StepPrefetcher(Generic[T]):
    """Returns job(step) for one step after another; a step out of order restarts the workers."""

    def __init__(self, job: Callable[[int], T], workers: int) -> None:
        """Takes a picklable job, so that workers can run it."""
        self._job, self._workers, self._next = job, workers, -1
        self._results: Iterator[T] | None = None

    def get(self, step: int) -> T:
        """job(step)."""
        if self._results is None or step != self._next:
            self.close()
            self._results = prefetch(self._job, count(step), self._workers)
        self._next = step + 1
        return next(self._results)

    def close(self) -> None:
        """Stops the workers, if any."""
        results, self._results = self._results, None
        if results is not None:
            results.close()  # type: ignore[attr-defined]  # a generator
