"""`residuum predict`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import DataError, UsageError

if TYPE_CHECKING:
    from residuum.use.predict import Model, Picture, Prediction

FEW = 64  # pictures that are sooner done in torch than another engine is built


def predict(
    model: str,
    /,
    *images: Annotated[str, Parameter(allow_leading_hyphen=True)],  # so that "-" can be one
    top: int = 5,
    format: Literal["table", "csv", "json", "jsonl"] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    engine: str = "auto",
    precision: str = "auto",
    calibrate: Path | None = None,
    device: str = "auto",
) -> None:
    """Say what is on pictures: the classes with the highest scores, for files, folders or standard input (-).

    Example: `residuum predict runs/digits/model.safetensors three.png --top 3`

    A picture that cannot be read gives a line with the reason; the others are still predicted, and the exit code is 1.

    Parameters
    ----------
    model
        A model file, or a publisher's name such as torchvision:resnet50.IMAGENET1K_V2.
    images
        Pictures, folders of pictures (of any number: they stream), or - for one picture on standard input.
    top
        How many classes to show for each picture.
    format
        table, csv (one line for each picture and rank), json (one document) or jsonl (one JSON object a line).
    json
        The same as --format json.
    engine
        torch, onnxruntime or openvino; auto takes the fastest that is installed and agrees with torch on the model's check
        pictures, or torch in fp32 where there are at most 64 pictures, and says which.
    precision
        fp32, bf16 or int8; auto is bf16 where the hardware computes it and the engine agrees, else fp32.
    calibrate
        A folder of pictures to calibrate int8 on, instead of the training pictures in the model file.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one. On a GPU the engine is torch.
    """
    from residuum.use.engines import check_names
    from residuum.use.predict import load

    if strange := [image for image in images if image.startswith("-") and image != "-"]:
        raise UsageError(f"unknown option {strange[0]}; `residuum predict --help` lists what there is.")
    if not images:
        raise UsageError("predict needs pictures: files, folders, or - for standard input.")
    if not all(image.strip() for image in images):
        raise UsageError(
            "the name of a picture is empty; give a file, a folder (. is this one), or - for standard input."
        )
    if images.count("-") > 1:
        raise UsageError("- stands for one picture on standard input; give it once.")
    if top < 1:
        raise UsageError(f"--top must be 1 or more, not {top}.")
    if json and format not in (None, "json"):
        raise UsageError(f"--json and --format {format} contradict each other; give one of them.")
    check_names(engine, precision)
    if calibrate is not None and not calibrate.is_dir():
        raise DataError(f"{calibrate} is no folder; --calibrate takes a folder of pictures.")
    loaded = load(model, device=device)
    sources = _sources(images)
    first = list(islice(sources, FEW + 1))
    console.say(f"engine: {_choose(loaded, engine, precision, calibrate, first)}")
    with console.Bar("pictures") as bar:
        predictions = _shown(loaded.named_predictions(chain(first, sources), top=top), bar, len(first) == FEW + 1)
        done, failed, reason = _print(predictions, "json" if json else format or "table")
    if failed:
        raise DataError(f"{failed:,} of {done:,} pictures could not be read. The first: {reason}")


def _sources(images: Sequence[str]) -> Iterator[tuple[str, Picture | DataError]]:
    """(name, picture or why there is none) of all that was named; folders are listed as they are needed."""
    from residuum.data.decode import listed

    for image in images:
        if image == "-":
            yield image, sys.stdin.buffer.read()
            continue
        for found in listed(Path(image)):
            yield (image if isinstance(found, DataError) else str(found)), found


def _choose(
    model: Model, engine: str, precision: str, calibrate: Path | None, first: Sequence[tuple[str, Picture | DataError]]
) -> str:
    """Takes the engine; what is said of it."""
    from residuum.data.decode import picture_files

    if engine == "auto" and len(first) <= FEW and precision != "int8" and model.engine.device.type == "cpu":
        precision = "fp32" if precision == "auto" else precision
        model.choose("torch", precision)
        return f"torch {precision} (for {FEW} pictures or fewer building another takes longer than it saves)"
    pictures = [picture for _, picture in first[:16] if not isinstance(picture, DataError)]
    calibration = list(islice(picture_files([calibrate]), 256)) if calibrate is not None else ()
    return model.choose(engine, precision, pictures, calibration)


def _shown(predictions: Iterator[Prediction], bar: console.Bar, many: bool) -> Iterator[Prediction]:
    for done, prediction in enumerate(predictions, 1):
        if many and done % 64 == 0:
            bar.show(done, None)
        yield prediction


def _print(predictions: Iterator[Prediction], format: str) -> tuple[int, int, str | None]:
    """Prints predictions as they come; how many they are, how many of them are errors, and the first error."""
    done = failed = 0
    reason = None
    write, end = {"table": _table, "csv": _csv, "json": _json, "jsonl": _jsonl}[format]()
    for p in predictions:
        done += 1
        if p.error is not None:
            failed, reason = failed + 1, reason or p.error
        write(p)
        if done % 64 == 0:
            sys.stdout.flush()
    end()
    return done, failed, reason


Writer = tuple[
    "Callable[[Prediction], object]", Callable[[], object]
]  # of one prediction, and of what comes after the last


def _csv() -> Writer:
    writer = csv.writer(sys.stdout)
    writer.writerow(("image", "rank", "class", "score", "error"))

    def write(p: Prediction) -> None:
        rows = (
            [(p.name, "", "", "", p.error)] if p.error else [(p.name, i, c, s, "") for i, (c, s) in enumerate(p.top, 1)]
        )
        writer.writerows(rows)

    return write, lambda: None


def _json() -> Writer:
    from json import dumps

    separator = '{\n  "predictions": ['

    def write(p: Prediction) -> None:
        nonlocal separator
        print(f"{separator}\n    {dumps(p.to_json(), allow_nan=False)}", end="")
        separator = ","

    return write, lambda: print("\n  ]\n}" if separator == "," else separator + "]\n}")


def _jsonl() -> Writer:
    from json import dumps

    return lambda p: print(dumps(p.to_json(), allow_nan=False)), lambda: None


def _table() -> Writer:
    """The first hundred rows are laid out together; later ones go under their columns as they come."""
    rows: list[tuple[str, str]] = []
    width = 0

    def begin() -> None:
        nonlocal width
        width = max((len(name) for name, _ in rows), default=0)
        console.print_table("", ("image", "classes and scores"), rows)

    def write(p: Prediction) -> None:
        row = (p.name, p.error or "  ".join(f"{name} {score:.1%}" for name, score in p.top))
        if width:
            print(f"{row[0]:<{width}}  {row[1]}")
            return
        rows.append(row)
        if len(rows) == 100:
            begin()

    return write, lambda: None if width else begin()
