"""The network goes first: on Linux the service's other threads do not interrupt it.

A thread that wakes up interrupts another by default. With two cores a request wakes threads up eight times, and each time a
thread of the network reads its maps into the cache again. A core that has nothing to do is taken at once in any case.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def interrupt_nobody() -> Iterator[None]:
    """This thread, and those that it starts, wait until another's time on a core is over."""
    changed = _change_policy("SCHED_OTHER", "SCHED_BATCH")
    try:
        yield
    finally:
        if changed:
            interrupt_as_usual()


def interrupt_as_usual() -> None:
    """The opposite, for this thread and those that it starts."""
    _change_policy("SCHED_BATCH", "SCHED_OTHER")


def _change_policy(old: str, new: str) -> bool:
    """Whether this thread had the old policy, and has the new one. Some sandboxes refuse it; other systems have none."""
    if not hasattr(os, "sched_setscheduler"):
        return False
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == getattr(os, old):
            os.sched_setscheduler(0, getattr(os, new), os.sched_param(0))
            return True
    return False
