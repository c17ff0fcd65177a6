"""Console output: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from resnetlab.errors import UsageError
from resnetlab.formatting import format_count, format_json
from resnetlab.progress import ProgressBar as ProgressBar
from resnetlab.progress import escape_control as escape_control
from resnetlab.progress import log as log

MAX_ROWS = 50  # of a table of classes or of problems


def write_line(text: str) -> None:
    """Prints a line to standard output; names in it cannot move the cursor or change colours."""
    print(escape_control(text))


def log_error(text: str) -> None:
    """Prints the sentence of an error."""
    log(f"resnetlab: {text}")


class WarningPrinter:
    """Shows UserWarnings, each message once, and hides the other warnings, which are for developers.

    Python's own "once" is reset whenever the filters change, which decoding does for every image. A category that has
    `once_a_command` is shown once, whatever its messages say.
    """

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        once = category.__name__ if getattr(category, "once_a_command", False) else str(message)
        if issubclass(category, UserWarning) and once not in self._shown:
            self._shown.add(once)
            log(f"resnetlab: warning: {message}")


def refuse_options(owner: str, options: Mapping[str, bool]) -> None:
    """Raises UsageError for the first option that is set: `owner`, such as "a detector", does not have it."""
    for name, is_set in options.items():
        if is_set:
            raise UsageError(f"--{name.replace('_', '-')} is not an option for {owner}; leave it out.")


def print_json(value: Any) -> None:
    """Prints one JSON document to standard output."""
    print(format_json(value, ascii=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Prints a table to standard output; `right` lists the columns of numbers. In a pipe no line is wrapped."""
    table = Table(title=escape_control(title), title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(escape_control(name), justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(escape_control, row))
    console = Console(soft_wrap=False, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 100_000
    console.print(table)


def print_first(
    columns: Sequence[str], rows: Sequence[Sequence[str]], complete: str, right: Sequence[int] = ()
) -> None:
    """Prints the first MAX_ROWS rows, how many are left out, and what has all of them."""
    print_table("", columns, rows[:MAX_ROWS], right)
    if (rest := len(rows) - MAX_ROWS) > 0:
        write_line(f"{rest:,} more are left out; {complete} has all")


def print_classes(
    columns: Sequence[str], rows: Sequence[Sequence[str]], quality: Sequence[float | None], complete: str
) -> None:
    """Prints a row for each class, or of many the worst: those of the least quality."""
    if len(rows) > MAX_ROWS:
        write_line(f"the {MAX_ROWS} worst of {len(rows):,} classes:")
        order = sorted(range(len(rows)), key=lambda i: float("inf") if (value := quality[i]) is None else value)
        rows = [rows[i] for i in order]
    print_first(columns, rows, complete, [i for i, name in enumerate(columns) if name not in ("class", "taken for")])


def check_page(out: Path | None, inputs: Sequence[str]) -> None:
    """Raises UsageError, before any work is done, for a page that is not .html, or is an input."""
    from resnetlab.run_folder import check_output_file

    if out is not None:
        if out.suffix != ".html":
            raise UsageError(f"--out writes a page, .html, not {out.name}; --json prints what a program reads.")
        check_output_file(out, inputs)


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


def check_order(command: str, model: str, images: Sequence[str]) -> None:
    """Raises UsageError, with the right command line, if a model is among the images or data that come after it."""
    from shlex import join

    found = next((image for image in images if _is_model(image)), None)
    if found is not None and not _is_model(model):
        others = [model, *(image for image in images if image != found)]
        raise UsageError(f"the model comes first: {join(['resnetlab', command, found, *others])}")


def refuse_missing_images(model: str, images: Sequence[str]) -> None:
    """Raises DataError, before a model is loaded, if none of the images that are given by name is there.

    Of several, those that are there are predicted, and the others get a line with the reason. A model that is not there comes
    first.
    """
    from glob import has_magic

    from resnetlab.data.disk_split import read_image_file
    from resnetlab.data.object_store import is_address
    from resnetlab.data.shards import is_shard_pattern
    from resnetlab.data.tables import is_table

    def is_missing(image: str) -> bool:
        other = image == "-" or has_magic(image) or is_address(image) or is_shard_pattern(image) or is_table(image)
        return not other and not os.path.lexists(image)

    if (os.path.exists(model) or ":" in model) and images and all(map(is_missing, images)):
        read_image_file(Path(images[0]))


def _is_model(name: str) -> bool:
    """Whether a word is a model file or a run folder, by its name or content."""
    return name.endswith(".safetensors") or (Path(name) / "recipe.toml").is_file()


def write_quarantine(path: Path, names: Sequence[str], what: str) -> None:
    """Writes a list of images for training to leave out; `what` says which they are."""
    from resnetlab.data.disk_split import quarantine_line
    from resnetlab.run_folder import write_atomically

    head = f"# {format_count(len(names), 'image')} {what}: resnetlab train DATA --quarantine {path}\n"
    text = head + "".join(f"{quarantine_line(name)}\n" for name in names)
    write_atomically(path, text.encode("utf-8", "surrogateescape"))
    log(f"{path}: {format_count(len(names), 'image')} for training to leave out")


def describe_busy() -> str:
    """That other programs use the processor's cores, which spoils measured times; "" where they do not."""
    from resnetlab.device import count_cores

    busy = hasattr(os, "getloadavg") and os.getloadavg()[0] > count_cores() + 1  # Windows has none
    return "other programs use the processor" if busy else ""
