"""Progress and messages on standard error."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from resnetlab.formatting import format_duration
from resnetlab.process_place import read_process_place
from resnetlab.stopping import check_stop

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

BAR = 20  # columns of the bar itself
COUNTED = 64  # things between two updates of a count

T = TypeVar("T")


def escape_control(text: str) -> str:
    r"""Escapes control characters, such as those in file names, as Python does (\n, \x1b)."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


def log(text: str) -> None:
    """Prints a sentence to standard error."""
    print(escape_control(text), file=sys.stderr, flush=True)


def fit_parts(parts: Sequence[str], width: int) -> str:
    """The first of the parts, the most important first, that fit side by side into `width` columns; at least one."""
    text = next(iter(parts), "")
    for part in parts[1:]:
        if len(text) + 2 + len(part) > width:
            break
        text += f"  {part}"
    return text


class ProgressBar:
    """Progress of a long task with the time left: a bar on a terminal, otherwise a line from time to time."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._last = what, time.monotonic(), 0.0
        self._line = ""
        self._first: tuple[float, float] | None = None  # time and `done` of the first call: workers may start before it
        self._rich: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(BAR), TextColumn("{task.percentage:.0f} %"))
            self._rich = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._rich.start()
            self._task = self._rich.add_task(self._what, text="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._rich is not None:
            self._rich.stop()

    def _estimate(self, now: float, done: float, total: int) -> str:
        """The time left by the pace since the first call; "" before there is one, and at the end."""
        begun, first = self._first = self._first or (now, done)
        if done in (first, total):
            return ""
        return f"{format_duration((now - begun) / (done - first) * (total - done))} left"

    def count(self, things: Iterable[T]) -> Iterator[T]:
        """Passes things on, and shows how many there were."""
        done = 0
        for done, thing in enumerate(things, 1):
            if done % COUNTED == 0:
                self.update(done, None)
            yield thing
        self.update(done, done)

    def update(self, done: float, total: int | None, text: str | Sequence[str] = "") -> None:
        """Shows that `done` of `total` (None: unknown) are done; only the first process prints.

        Args:
            done: a number of things, or, as a float, the share of a total of 1.
            text: beside it; of several parts, the most important first, a terminal shows as many as it has room for.
        """
        check_stop()
        if read_process_place().rank:
            return
        now = time.monotonic()
        if not text and total is None:
            text = f"{done / max(now - self._began, 1e-9):,.0f}/s"
        elif not text and total is not None:
            text = self._estimate(now, done, total)
        parts = [text] if isinstance(text, str) else text
        if self._rich is not None and self._task is not None:
            room = self._rich.console.width - len(self._what) - BAR - len("  100 %   ")
            self._rich.update(self._task, completed=done, total=total, text=fit_parts(parts, room))
            return
        if now - self._last < max(2.0, (now - self._began) / 20) and done != total:  # fewer lines as time passes
            return
        self._last = now
        count = f"{done:,}{'' if total is None else f'/{total:,}'}" if isinstance(done, int) else f"{100 * done:.1f} %"
        line = "  ".join([f"{self._what} {count}", *filter(None, parts)])
        if line != self._line:  # the end may come more than once
            self._line = line
            log(line)
