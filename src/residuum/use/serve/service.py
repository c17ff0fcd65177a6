"""What a request for a prediction or an explanation comes to: read, decode, show to the network, put into words."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from starlette.requests import Request

from residuum.use.serve.answering import Answering
from residuum.use.serve.batching import Batcher
from residuum.use.serve.bodies import Shown, opened
from residuum.use.serve.counters import Counters
from residuum.use.serve.limits import Gate, Limits, Refusal


class _GivenUp(Exception):
    """Nobody waits for an explanation any more."""


class Service:
    """A model, of whatever task, and what stands before it."""

    def __init__(self, answering: Answering, limits: Limits) -> None:
        self.answering, self.limits, self.counters = answering, limits, Counters()
        self.gate = Gate(limits)
        self._batcher = Batcher(answering.show, limits.latency, limits.max_batch, self.counters.batch)
        self.counters.in_flight.set_function(lambda: self.gate.in_flight)

    @property
    def name(self) -> str:
        """Of the model, for people: "resnet14 on digits"; no path of this machine."""
        model = self.answering.model
        net = str(model.recipe.get("net", f"a network of {len(model.classes):,} classes"))
        data = model.data.get("name", "").rstrip("/").rpartition("/")[2]
        return f"{net} on {data}" if data else net

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The service with its threads; what is under way at the end is finished."""
        # explanations have a thread of their own: one is as long as many predictions
        with ThreadPoolExecutor(os.cpu_count(), "decode") as self._decoders, ThreadPoolExecutor(1) as self._explainer:
            async with self._batcher:
                yield

    async def predict(self, request: Request, top: int | None, least: float | None) -> dict[str, Any]:
        """The answer to POST /predict; raises Refusal."""
        async with self.gate.body(request) as body, self._within_limits():
            pictures = await self._opened(request, body)
            readable = [each.picture for each in pictures if each.refusal is None]
            if not readable and pictures[0].refusal is not None:
                raise pictures[0].refusal
            answers = iter(await self._batcher.answers(readable))
        return {
            "predictions": [
                {"image": each.name, "error": each.refusal.sentence}
                if each.refusal is not None
                else {"image": each.name, **self.answering.said(each.picture, next(answers), top, least)}
                for each in pictures
            ]
        }

    async def explain(self, request: Request, top: int | None) -> dict[str, Any]:
        """The answer to POST /explain; raises Refusal."""
        async with self.gate.body(request) as body, self._within_limits():
            if self.answering.unexplained is not None:
                raise Refusal(422, self.answering.unexplained)
            pictures = await self._opened(request, body)
            if len(pictures) != 1:
                raise Refusal(422, f"one picture is explained at a time, not {len(pictures)}.")
            picture = pictures[0]
            if picture.refusal is not None:
                raise picture.refusal
            return {"image": picture.name, **await self._explained(picture.picture, top)}

    def about(self) -> dict[str, Any]:
        """The answer to GET /model."""
        limits = self.limits
        return {
            "name": self.name,
            **self.answering.about(),
            "limits": {
                "body_bytes": limits.max_body,
                "pixels": limits.max_pixels,
                "seconds": limits.timeout,
                "in_flight": limits.max_in_flight,
                "latency_seconds": limits.latency,
                "batch": limits.max_batch,
            },
        }

    @asynccontextmanager
    async def _within_limits(self) -> AsyncIterator[None]:
        """A place among the requests in flight, for as long as an answer may take."""
        with self.gate.place():
            try:
                async with asyncio.timeout(self.limits.timeout):
                    yield
            except TimeoutError:
                raise Refusal(503, f"the answer took more than {self.limits.timeout:g} seconds.", 5) from None

    async def _opened(self, request: Request, body: bytes) -> list[Shown]:
        kind = request.headers.get("content-type", "")
        loop, given_up = asyncio.get_running_loop(), threading.Event()
        work = partial(opened, kind, body, self.answering.prepare, self.limits, given_up.is_set)
        try:
            return await loop.run_in_executor(self._decoders, work)
        finally:
            given_up.set()

    async def _explained(self, picture: Any, top: int | None) -> dict[str, Any]:
        given_up = threading.Event()

        def watch(done: int, total: int) -> None:
            if given_up.is_set():
                raise _GivenUp

        def work() -> dict[str, Any]:
            watch(0, 0)
            return self.answering.explain(picture, top, watch)

        try:
            return await asyncio.get_running_loop().run_in_executor(self._explainer, work)
        finally:
            given_up.set()
