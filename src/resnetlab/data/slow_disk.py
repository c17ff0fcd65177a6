"""Reads file after file, and in threads where the disk makes one wait, as that of a network does.

Where a disk answers at once threads only take Python's lock from each other: sixteen list a folder's images at a third of
one's speed (docs/log.md). So one thread begins, and others help once it was seen to wait.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from resnetlab.device import map_in_order
from resnetlab.stopping import check_stop

THREADS = 16
LONG_WAIT = 0.1  # seconds for which a thread waits before others help
WAIT_RATIO = 3  # of that to the time for which it computes: below it threads would be no faster
SCHEDULE = Path("/proc/thread-self/schedstat")  # Linux: nanoseconds on a core, and in the queue for one

A = TypeVar("A")
B = TypeVar("B")


def map_files(function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """function(item) of every item, in order; the function reads a disk, and is called in several threads if that is slow."""
    items = iter(items)
    waited = computed = 0.0
    for item in items:
        check_stop()
        start, on_core, queued = time.perf_counter(), time.thread_time(), _seconds_in_queue()
        result = function(item)
        on_core, queued = time.thread_time() - on_core, _seconds_in_queue() - queued
        waited += time.perf_counter() - start - on_core - queued
        computed += on_core
        yield result
        if waited > max(LONG_WAIT, WAIT_RATIO * computed):
            break
    with ThreadPoolExecutor(THREADS, "files") as pool:
        for result in map_in_order(pool, 2 * THREADS, function, items):
            check_stop()
            yield result


def _seconds_in_queue() -> float:
    """For how long this thread has been ready to run while other programs had the cores; 0 where that is not known."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(SCHEDULE.read_bytes().split()[1]) / 1e9
    return 0.0
