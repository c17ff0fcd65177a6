"""A context manager that several threads may be inside of at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable


class SharedContext:
    """A context that changes something of the whole process: the first thread that enters sets it, the last restores it."""

    def __init__(self, make: Callable[[], contextlib.AbstractContextManager[object]]) -> None:
        self._make, self._lock, self._inside, self._stack = make, threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._stack.enter_context(self._make())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stack.close()
