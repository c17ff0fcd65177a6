"""Console output: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from resnetlab.errors import UsageError
from resnetlab.formatting import format_duration, format_percent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from resnetlab.training.result import Progress as TrainingProgress


def escape_control(text: str) -> str:
    r"""Escapes control characters, such as those in file names, as Python does (\n, \x1b)."""
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" else c for c in text)


def log(text: str) -> None:
    """Prints a sentence to standard error."""
    print(escape_control(text), file=sys.stderr, flush=True)


def log_error(text: str) -> None:
    """Prints the sentence of an error."""
    log(f"resnetlab: {text}")


class WarningPrinter:
    """Shows UserWarnings, each message once, and hides the other warnings, which are for developers.

    Python's own "once" is reset whenever the filters change, which decoding does for every image.
    """

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if issubclass(category, UserWarning) and str(message) not in self._shown:
            self._shown.add(str(message))
            log(f"resnetlab: warning: {message}")


def refuse_options(owner: str, options: Mapping[str, bool]) -> None:
    """Raises UsageError for the first option that is set: `owner`, such as "a detector", does not have it."""
    for name, is_set in options.items():
        if is_set:
            raise UsageError(f"--{name.replace('_', '-')} is not an option for {owner}; leave it out.")


def print_json(value: Any) -> None:
    """Prints one JSON document to standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Prints a table to standard output; `right` lists the columns of numbers. In a pipe no line is wrapped."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape_control, row))
    console = Console(soft_wrap=False, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 100_000
    console.print(table)


def parse_numbers(option: str, text: str, example: str) -> list[float]:
    """Comma-separated numbers; raises UsageError, with an example, for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} takes comma-separated numbers, such as {example}, not {text!r}.") from None


def parse_pairs(settings: Sequence[str]) -> dict[str, str]:
    """`--set` arguments as a dictionary; raises UsageError if one is not key=value."""
    values = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise UsageError(f"--set takes key=value, not {text!r}; for example --set batch=64")
        if key.strip() in values:
            raise UsageError(f"--set {key.strip()} is given twice; give it once.")
        values[key.strip()] = value.strip()
    return values


class ProgressBar:
    """Progress of a long task with the time left: a bar on a terminal, otherwise a line from time to time."""

    def __init__(self, what: str) -> None:
        self._what, self._began, self._last = what, time.monotonic(), 0.0
        self._rich: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
            self._rich = Progress(*columns, TextColumn("{task.fields[text]}"), console=Console(stderr=True))
            self._rich.start()
            self._task = self._rich.add_task(self._what, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rich is not None:
            self._rich.stop()

    def update(self, done: int, total: int | None, text: str = "") -> None:
        """Shows that `done` of `total` (None: unknown) are done, with `text` beside it; only the first process prints."""
        if os.environ.get("RANK", "0") != "0":
            return
        now = time.monotonic()
        if not text and total is None:
            text = f"{done / max(now - self._began, 1e-9):,.0f}/s"
        elif not text:
            text = f"{format_duration((now - self._began) / max(done, 1) * ((total or 0) - done))} left"
        if self._rich is not None and self._task is not None:
            self._rich.update(self._task, completed=done, total=total, text=text)
            return
        if now - self._last < max(2.0, (now - self._began) / 20) and done != total:  # fewer lines as time passes
            return
        self._last = now
        log(f"{self._what} {done:,}{'' if total is None else f'/{total:,}'}  {text}")


@contextlib.contextmanager
def show_training() -> Iterator[Callable[[TrainingProgress], None]]:
    """A progress bar for a training run; yields the function that updates it."""
    with ProgressBar("step") as bar:
        yield lambda p: bar.update(p.step, p.steps, describe_progress(p))


def describe_progress(p: TrainingProgress) -> str:
    """The text beside the progress bar of a training run."""
    figure = next(iter(p.held_out.items()), None)
    held_out = "" if figure is None else f"  held-out {figure[0].replace('_', ' ')} {format_percent(figure[1])}"
    return (
        f"loss {p.loss:.4f}  training error {format_percent(p.error)}{held_out}  lr {p.lr:g}  "
        f"{p.images_per_second:,.0f} images/s  {format_duration(p.seconds_left)} left"
    )
