"""Fetches shards before they are read, and removes those that are read last, within a budget of disk space."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from resnetlab.data.remote_shards import RemoteShards
from resnetlab.errors import ResNetLabError, UsageError
from resnetlab.stopping import StopSignal

SHARE = 0.9  # of the free space, if no budget is given
AT_ONCE = 4  # shards fetched at once
PAUSE = 0.5  # seconds between looks at what is needed next


class ShardFetcher:
    """Keeps the shards that are needed next on this machine's disk; whoever reads another one fetches it itself.

    Args:
        shards_from: step -> numbers of the shards that are needed from it on, in that order, without end.
        space: bytes that the shards may take; None for SHARE of what is free.
        at_once: how many shards must fit into it.

    Raises UsageError if they do not.
    """

    def __init__(
        self, remote: RemoteShards, shards_from: Callable[[int], Iterator[int]], space: int | None, at_once: int
    ) -> None:
        self._remote, self._shards_from = remote, shards_from
        free = shutil.disk_usage(remote.tars[0].parent).free
        self._space = int(SHARE * (free + sum(remote.sizes[k] for k in remote.present()))) if space is None else space
        self._reserve = AT_ONCE * max(
            remote.sizes
        )  # for readers that are faster than this, and fetch a shard themselves
        need = min(sum(remote.sizes), at_once * max(remote.sizes)) + self._reserve
        if self._space < need:
            raise UsageError(
                f"{at_once + AT_ONCE} shards must fit on this machine's disk, {need / 1e9:.3g} GB, of which "
                f"{self._space / 1e9:.3g} GB may be used; make room, give more with --shard-space, or pack smaller shards."
            )
        self._step, self._closed, self._woken = 0, False, -PAUSE
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def advance(self, step: int) -> None:
        """A step is about to be read."""
        self._step = step
        if (now := time.monotonic()) < self._woken + PAUSE:
            return
        self._woken = now
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shards", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Fetches nothing more; shards under way are completed."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool, contextlib.suppress(ResNetLabError, StopSignal):
            while not self._closed:  # an error is raised again where the shard is read
                self._wake.wait()
                self._wake.clear()
                while not self._closed and (missing := self._make_room()):
                    list(pool.map(self._remote.fetch, missing))

    def _make_room(self) -> list[int]:
        """The next shards to fetch, for which there is room."""
        wanted, size, space = dict[int, None](), 0, self._space - self._reserve
        for shard in itertools.islice(self._shards_from(self._step), len(self._remote.urls)):
            if shard not in wanted:
                size += self._remote.sizes[shard]
                if size > space:
                    break
                wanted[shard] = None
        present = self._remote.present()
        missing = [shard for shard in wanted if shard not in present][:AT_ONCE]
        excess = sum(self._remote.sizes[k] for k in (*present, *missing)) - space
        for shard in present:
            if excess > 0 and shard not in wanted:
                self._remote.remove(shard)
                excess -= self._remote.sizes[shard]
        return missing
