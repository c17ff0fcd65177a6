"""`residuum data check` and `residuum data pack`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import DataError

if TYPE_CHECKING:
    from residuum.data.check import Findings
    from residuum.data.dataset import Dataset

SHOWN = 50  # problems printed; --json has them all


def check(
    data: str,
    /,
    *,
    data_dir: Path = Path("data"),
    quarantine: Path | None = None,
    workers: int | None = None,
    timing: bool = True,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Read every picture in full: unreadable and suspicious files, copies, leaks between splits, balance, loading speed.

    Example: `residuum data check photos --quarantine bad.txt`

    The exit code is 1 where there is something to mend.

    Parameters
    ----------
    data
        A folder of class folders, or a data set's name.
    data_dir
        Where archives lie.
    quarantine
        Write the names of pictures that training should leave out into this file: the unreadable ones, and copies. Use it with
        `residuum train DATA --quarantine FILE`.
    workers
        Processes that decode; by default as many as there are cores.
    timing
        Measure the loader's speed and its share of a training step of ResNet-18.
    json
        Print the findings as one JSON document.
    """
    from residuum.data import check as doctor

    try:
        source = _load(data, data_dir)
    except DataError as error:
        findings, speed = doctor.Findings(data, problems=[doctor.Problem("layout", data, str(error))]), None
        quarantine = None  # nothing was looked at: a list from before stays as it is
    else:
        with console.Bar("pictures") as bar:
            findings = doctor.check(source, (os.cpu_count() or 1) if workers is None else workers, bar.show)
        findings.problems += doctor.strays(source)
        speed = _speed(source) if timing and findings.readable == findings.pictures else None
    if quarantine is not None:
        _write(quarantine, findings)
    if json:
        console.print_json(findings.to_json() | {"loading": speed})
    else:
        _print(findings, speed)
    if findings.problems:
        n = len(findings.problems)
        raise DataError(f"{n:,} thing{'s' * (n > 1)} to mend in {data}.")


def pack(
    data: str,
    out: Path,
    /,
    *,
    per_shard: int = 1000,
    seed: int = 0,
    resize: int = 0,
) -> None:
    """Write a folder of class folders into tar shards in WebDataset's form, each with an index.

    Example: `residuum data pack photos shards --resize 256`

    Train on them with `residuum train shards`, or from a server with `residuum train 'http://…/train-{000000..000009}.tar'`.

    Parameters
    ----------
    data
        A folder of class folders.
    out
        A new folder for the shards.
    per_shard
        Pictures in a shard.
    seed
        Of the order in which pictures lie in the shards; what training sees does not depend on it.
    resize
        Bring a longer shorter side to this many pixels, written as JPEG; 0 keeps every file's bytes.
    """
    from residuum.data import pack as packing

    with console.Bar("pictures") as bar:
        source = _load(data, Path("data"))
        written = packing.pack(source, out, per_shard=per_shard, seed=seed, resize=resize, progress=bar.show)
    print(f"{len(written):,} shards in {out}")


def _load(data: str, data_dir: Path) -> Dataset:
    """The data set; what `strays` tells need not be warned of."""
    import warnings

    from residuum.data import sources

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*beside the class folders", UserWarning)
        return sources.load(data, data_dir)


def _speed(source: Dataset) -> dict[str, float] | None:
    from residuum.data.stored import Stored
    from residuum.training import recipes, timing

    split = source.train if len(source.train) else source.test
    return timing.loading(split, recipes.photos(), len(source.classes)) if isinstance(split, Stored) else None


def _write(path: Path, findings: Findings) -> None:
    from residuum.data.stored import quarantine_line
    from residuum.records import write_atomically

    head = f"# {len(findings.quarantine):,} pictures of {findings.data} to leave out: residuum train DATA --quarantine {path}\n"
    text = head + "".join(f"{quarantine_line(name)}\n" for name in findings.quarantine)
    write_atomically(path, text.encode("utf-8", "surrogateescape"))
    console.say(f"{path}: {len(findings.quarantine):,} pictures for training to leave out")


def _print(findings: Findings, speed: dict[str, float] | None) -> None:
    """The findings for a person."""
    print(f"{findings.data}: {findings.pictures:,} pictures, {findings.readable:,} can be read")
    if findings.shorter_sides:
        low, middle, high = findings.shorter_sides
        print(f"shorter side   {low:,} to {high:,} pixels, median {middle:,.0f}")
        print(f"kinds          {', '.join(f'{kind} {n:,}' for kind, n in findings.kinds.items())}")
    if speed is not None:
        words = f"{speed['images_per_second']:,.0f} images/s in one process"
        print(f"loading        {words}, {speed['share_of_step']:.1%} of a ResNet-18 step that waits for it")
    splits = list(findings.classes)
    names = list(dict.fromkeys(name for counts in findings.classes.values() for name in counts))
    if names:
        print()
        rows = [(name, *(f"{findings.classes[split][name]:,}" for split in splits)) for name in names]
        console.print_table("", ("class", *splits), rows, right=tuple(range(1, len(splits) + 1)))
    if findings.problems:
        print()
        console.print_table("", ("kind", "file", "detail"), findings.problems[:SHOWN])
        if (rest := len(findings.problems) - SHOWN) > 0:
            print(f"and {rest:,} more: --json lists all")
