"""What the service refuses, and how bodies are read under those limits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from starlette.requests import Request

BODIES = 16  # as much as so many bodies of the largest size is held in memory at once
PATIENCE = 8  # so many times the largest size is read and thrown away, so that the sender hears why (413)
PICTURES = 64  # that one request may hold


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may take.

    Attributes:
        max_body: bytes of a request's body.
        max_pixels: of one picture, width times height.
        timeout: seconds for sending a body, and again for answering.
        max_in_flight: requests that are being answered at once.
        latency: seconds that a picture waits for others at most, to be shown to the network together.
        max_batch: pictures shown to the network at once.
    """

    max_body: int = 20_000_000
    max_pixels: int = 50_000_000
    timeout: float = 30.0
    max_in_flight: int = 64
    latency: float = 0.005
    max_batch: int = 16


class Refusal(Exception):
    """A request that is not answered, with the HTTP status and the sentence that says why.

    Args:
        retry_after: seconds after which it may be tried again.
        hang_up: the body was not read to its end, so nothing else can come over this connection.
    """

    def __init__(self, status: int, sentence: str, retry_after: int | None = None, hang_up: bool = False) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.retry_after, self.hang_up = status, sentence, retry_after, hang_up


class Gate:
    """Lets requests in as long as there is room: for their bytes, and for themselves."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.held = 0  # bytes
        self.in_flight = 0

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request; its room is given back when the request is done with.

        Raises Refusal where it is too large (seen while it arrives, not after), too slow, or there is no room now.
        """
        limit, taken, size, kept = self.limits.max_body, 0, 0, bytearray()
        declared = request.headers.get("content-length", "")
        refusal: Refusal | None = None  # what follows is read and thrown away, so that the sender hears why
        if declared.isdigit() and int(declared) > limit:
            polite = request.headers.get("expect", "").lower() == "100-continue"  # it asks before it sends
            refusal = self._too_large(hang_up=polite or int(declared) > PATIENCE * limit)
            if refusal.hang_up:
                raise refusal
        try:
            try:
                async with asyncio.timeout(self.limits.timeout):
                    async for chunk in request.stream():
                        size += len(chunk)
                        if size > PATIENCE * limit:
                            raise self._too_large(hang_up=True)
                        refusal = refusal or self._no_room(size, len(chunk))
                        if refusal is not None:
                            self.held, taken = self.held - taken, 0
                            kept.clear()
                            continue
                        self.held += len(chunk)
                        taken += len(chunk)
                        kept += chunk
            except TimeoutError:
                sentence = f"the body did not arrive within {self.limits.timeout:g} seconds."
                raise Refusal(408, sentence, hang_up=True) from None
            if refusal is not None:
                raise refusal
            body = bytes(kept)
            kept.clear()
            yield body
        finally:
            self.held -= taken

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among the requests that are answered at once; raises Refusal where there is none."""
        if self.in_flight >= self.limits.max_in_flight:
            raise Refusal(
                429, f"{self.limits.max_in_flight} requests are being answered already; try again in a moment.", 1
            )
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def _no_room(self, size: int, more: int) -> Refusal | None:
        """Why a body that is `size` bytes long by now cannot be kept; `more` of them are not held yet."""
        if size > self.limits.max_body:
            return self._too_large()
        if self.held + more > BODIES * self.limits.max_body:
            return Refusal(429, "too much is being sent at once; try again in a moment.", 1)
        return None

    def _too_large(self, hang_up: bool = False) -> Refusal:
        most = f"{self.limits.max_body / 1e6:g} MB"
        return Refusal(413, f"the body is larger than {most}; send less, or smaller pictures.", hang_up=hang_up)
