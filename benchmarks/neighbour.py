"""Another program on the same machine: a process that computes without pause on one core, beside what is measured."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

COMPUTE = "x = 1\nwhile True:\n    x = x * 3 % 1000003"


@contextlib.contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Runs so many busy processes."""
    processes = [subprocess.Popen([sys.executable, "-c", COMPUTE]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
