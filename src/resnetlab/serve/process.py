"""The server process: a socket, uvicorn, and a shutdown that finishes requests in progress."""

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

from resnetlab.errors import UsageError


def run_server(app: FastAPI, host: str, port: int, timeout: float, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C; then accepts no new request, finishes those in progress, and returns.

    Args:
        port: 0 takes a free one.
        timeout: seconds for sending a request, and again for answering it.
        on_ready: called with the address once connections are accepted.

    Raises UsageError where the address cannot be used.
    """
    listener = _listen(host, port)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # clients get these errors in their answers
    config = uvicorn.Config(
        app,
        http=_protocol_with_timeout(timeout),
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=math.ceil(2 * timeout) + 1,
    )
    gc.collect()
    gc.freeze()  # otherwise each full collection visits all of torch's objects and blocks every request for 0.1 s
    address = f"[{host}]" if ":" in host else host
    on_ready(f"http://{address}:{listener.getsockname()[1]}/")
    # uvicorn raises the signal again after its shutdown, for the previous handler; here the shutdown is all that is wanted
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        listener.close()
        gc.unfreeze()


def _protocol_with_timeout(timeout: float) -> type[asyncio.Protocol]:
    """uvicorn's h11 protocol with a limit of `timeout` seconds for the head of a request, which uvicorn does not have.

    h11 is used even where httptools is installed, since that one buffers heads of any length.
    """
    sentence = json.dumps({"error": f"the request's head did not arrive within {timeout:g} seconds."}).encode()
    answer = (
        b"HTTP/1.1 408 Request Timeout\r\ncontent-type: application/json\r\nconnection: close\r\n"
        + f"content-length: {len(sentence)}\r\n\r\n".encode()
        + sentence
    )

    class ProtocolWithTimeout(H11Protocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.timer = self.loop.call_later(timeout, self.hang_up)

        def connection_lost(self, exc: Exception | None) -> None:
            if self.timer is not None:
                self.timer.cancel()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:  # the next request may use the same connection
            super().on_response_complete()
            if self.timer is not None:
                self.timer.cancel()
            self.timer = self.loop.call_later(timeout, self.hang_up)

        def shutdown(self) -> None:
            """Marks the answer in progress as the connection's last; otherwise the client's next request would be lost."""
            super().shutdown()
            if self.cycle is not None and not self.cycle.response_complete:
                self.cycle.default_headers = [*self.cycle.default_headers, (b"connection", b"close")]

        def hang_up(self) -> None:
            """Hangs up, unless a request is in progress: its body and its answer have limits of their own."""
            if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
                self.transport.write(answer)
                self.transport.close()

    return ProtocolWithTimeout


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises UsageError where the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it small answers are 40 ms late
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --host or --port."
        ) from error
    return listener
