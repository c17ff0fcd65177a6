"""What steps need, made ready in their order by this process or by workers that run ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Generic, TypeVar

from residuum.data.reading import in_order

T = TypeVar("T")


class Ahead(Generic[T]):
    """job(step) for step after step; a step out of turn starts the workers anew."""

    def __init__(self, job: Callable[[int], T], workers: int) -> None:
        """Takes a job that is a value, so that it can travel to a worker."""
        self._job, self._workers, self._next = job, workers, -1
        self._results: Iterator[T] | None = None

    def get(self, step: int) -> T:
        """job(step)."""
        if self._results is None or step != self._next:
            self.close()
            self._results = in_order(self._job, count(step), self._workers)
        self._next = step + 1
        return next(self._results)

    def close(self) -> None:
        """Ends the workers, if any."""
        results, self._results = self._results, None
        if results is not None:
            results.close()  # type: ignore[attr-defined]  # a generator
