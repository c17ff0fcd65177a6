"""Writes predictions: to standard output, a file, or a folder of parts; as a table, CSV, JSON, JSON lines or Parquet."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from resnetlab.cli import console
from resnetlab.errors import DataError, UsageError
from resnetlab.formatting import format_count
from resnetlab.stopping import check_stop

if TYPE_CHECKING:
    from resnetlab.inference.images import NamedImage
    from resnetlab.inference.predict import Prediction
    from resnetlab.inference.prediction_parts import PartFolder

OUTPUT_SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".txt": "table"}


@contextlib.contextmanager
def open_output(file: Path | None, format: str | None, inputs: Sequence[str]) -> Iterator[tuple[TextIO, str | None]]:
    """The stream for predictions, and the format that the file's ending decides; the file appears when all are written.

    Raises UsageError if the format is another, or the file is one of the inputs; RunError if it cannot be written.
    """
    from resnetlab.run_folder import check_output_file, write_atomically  # loads torch

    if file is None:
        yield sys.stdout, None
        return
    by_suffix = OUTPUT_SUFFIXES[file.suffix]
    if format not in (None, by_suffix):
        raise UsageError(f"--format {format} and --out {file} contradict each other; give one of them.")
    check_output_file(file, [image for image in inputs if image != "-"])
    stream = io.StringIO(newline="")
    written = False
    try:
        yield stream, by_suffix
        written = True
    except DataError:  # images that could not be read have their lines
        written = True
        raise
    finally:
        if written:
            write_atomically(file, _encode(stream.getvalue(), by_suffix))
            console.log(f"predictions: {file}")


def _encode(text: str, format: str) -> bytes:
    """The content of a file of predictions from their text."""
    return _to_parquet(text) if format == "parquet" else text.encode("utf-8", "surrogateescape")


def _to_parquet(text: str) -> bytes:
    """The rows of a CSV text as a Parquet file."""
    from resnetlab.errors import missing_package

    try:
        import pyarrow
        from pyarrow import csv as arrow_csv
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("--out FILE.parquet", error.name, "parquet") from error
    types = dict.fromkeys(("image", "class", "error"), pyarrow.string())
    types |= {"rank": pyarrow.int64(), "score": pyarrow.float64()}
    table = arrow_csv.read_csv(
        io.BytesIO(text.encode("utf-8", "replace")),
        convert_options=arrow_csv.ConvertOptions(column_types=types),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
    )
    content = io.BytesIO()
    parquet.write_table(table, content)
    return content.getvalue()


def report_predictions(predictions: Iterator[Any], format: str, stream: TextIO) -> None:
    """Prints predictions as they come; raises DataError at the end if an image could not be read."""
    with contextlib.redirect_stdout(stream):
        done, failed, reason = _print_predictions(predictions, format)
    if failed:
        raise DataError(f"{failed:,} of {done:,} images could not be read. The first: {reason}")


def write_parts(
    folder: PartFolder, images: Iterable[NamedImage], predict_part: Callable[[list[NamedImage]], Iterator[Any]]
) -> None:
    """Predicts the missing parts; raises DataError at the end if an image could not be read."""
    from resnetlab.run_folder import write_atomically  # loads torch

    done = failed = written = 0
    reason = None
    for part in folder.missing(images):
        stream = io.StringIO(newline="")
        with contextlib.redirect_stdout(stream):
            counts = _print_predictions(predict_part(part.images), folder.suffix[1:])
        write_atomically(part.file, _encode(stream.getvalue(), folder.suffix[1:]))
        done, failed, reason, written = done + counts[0], failed + counts[1], reason or counts[2], written + 1
    console.log(
        f"predictions: {folder.path} ({format_count(written, 'part')} with {format_count(done, 'image')} by "
        "this process)"
    )
    if failed:
        raise DataError(f"{failed:,} of {done:,} images could not be read. The first: {reason}")


def _print_predictions(predictions: Iterator[Prediction], format: str) -> tuple[int, int, str | None]:
    """Prints predictions as they come; returns their number, the number of errors, and the first error."""
    done = failed = 0
    reason = None
    writers = {"table": _table_writer, "csv": _csv_writer, "json": _json_writer, "jsonl": _jsonl_writer}
    write, end = (writers | {"parquet": _csv_writer})[format]()
    for p in predictions:
        check_stop()
        done += 1
        if p.error is not None:
            failed, reason = failed + 1, reason or p.error
        write(p)
        if done % 64 == 0:
            sys.stdout.flush()
    end()
    return done, failed, reason


Writer = tuple["Callable[[Prediction], object]", Callable[[], object]]  # writes a prediction; ends the output


def _csv_writer() -> Writer:
    if isinstance(sys.stdout, io.TextIOWrapper):  # programs read it, on whatever system
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    writer = csv.writer(sys.stdout)
    writer.writerow(("image", "rank", "class", "score", "error"))
    return lambda p: writer.writerows(p.to_rows()), lambda: None


def _json_writer() -> Writer:
    from json import dumps

    separator = '{\n  "predictions": ['

    def write(p: Prediction) -> None:
        nonlocal separator
        print(f"{separator}\n    {dumps(p.to_json(), allow_nan=False)}", end="")
        separator = ","

    return write, lambda: print("\n  ]\n}" if separator == "," else separator + "]\n}")


def _jsonl_writer() -> Writer:
    from json import dumps

    return lambda p: print(dumps(p.to_json(), allow_nan=False)), lambda: None


def _table_writer() -> Writer:
    """The first hundred rows determine the column widths; later ones are printed as they come."""
    rows: list[tuple[str, str]] = []
    width = 0

    def begin() -> None:
        nonlocal width
        width = max((len(console.escape_control(name)) for name, _ in rows), default=0)
        console.print_table("", ("image", "classes and scores"), rows)

    def write(p: Prediction) -> None:
        row = (p.name, p.describe())
        if width:
            console.write_line(f"{row[0]:<{width}}  {row[1]}")
            return
        rows.append(row)
        if len(rows) == 100:
            begin()

    return write, lambda: None if width else begin()
