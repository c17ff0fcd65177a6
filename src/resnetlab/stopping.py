"""Ctrl-C and SIGTERM as a request to stop, which the work looks at.

A handler only records the signal: an exception that it raised in a callback of the garbage collector would be lost. Work that
takes or waits long calls `check_stop`. The training loop and the service defer it: they end by themselves, everything saved.
In a command a thread watches as well, since Python's handlers do not run while the main thread is inside a library: it ends the
process at the second signal, or where nothing has looked at the first one for PATIENCE seconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

PATIENCE = 5.0  # seconds
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal(BaseException):
    """Raised where work stops on a signal; like KeyboardInterrupt, not an Exception."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Records whether a stop was requested, and by which signal.

    Attributes:
        deferred: the work will end by itself, at a place where everything is saved.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False
        self.message = ""

    def check(self) -> None:
        """Raises StopSignal if a stop was requested and is not deferred."""
        if self.signum is not None and not self.deferred:
            raise StopSignal(self.signum, self.describe(self.signum))

    def describe(self, signum: int) -> str:
        """The sentence to stop with."""
        return self.message or ("interrupted." if signum == signal.SIGINT else "stopped.")

    def stop_immediately(self, message: str) -> None:
        """From now on a stop is not deferred; raises StopSignal if it was requested already."""
        self.deferred, self.message = False, message
        self.check()


_active: StopRequest | None = None  # while signals are caught


def check_stop() -> None:
    """Raises StopSignal if a stop was requested and is not deferred."""
    if _active is not None:
        _active.check()


@contextlib.contextmanager
def catch_stop_signals() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a deferred request in the main thread; a second signal goes to the former handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield StopRequest()
        return
    with contextlib.nullcontext(_active) if _active is not None else _handle_signals(pass_on=True) as request:
        before = request.deferred, request.message
        request.deferred = True
        try:
            yield request
        except StopSignal as stop:
            before = before[0], str(stop)  # for the thread that watches, if the way out takes long
            raise
        finally:
            request.deferred, request.message = before


@contextlib.contextmanager
def _handle_signals(pass_on: bool) -> Iterator[StopRequest]:
    """Handles the signals in the main thread; `pass_on` gives a second one to the former handlers."""
    global _active
    request = StopRequest()
    former: dict[int, Any] = {}

    def handle(signum: int, _: FrameType | None) -> None:
        if request.signum is None:
            request.signum = signum
        elif pass_on:
            signal.signal(signum, former[signum])
            signal.raise_signal(signum)

    former.update({signum: signal.signal(signum, handle) for signum in SIGNALS})
    _active = request
    try:
        yield request
    finally:
        _active = None
        for signum, handler in former.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def end_on_stop_signals() -> Iterator[StopRequest]:
    """For a command: work stops where it looks at the signal, the process ends where it does not. May be nested."""
    if _active is not None:
        yield _active
        return
    watched, signalled = socket.socketpair()
    signalled.setblocking(False)
    with watched, signalled, _handle_signals(pass_on=False) as request:
        former = signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        thread = threading.Thread(target=_watch, args=(watched, request), daemon=True)
        thread.start()
        try:
            yield request
        finally:
            signal.set_wakeup_fd(former)
            signalled.send(b"\0")  # ends the thread
            thread.join(1)


def _watch(watched: socket.socket, request: StopRequest) -> None:
    """Ends the process at the second signal, or PATIENCE seconds after the first where nobody looks at it."""
    first = 0
    while True:
        if not select.select([watched], [], [], PATIENCE if first else None)[0]:
            if not request.deferred:
                _end(request, first)
        elif not (number := watched.recv(1)[0]):
            return
        elif number in SIGNALS:
            if first:
                _end(request, number)
            first = number


def _end(request: StopRequest, signum: int) -> None:
    os.write(2, f"resnetlab: {request.describe(signum)}\n".encode(errors="replace"))
    os._exit(128 + signum)
