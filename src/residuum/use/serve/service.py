"""What a request for a prediction or an explanation comes to: read, decode, show to the network, put into words."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import torch
from starlette.requests import Request
from torch import Tensor

from residuum.models.accounting import parameters
from residuum.use.explain import Explanation, explain
from residuum.use.predict import Model, best
from residuum.use.serve.batching import Batcher
from residuum.use.serve.bodies import Shown, opened
from residuum.use.serve.counters import Counters
from residuum.use.serve.limits import Gate, Limits, Refusal


class _GivenUp(Exception):
    """Nobody waits for an explanation any more."""


class Service:
    """A model and what stands before it.

    Args:
        scores: uint8 (B, h, w, C) -> float32 (B, classes), called in one thread; the model's own by default.
    """

    def __init__(self, model: Model, limits: Limits, scores: Callable[[Tensor], Tensor] | None = None) -> None:
        self.model, self.limits, self.counters = model, limits, Counters()
        self.gate = Gate(limits)
        self._batcher = Batcher(scores or model.scores, limits.latency, limits.max_batch, self.counters.batch)
        self.counters.in_flight.set_function(lambda: self.gate.in_flight)

    @property
    def name(self) -> str:
        """Of the model, for people: "resnet14 on digits"; no path of this machine."""
        net = str(self.model.recipe.get("net", f"a network of {len(self.model.classes):,} classes"))
        data = self.model.data.get("name", "").rstrip("/").rpartition("/")[2]
        return f"{net} on {data}" if data else net

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The service with its threads; what is under way at the end is finished."""
        # explanations have a thread of their own: one is as long as many predictions
        with ThreadPoolExecutor(os.cpu_count(), "decode") as self._decoders, ThreadPoolExecutor(1) as self._explainer:
            async with self._batcher:
                yield

    async def predict(self, request: Request, top: int) -> dict[str, Any]:
        """The answer to POST /predict; raises Refusal."""
        async with self.gate.body(request) as body, self._answering():
            pictures = await self._opened(request, body)
            readable = [each.pixels for each in pictures if each.pixels is not None]
            if not readable and pictures[0].refusal is not None:
                raise pictures[0].refusal
            scores = iter(await self._batcher.answer(torch.stack(readable)))
        return {"predictions": [self._row(each, scores, top) for each in pictures]}

    async def explain(self, request: Request, top: int) -> dict[str, Any]:
        """The answer to POST /explain; raises Refusal."""
        async with self.gate.body(request) as body, self._answering():
            pictures = await self._opened(request, body)
            if len(pictures) != 1:
                raise Refusal(422, f"one picture is explained at a time, not {len(pictures)}.")
            picture = pictures[0]
            if picture.refusal is not None:
                raise picture.refusal
            assert picture.pixels is not None
            explanation, heat = await self._explained(picture.pixels, top)
        return {"image": picture.name, **explanation.to_json(), "heat": heat}

    def about(self) -> dict[str, Any]:
        """The answer to GET /model."""
        model, limits = self.model, self.limits
        spec = model.spec
        depth = f"{spec.block} blocks {'-'.join(map(str, spec.depths))}, {spec.order}, shortcut {spec.shortcut}"
        return {
            "name": self.name,
            "net": depth,
            "classes": list(model.classes),
            "parameters": parameters(model.net),
            "temperature": model.temperature,
            "calibrated": bool(model.calibration),
            "preprocessing": model.preprocessing.to_json(),
            "metrics": dict(model.metrics),
            "data": dict(model.data),
            "versions": dict(model.versions),
            "engine": model.computes,
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
    async def _answering(self) -> AsyncIterator[None]:
        """A place among the requests in flight, for as long as an answer may take."""
        with self.gate.place():
            try:
                async with asyncio.timeout(self.limits.timeout):
                    yield
            except TimeoutError:
                raise Refusal(503, f"the answer took more than {self.limits.timeout:g} seconds.", 5) from None

    async def _opened(self, request: Request, body: bytes) -> list[Shown]:
        kind = request.headers.get("content-type", "")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._decoders, opened, kind, body, self.model.preprocessing, self.limits)

    async def _explained(self, pixels: Tensor, top: int) -> tuple[Explanation, str]:
        given_up = threading.Event()

        def watch(done: int, total: int) -> None:
            if given_up.is_set():
                raise _GivenUp

        def work() -> tuple[Explanation, str]:
            watch(0, 0)
            explanation, png = explain(self.model, pixels, top=top, progress=watch), io.BytesIO()
            explanation.overlay.save(png, "PNG")
            return explanation, f"data:image/png;base64,{b64encode(png.getvalue()).decode()}"

        try:
            return await asyncio.get_running_loop().run_in_executor(self._explainer, work)
        finally:
            given_up.set()

    def _row(self, picture: Shown, scores: Any, top: int) -> dict[str, Any]:
        if picture.refusal is not None:
            return {"image": picture.name, "error": picture.refusal.sentence}
        named = best(self.model.classes, next(scores), top)
        return {"image": picture.name, "top": [{"class": name, "score": score} for name, score in named]}
