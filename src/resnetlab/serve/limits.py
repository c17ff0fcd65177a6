"""Limits of the service, and the reading of request bodies under them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

from starlette.requests import Request
from starlette.types import Receive

BUFFERED_BODIES = 16  # all bodies in memory together take at most as much as this many of the largest size
DRAIN_FACTOR = 8  # times the largest size are read of a refused body and discarded, so that its sender gets the 413
MAX_IMAGES = 64  # per request


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all requests together.

    Attributes:
        max_body: bytes of a request's body.
        max_pixels: width times height of one image.
        timeout: seconds for sending a body, and again for answering.
        max_in_flight: requests answered at the same time.
        latency: most seconds that an image waits for others to form a batch.
        max_batch: most images in a batch.
    """

    max_body: int = 20_000_000
    max_pixels: int = 50_000_000
    timeout: float = 30.0
    max_in_flight: int = 64
    latency: float = 0.005
    max_batch: int = 16


class RequestError(Exception):
    """A refused request, with the HTTP status and a sentence that gives the reason.

    Args:
        retry_after: seconds after which the client may try again.
        hang_up: the body was not read to its end, so the connection cannot be used again.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        sentence: str,
        retry_after: int | None = None,
        hang_up: bool = False,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.hang_up = status, sentence, hang_up
        retry = {} if retry_after is None else {"retry-after": str(retry_after)}
        self.headers = {**retry, **({"connection": "close"} if hang_up else {}), **(headers or {})}


class RequestGate:
    """Admits requests while there is room for their bodies and for themselves."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.buffered = 0  # bytes of all bodies in memory
        self.in_flight = 0

    @asynccontextmanager
    async def read_body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request; its share of the buffer is freed on exit.

        Raises RequestError where it is too large (noticed while it arrives), too slow, or the buffer is full.
        """
        limit, taken, size = self.limits.max_body, 0, 0
        body: bytes | bytearray = b""
        declared = request.headers.get("content-length", "")
        error: RequestError | None = (
            None  # once set, the rest is read and discarded, so that the sender gets the reason
        )
        if declared.isdigit() and int(declared) > limit:
            asks_first = request.headers.get("expect", "").lower() == "100-continue"
            error = self._too_large_error(hang_up=asks_first or int(declared) > DRAIN_FACTOR * limit)
            if error.hang_up:
                raise error
        try:
            try:
                async with asyncio.timeout(self.limits.timeout):
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size > DRAIN_FACTOR * limit:
                            raise self._too_large_error(hang_up=True)
                        error = error or self._check_room(size, len(chunk))
                        if error is not None:
                            self.buffered, taken = self.buffered - taken, 0
                            body = b""
                            continue
                        self.buffered += len(chunk)
                        taken += len(chunk)
                        body = append_part(body, chunk)
            except TimeoutError:
                sentence = f"the body did not arrive within {self.limits.timeout:g} seconds."
                raise RequestError(408, sentence, hang_up=True) from None
            if error is not None:
                raise error
            body = bytes(body)
            yield body
        finally:
            self.buffered -= taken

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Counts a request as in flight; raises RequestError where too many are."""
        if self.in_flight >= self.limits.max_in_flight:
            sentence = f"{self.limits.max_in_flight} requests are being answered already; try again in a moment."
            raise RequestError(429, sentence, 1)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def _check_room(self, size: int, new: int) -> RequestError | None:
        """The reason not to buffer a body of `size` bytes so far, of which the last `new` are not buffered yet."""
        if size > self.limits.max_body:
            return self._too_large_error()
        if self.buffered + new > BUFFERED_BODIES * self.limits.max_body:
            return RequestError(429, "too much is being sent at once; try again in a moment.", 1)
        return None

    def _too_large_error(self, hang_up: bool = False) -> RequestError:
        most = f"{self.limits.max_body / 1e6:g} MB"
        return RequestError(413, f"the body is larger than {most}; send less, or smaller images.", hang_up=hang_up)


def append_part(body: bytes | bytearray, part: bytes) -> bytes | bytearray:
    """A body and its next part. The first is not copied; further ones are appended in place, since there may be very many."""
    if not body:
        return part
    body = body if isinstance(body, bytearray) else bytearray(body)
    body += part
    return body


async def discard_body(receive: Receive, limits: Limits) -> None:
    """Reads what is left of a body that nobody wants, within limits. Its sender gets the answer then: one that is sent while a
    proxy still writes, on a connection that closes, reaches the proxy's client as 502.
    """
    size, more = 0, True
    with suppress(TimeoutError):
        async with asyncio.timeout(limits.timeout):
            while more and size <= DRAIN_FACTOR * limits.max_body:
                message = await receive()
                size, more = size + len(message.get("body", b"")), message.get("more_body", False)
