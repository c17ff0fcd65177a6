"""Pictures of many requests gathered into batches, which one thread shows to the network."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A picture in the queue."""

    picture: Any
    since: float  # the loop's clock
    answer: asyncio.Future[Any]


class Batcher:
    """Answers single pictures, in batches.

    A batch is shown as soon as it is full, or as its first picture has waited for `latency` seconds. While the network works,
    the queue fills, so that a busy service shows full batches without waiting at all.

    Args:
        show: pictures, made ready -> an answer for each; called in one thread, one batch at a time.
        latency: seconds.
        largest: pictures in a batch.
        seen: is told (pictures, seconds) of each batch.
    """

    def __init__(
        self,
        show: Callable[[Sequence[Any]], Sequence[Any]],
        latency: float,
        largest: int,
        seen: Callable[[int, float], None] = lambda pictures, seconds: None,
    ) -> None:
        self._show, self._latency, self._largest, self._seen = show, latency, largest, seen

    async def __aenter__(self) -> Batcher:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._thread = ThreadPoolExecutor(1, "network")
        self._worker = asyncio.create_task(self._work())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.cancel()
        await asyncio.gather(self._worker, return_exceptions=True)
        self._thread.shutdown()

    async def answers(self, pictures: Sequence[Any]) -> list[Any]:
        """The answer for each picture; whoever stops waiting leaves the queue."""
        now = self._loop.time()
        items = [_Waiting(each, now, self._loop.create_future()) for each in pictures]
        for item in items:
            self._queue.put_nowait(item)
        try:
            return await asyncio.gather(*(item.answer for item in items))
        finally:
            for item in items:
                item.answer.cancel()

    async def _work(self) -> None:
        while True:
            batch = [item for item in await self._gather() if not item.answer.done()]
            if not batch:
                continue
            began = self._loop.time()
            try:
                pictures = [item.picture for item in batch]
                answers = await self._loop.run_in_executor(self._thread, self._show, pictures)
            except (
                Exception
            ) as error:  # whatever an engine raises is these pictures' answer, and the next batch is tried
                for item in batch:
                    if not item.answer.done():
                        item.answer.set_exception(error)
                continue
            self._seen(len(batch), self._loop.time() - began)
            for item, answer in zip(batch, answers, strict=True):
                if not item.answer.done():
                    item.answer.set_result(answer)

    async def _gather(self) -> list[_Waiting]:
        """The next batch: at least one picture, and what comes until it is full or its first has waited long enough."""
        batch = [await self._queue.get()]
        while len(batch) < self._largest:
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
