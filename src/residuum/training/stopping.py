"""Ctrl-C and SIGTERM: a request to stop at the next step, so that a checkpoint is written first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """A run that was asked to stop, after its checkpoint was written; like KeyboardInterrupt, no ordinary error."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Request:
    """Whether a stop has been asked for, and by which signal."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._message: str | None = None

    def at_once(self, message: str) -> None:
        """From now on a stop waits for nothing, and raises Stopped; so does one that was asked for already."""
        self._message = message
        if self.signum is not None:
            raise Stopped(self.signum, message)

    def receive(self, signum: int, _: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C does not wait for the step."""
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if self._message is not None:
            raise Stopped(signum, self._message)


@contextlib.contextmanager
def stop_requests() -> Iterator[Request]:
    """Turns SIGINT and SIGTERM into a request, inside the main thread; the former handlers come back after."""
    request = Request()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {s: signal.signal(s, request.receive) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
