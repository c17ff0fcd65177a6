"""Ctrl-C and SIGTERM as a request to stop at the next step, after a checkpoint."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StopSignal(BaseException):
    """Raised when a run stops on a signal, after its checkpoint; like KeyboardInterrupt, not an Exception."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Records whether a stop was requested, and by which signal."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._message: str | None = None

    def stop_immediately(self, message: str) -> None:
        """From now on a signal raises StopSignal at once; an earlier request raises it now."""
        self._message = message
        if self.signum is not None:
            raise StopSignal(self.signum, message)

    def handle_signal(self, signum: int, _: FrameType | None) -> None:
        """The signal handler; a second Ctrl-C does not wait for the step to end."""
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if self._message is not None:
            raise StopSignal(signum, self._message)


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a request, in the main thread; restores the former handlers on exit."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {s: signal.signal(s, request.handle_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
