"""`residuum predict`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import DataError, UsageError

if TYPE_CHECKING:
    from residuum.use.predict import Prediction


def predict(
    model: Path,
    /,
    *images: Annotated[str, Parameter(allow_leading_hyphen=True)],  # so that "-" can be one
    top: int = 5,
    format: Literal["table", "json", "csv"] = "table",
    json: Annotated[bool, Parameter(negative="")] = False,
    precision: str = "fp32",
    device: str = "auto",
) -> None:
    """Say what is on pictures: the classes with the highest scores, for files, folders or standard input (-).

    Example: `residuum predict runs/digits/model.safetensors three.png --top 3`

    A picture that cannot be read gives a line with the reason; the others are still predicted, and the exit code is 1.

    Parameters
    ----------
    model
        A model file.
    images
        Pictures, folders of pictures, or - for one picture on standard input.
    top
        How many classes to show for each picture.
    format
        table, json (one document) or csv (one line for each picture and rank).
    json
        The same as --format json.
    precision
        fp32, bf16 or auto.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    """
    from residuum.data.decode import picture_files
    from residuum.use.predict import load

    if strange := [image for image in images if image.startswith("-") and image != "-"]:
        raise UsageError(f"unknown option {strange[0]}; `residuum predict --help` lists what there is.")
    if not images:
        raise UsageError("predict needs pictures: files, folders, or - for standard input.")
    if top < 1:
        raise UsageError(f"--top must be 1 or more, not {top}.")
    loaded = load(model, precision=precision, device=device)
    if list(images) == ["-"]:
        sources: list[Path] | list[bytes] = [sys.stdin.buffer.read()]
    else:
        sources = list(picture_files(map(Path, images)))
    with console.Bar("pictures") as bar:
        failed = _print(_shown(loaded.predictions(sources, top=top), bar, len(sources)), "json" if json else format)
    if failed:
        raise DataError(f"{failed} of {len(sources)} pictures could not be read.")


def _shown(predictions: Iterator[Prediction], bar: console.Bar, total: int) -> Iterator[Prediction]:
    for done, prediction in enumerate(predictions, 1):
        if total > 1 and (done % 64 == 0 or done == total):
            bar.show(done, total)
        yield prediction


def _print(predictions: Iterator[Prediction], format: str) -> int:
    """Prints predictions; how many of them are errors."""
    failed = 0
    writer = csv.writer(sys.stdout)
    rows, documents = [], []
    if format == "csv":
        writer.writerow(("image", "rank", "class", "score", "error"))
    for p in predictions:
        failed += p.error is not None
        if format == "csv":
            writer.writerows(
                [(p.name, "", "", "", p.error)]
                if p.error
                else [(p.name, i, c, s, "") for i, (c, s) in enumerate(p.top, 1)]
            )
        elif format == "json":
            documents.append(p.to_json())
        else:
            rows.append((p.name, p.error or "  ".join(f"{name} {score:.1%}" for name, score in p.top)))
    if format == "json":
        console.print_json({"predictions": documents})
    elif format == "table":
        console.print_table("", ("image", "classes and scores"), rows)
    return failed
