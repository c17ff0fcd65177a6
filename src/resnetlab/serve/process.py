"""The server process: a socket, uvicorn, and a shutdown that finishes requests in progress."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from resnetlab.errors import UsageError
from resnetlab.serve.http_protocol import HttpProtocol, make_answer
from resnetlab.serve.priority import interrupt_nobody
from resnetlab.stopping import StopRequest, catch_stop_signals

MAX_CONNECTIONS = 512  # open at the same time; further ones get 503


def run_server(app: FastAPI, host: str, port: int, timeout: float, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or Ctrl-C; then accepts no new request, finishes those in progress, and returns.

    Args:
        port: 0 takes a free one.
        timeout: seconds for sending a request, and again for answering it.
        on_ready: called with the address once connections are accepted.

    Raises UsageError where the address cannot be used.
    """
    listener = _listen(host, port)
    config = uvicorn.Config(
        app,
        loop="asyncio",  # uvloop, where it is installed, would take over what the command watches signals with
        http=_protocol_with_limits(timeout),
        log_level="error",
        access_log=False,
        proxy_headers=False,  # nothing here asks who the client is
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=math.ceil(2 * timeout) + 1,
    )
    gc.collect()
    gc.freeze()  # otherwise each full collection visits all of torch's objects and blocks every request for 0.1 s
    address = f"[{host}]" if ":" in host else host
    on_ready(f"http://{address}:{listener.getsockname()[1]}/")
    try:
        with interrupt_nobody(), catch_stop_signals() as request:
            _Server(config, request).run(sockets=[listener])
            request.signum = None  # the shutdown is all that was wanted
    finally:
        listener.close()
        gc.unfreeze()


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers: it looks at the request, which may have come before it started."""

    def __init__(self, config: uvicorn.Config, request: StopRequest) -> None:
        super().__init__(config)
        self._request = request

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def on_tick(self, counter: int) -> bool:
        return self._request.signum is not None or await super().on_tick(counter)


def _protocol_with_limits(timeout: float) -> type[asyncio.Protocol]:
    """The protocol with limits for the seconds that the head of a request takes, and for open connections."""
    too_slow = make_answer(b"408 Request Timeout", f"the request's head did not arrive within {timeout:g} seconds.")
    too_many = make_answer(
        b"503 Service Unavailable", f"{MAX_CONNECTIONS:,} connections are open; try again in a moment."
    )

    class ProtocolWithLimits(HttpProtocol):
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.write(too_many)
                transport.close()
                return
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

        def hang_up(self) -> None:
            """Hangs up, unless a request is in progress: its body and its answer have limits of their own."""
            if self.cycle is None or self.cycle.response_complete:
                self.refuse(too_slow)

    return ProtocolWithLimits


def check_address(host: str, port: int) -> None:
    """Raises UsageError, before a model is loaded, where the address cannot be used."""
    if not host.strip():
        raise UsageError("--host is empty; 127.0.0.1 is this machine, 0.0.0.0 lets other machines in.")
    _listen(host, port).close()


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
