"""Answers requests: reads the body, decodes the images, predicts or explains, and formats the result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.requests import Request

from resnetlab.device import count_cores, is_usable
from resnetlab.formatting import format_count
from resnetlab.serve.batching import Batcher
from resnetlab.serve.counters import Counters
from resnetlab.serve.limits import Limits, RequestError, RequestGate
from resnetlab.serve.models import ServedModel
from resnetlab.serve.uploads import Upload, decode_uploads, unpack_body

_Result = TypeVar("_Result")


class _Cancelled(Exception):
    """Nobody waits for the explanation any more."""


class Service:
    """A model of any task with its queue, limits and counters."""

    def __init__(self, served: ServedModel, limits: Limits) -> None:
        self.served, self.limits, self.counters = served, limits, Counters()
        self.gate = RequestGate(limits)
        at_once, count = served.batches_at_once, self.counters.count_batch
        self._batcher = Batcher(served.predict, limits.latency, limits.max_batch, at_once, count)
        self.counters.in_flight.set_function(lambda: self.gate.in_flight)

    @property
    def name(self) -> str:
        """The model's name for people, such as "resnet14 on digits"; it contains no path of this machine."""
        model = self.served.model
        net = str(model.recipe.get("net", f"a network of {format_count(len(model.classes), 'class')}"))
        data = model.data.get("name", "").rstrip("/").rpartition("/")[2]
        return f"{net} on {data}" if data else net

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Runs the service's threads; on exit, work in progress is finished."""
        # explanations have a thread of their own, because one takes as long as many predictions
        with ThreadPoolExecutor(count_cores(), "decode") as self._decoders, ThreadPoolExecutor(1) as self._explainer:
            async with self._batcher:
                yield

    async def predict(self, request: Request, top: int | None, min_score: float | None) -> dict[str, Any]:
        """The answer to POST /predict; raises RequestError."""
        async with self.gate.read_body(request) as body, self._admit():
            uploads = await self._decode(request, body)
            images = [upload.image for upload in uploads if upload.error is None]
            if not images and uploads[0].error is not None:
                raise uploads[0].error
            results = iter(await self._batcher.predict(images))
        return {
            "predictions": [
                {"image": upload.name, "error": upload.error.sentence}
                if upload.error is not None
                else {"image": upload.name, **self.served.format(upload.image, next(results), top, min_score)}
                for upload in uploads
            ]
        }

    async def explain(self, request: Request, top: int | None) -> dict[str, Any]:
        """The answer to POST /explain; raises RequestError."""
        async with self.gate.read_body(request) as body, self._admit():
            if self.served.no_explanation is not None:
                raise RequestError(422, self.served.no_explanation)
            uploads = await self._decode(request, body)
            if len(uploads) != 1:
                raise RequestError(422, f"one image is explained at a time, not {len(uploads)}.")
            upload = uploads[0]
            if upload.error is not None:
                raise upload.error
            return {"image": upload.name, **await self._explain(upload.image, top)}

    async def check_device(self) -> None:
        """Raises RequestError after an error of a GPU from which only a new process recovers."""
        device = next(self.served.model.net.parameters()).device
        if not await asyncio.get_running_loop().run_in_executor(None, is_usable, device):
            raise RequestError(503, f"the device {device} has failed; restart the service.")

    def describe(self) -> dict[str, Any]:
        """The answer to GET /model."""
        limits = self.limits
        return {
            "name": self.name,
            **self.served.describe(),
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
    async def _admit(self) -> AsyncIterator[None]:
        """Counts the request as in flight, and limits the time of its answer."""
        with self.gate.admit():
            try:
                async with asyncio.timeout(self.limits.timeout):
                    yield
            except TimeoutError:
                raise RequestError(503, f"the answer took more than {self.limits.timeout:g} seconds.", 5) from None

    async def _decode(self, request: Request, body: bytes) -> list[Upload]:
        content_type, encoding = (request.headers.get(name, "") for name in ("content-type", "content-encoding"))

        def work(is_cancelled: Callable[[], bool]) -> list[Upload]:
            content, served = unpack_body(body, encoding, self.limits), self.served
            prepare, pixel_format = served.prepare, served.pixel_format
            return decode_uploads(content_type, content, prepare, self.limits, is_cancelled, pixel_format)

        return await _run_in(self._decoders, work)

    async def _explain(self, image: Any, top: int | None) -> dict[str, Any]:
        def work(is_cancelled: Callable[[], bool]) -> dict[str, Any]:
            def on_progress(done: int, total: int) -> None:
                if is_cancelled():
                    raise _Cancelled

            on_progress(0, 0)
            return self.served.explain(image, top, on_progress)

        return await _run_in(self._explainer, work)


async def _run_in(threads: ThreadPoolExecutor, work: Callable[[Callable[[], bool]], _Result]) -> _Result:
    """work(is_cancelled) in one of the threads; `is_cancelled` returns true once nobody waits for the result."""
    cancelled = False
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, work, lambda: cancelled)
    finally:
        cancelled = True
