"""What people see: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import os
import sys
import time
import unicodedata
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from residuum.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from residuum.training.result import Progress as TrainingProgress


def visible(text: str) -> str:
    r"""On one line: what in a file's name moves the cursor or colours a terminal is written out as in Python (\n, \x1b)."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


def say(text: str) -> None:
    """A sentence for a person, on standard error."""
    print(visible(text), file=sys.stderr, flush=True)


def fail(text: str) -> None:
    """The one sentence of an error."""
    say(f"residuum: {text}")


class Warner:
    """Shows the warnings that are meant for people, each sentence once; the others are a developer's business.

    Python's own "once" forgets what was shown whenever somebody changes the filters, as decoding does for every picture.
    """

    def __init__(self) -> None:
        self._said: set[str] = set()

    def __call__(self, message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning) and str(message) not in self._said:
            self._said.add(str(message))
            say(f"residuum: warning: {message}")


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A table on standard output; `right` lists the columns that hold numbers. In a pipe, no line is folded."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    console = Console(soft_wrap=False, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 100_000
    console.print(table)


def percent(fraction: float) -> str:
    """An error as people read it: 0.0827 is "8.27 %"."""
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 20 s" or "2 h 05 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 5940:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def pairs(settings: Sequence[str]) -> dict[str, str]:
    """`--set` arguments as a dictionary; raises UsageError where one is not key=value."""
    values = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set takes key=value, not {text!r}; for example --set batch=64")
        if key.strip() in values:
            raise UsageError(f"--set {key.strip()} is given twice; give it once.")
        values[key.strip()] = value.strip()
    return values


class Bar:
    """Progress of a long piece of work: a bar on a terminal, else a plain line now and then; with time left."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._last = what, time.monotonic(), 0.0
        self._rich: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
            self._rich = Progress(*columns, TextColumn("{task.fields[words]}"), console=Console(stderr=True))
            self._rich.start()
            self._task = self._rich.add_task(self._what, words="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def show(self, done: int, total: int | None, words: str = "") -> None:
        """Shows that `done` of `total` are done (None: nobody knows of how many); `words` stand beside.

        Of several processes only the first one speaks.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        now = time.monotonic()
        if not words and total is None:
            words = f"{done / max(now - self._began, 1e-9):,.0f}/s"
        elif not words:
            words = f"{duration((now - self._began) / max(done, 1) * ((total or 0) - done))} left"
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=done, total=total, words=words)
            return
        if now - self._last < max(2.0, (now - self._began) / 20) and done != total:  # fewer lines as the work goes on
            return
        self._last = now
        say(f"{self._what} {done:,}{'' if total is None else f'/{total:,}'}  {words}")


def training_words(p: TrainingProgress) -> str:
    """What stands beside the bar of a training run."""
    watched = next(iter(p.held_out.items()), None)
    held_out = "" if watched is None else f"  held-out {watched[0].replace('_', ' ')} {percent(watched[1])}"
    return (
        f"loss {p.loss:.4f}  training error {percent(p.error)}{held_out}  lr {p.lr:g}  "
        f"{p.images_per_second:,.0f} images/s  {duration(p.seconds_left)} left"
    )
