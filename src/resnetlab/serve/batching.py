"""Collects the images of many requests into batches, which threads run through the network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from resnetlab.serve.priority import interrupt_as_usual


@dataclass(frozen=True, eq=False)
class _PendingImage:
    """An image in the queue."""

    image: Any
    since: float  # the event loop's clock
    result: asyncio.Future[Any]


class Batcher:
    """Computes results for single images in batches.

    A batch starts as soon as it is full, or when its first image has waited `latency` seconds. The queue fills while the
    network computes, so a busy service forms full batches without waiting.

    Args:
        predict: prepared images -> a result for each; called in as many threads as there are batches `at_once`.
        latency: seconds.
        max_batch: most images in a batch.
        at_once: batches that are computed at the same time.
        on_batch: called with (images, seconds) of each batch.
    """

    def __init__(
        self,
        predict: Callable[[Sequence[Any]], Sequence[Any]],
        latency: float,
        max_batch: int,
        at_once: int = 1,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    ) -> None:
        self._predict, self._latency, self._max_batch, self._on_batch = predict, latency, max_batch, on_batch
        self._at_once = at_once

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_PendingImage] = asyncio.Queue()
        self._forming = asyncio.Lock()  # one batch at a time takes the images that arrive
        self._threads = ThreadPoolExecutor(self._at_once, "network", interrupt_as_usual)
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._at_once)]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        self._threads.shutdown()

    async def predict(self, images: Sequence[Any]) -> list[Any]:
        """The result for each image; when the caller is cancelled, its images leave the queue."""
        now = self._loop.time()
        pending = [_PendingImage(image, now, self._loop.create_future()) for image in images]
        for item in pending:
            self._queue.put_nowait(item)
        try:
            return await asyncio.gather(*(item.result for item in pending))
        finally:
            for item in pending:
                item.result.cancel()

    async def _work(self) -> None:
        while True:
            async with self._forming:
                formed = await self._next_batch()
            batch = [item for item in formed if not item.result.done()]
            if not batch:
                continue
            start = self._loop.time()
            try:
                images = [item.image for item in batch]
                results = await self._loop.run_in_executor(self._threads, self._predict, images)
            except Exception as error:  # a backend's exception is the result of these images; the next batch is tried
                for item in batch:
                    if not item.result.done():
                        item.result.set_exception(error)
                continue
            self._on_batch(len(batch), self._loop.time() - start)
            for item, result in zip(batch, results, strict=True):
                if not item.result.done():
                    item.result.set_result(result)

    async def _next_batch(self) -> list[_PendingImage]:
        """One image, and those that arrive until the batch is full or the first has waited long enough."""
        batch = [await self._queue.get()]
        while len(batch) < self._max_batch:
            try:
                batch.append(self._queue.get_nowait())
                continue
            except asyncio.QueueEmpty:
                pass
            try:
                async with asyncio.timeout_at(batch[0].since + self._latency):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
        return batch
