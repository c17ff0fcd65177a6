"""The process: a socket, uvicorn, and a stop that finishes what is under way."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import signal
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from residuum.errors import UsageError


def serve(app: FastAPI, host: str, port: int, timeout: float, ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C; then takes no new request, finishes those under way, and returns.

    Args:
        port: 0 takes a free one.
        timeout: seconds that a request may take, to be sent and again to be answered.
        ready: is told the address once connections are taken.

    Raises UsageError where the address cannot be used.
    """
    listening = _listening(host, port)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # what clients send wrongly is told to them
    config = uvicorn.Config(
        app,
        http=_impatient(timeout),
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=math.ceil(2 * timeout) + 1,
    )
    gc.collect()
    gc.freeze()  # else each full collection walks through all of torch: 0.1 s in which nobody is answered
    shown = f"[{host}]" if ":" in host else host
    ready(f"http://{shown}:{listening.getsockname()[1]}/")
    # uvicorn raises the signal anew after its stop, for whoever handled it before; here the stop was all that it asked for
    before = {which: signal.signal(which, lambda *_: None) for which in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for which, handler in before.items():
            signal.signal(which, handler)
        listening.close()
        gc.unfreeze()


def _impatient(timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which hangs up on a client whose request's head takes more seconds to come; else it has no limit.

    It is h11's wherever httptools is installed too, which uvicorn would take: that one keeps heads of any length.
    """
    sentence = json.dumps({"error": f"the request's head did not arrive within {timeout:g} seconds."}).encode()
    answer = (
        b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
        + f"content-length: {len(sentence)}\r\n\r\n".encode()
        + sentence
    )

    class Impatient(H11Protocol):
        patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.patience = self.loop.call_later(timeout, self.give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.patience is not None:
                self.patience.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:  # the next head may come over the same connection
            super().on_response_complete()
            if self.patience is not None:
                self.patience.cancel()
            self.patience = self.loop.call_later(timeout, self.give_up)

        def shutdown(self) -> None:
            """The answer that is under way says that it is the last; else the client sends the next, and it is lost."""
            super().shutdown()
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

        def give_up(self) -> None:
            """Hangs up, unless a request is under way: then its body and its answer have limits of their own."""
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.write(answer)
                self.transport.close()

    return Impatient


def _listening(host: str, port: int) -> socket.socket:
    """A socket that takes connections; raises UsageError where the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # TCP by name: asyncio sends small answers at once (TCP_NODELAY) only where it sees that; else they are 40 ms late
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port."
        ) from error
    return listening
