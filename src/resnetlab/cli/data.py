"""`resnetlab data check` and `resnetlab data pack`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from resnetlab.cli import console
from resnetlab.cli.options import DataDir, Json
from resnetlab.errors import DataError, UsageError
from resnetlab.formatting import format_count, format_split

if TYPE_CHECKING:
    from resnetlab.data.check import CheckReport
    from resnetlab.data.dataset import Dataset

MAX_SHOWN = 200  # problems on a page


def check(
    data: str,
    /,
    *,
    data_dir: DataDir = Path("data"),
    quarantine: Path | None = None,
    out: Path | None = None,
    workers: int | None = None,
    timing: bool = True,
    json: Json = False,
) -> None:
    """Decode every image and report unreadable or suspicious files, copies, leaks between splits, class counts and speed.

    Example: `resnetlab data check photos --quarantine bad.txt`

    The exit code is 1 if there is a problem.

    Parameters
    ----------
    data
        A folder of class folders, a zip or tar of one, a table of paths and labels (several per image too), tar shards,
        a data set's name, or a folder of images with boxes or masks.
    quarantine
        Write the names of images to leave out of training into this file: the unreadable ones, and copies. Use it with
        `resnetlab train DATA --quarantine FILE`.
    out
        Write a page that shows the problems, .html.
    workers
        Processes that decode; by default as many as there are cores.
    timing
        Measure the speed of loading, and the share of a ResNet-18 training step that waits for it.
    """
    from resnetlab.data.check import Problem, check_annotated, check_dataset, check_layout, find_unexpected_files
    from resnetlab.data.layouts import find_layout
    from resnetlab.device import count_cores
    from resnetlab.run_folder import check_output_file

    if quarantine is not None:
        check_output_file(quarantine, [data], "--quarantine")
    console.check_page(out, [data])
    if workers is not None and workers < 0:
        raise UsageError(f"--workers must be 0 or more, not {workers}.")
    workers = count_cores() if workers is None else workers
    with console.ProgressBar("images") as bar:
        source: Dataset | None = None
        try:
            source = _load_source(data, data_dir, multi_label=True)
        except DataError:
            layout = find_layout(Path(data)) if Path(data).is_dir() else None
            if layout is not None and quarantine is not None:
                raise UsageError(
                    "--quarantine is for images in classes; train on boxes or masks with --on-bad-box skip or --on-bad-mask "
                    "skip."
                ) from None
            quarantine = None  # an existing list stays as it is until the layout is right
            try:
                if layout is None:
                    raise
                report = check_annotated(Path(data), layout, workers, bar.update)
            except DataError as error:
                report = check_layout(data, error, workers, bar.update)
        else:
            report = check_dataset(source, workers, bar.update)
            report.problems += find_unexpected_files(source)
            if len(source.classes) == 1:
                one = (
                    f"there is one class only, {source.classes[0]}: enough to evaluate a model on, not to train one on"
                )
                report.problems.append(Problem("layout", data, one))
    if quarantine is not None:
        console.write_quarantine(quarantine, report.quarantine, f"of {report.data} to leave out")
    if out is not None:
        _write_page(report, out, data_dir)
    if not json:
        _print_report(report)
    speed = _measure_loading(source) if source and timing and report.readable == report.total else None
    if json:
        console.print_json(report.to_json() | {"loading": speed})
    elif speed is not None:
        words = f"{speed['images_per_second']:,.0f} images/s in one process"
        console.write_line(
            f"loading        {words}, {speed['share_of_step']:.1%} of a ResNet-18 step that waits for it"
        )
    if n := len(report.problems):
        raise DataError(f"{format_count(n, 'problem')} found in {data}.")


def pack(data: str, out: Path, /, *, per_shard: int = 1000, seed: int = 0, resize: int = 0) -> None:
    """Pack a folder of class folders into tar shards in WebDataset format, each with an index.

    Example: `resnetlab data pack photos shards --resize 256`

    Train on them with `resnetlab train shards`, or from a server with `resnetlab train 'http://…/train-{000000..000009}.tar'`.

    Parameters
    ----------
    data
        A folder of class folders, a zip or tar of one, or a table of paths and labels.
    out
        A new folder for the shards.
    per_shard
        Images in a shard.
    seed
        Of the images' order in the shards; training does not depend on it.
    resize
        Resize images with a longer shorter side to this many pixels, written as JPEG; 0 keeps every file's bytes.
    """
    from resnetlab.data.pack import check_target, pack_shards
    from resnetlab.run_folder import check_output_folder

    check_output_folder(out)
    check_target(out)
    with console.ProgressBar("images") as bar:
        source = _load_source(data, Path("data"))
        written = pack_shards(source, out, per_shard=per_shard, seed=seed, resize=resize, on_progress=bar.update)
    console.write_line(f"{format_count(len(written), 'shard')} in {out}")


def _load_source(data: str, data_dir: Path, *, multi_label: bool = False) -> Dataset:
    """Loads the data set without the warning about images that `find_unexpected_files` reports."""
    import warnings

    from resnetlab.data import sources
    from resnetlab.data.disk_split import ReadOptions

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*beside the class folders", UserWarning)
        return sources.load_dataset(data, data_dir, ReadOptions(one_class=True, multi_label=multi_label))


def _measure_loading(source: Dataset) -> dict[str, float] | None:
    from resnetlab.data.check import read_as_found
    from resnetlab.data.disk_split import DiskSplit
    from resnetlab.training import recipes, timing

    source = read_as_found(source)
    split = source.train if len(source.train) else source.test
    if not isinstance(split, DiskSplit):
        return None
    console.log(
        "timing the loading of images and a training step of ResNet-18 (recipe photos); --no-timing leaves it out"
    )
    return timing.time_data_loading(split, recipes.photos())


def _write_page(report: CheckReport, out: Path, data_dir: Path) -> None:
    """Writes a page of the problems by kind, with the images that can be read."""
    import warnings

    from resnetlab.inference.neighbours import ShownImage, render_images
    from resnetlab.run_folder import write_atomically

    shown = report.problems[:MAX_SHOWN]
    kinds = dict.fromkeys(problem.kind for problem in shown)
    groups = [
        (kind, [ShownImage(problem.file, (problem.detail,)) for problem in shown if problem.kind == kind])
        for kind in kinds
    ]
    counts = [
        f"{format_split(split)} {n:,} in {format_count(len(report.classes[split]), 'class')}"
        for split, n in report.images.items()
    ]
    lead = (
        f"{report.data}: {format_count(report.total, 'image')}, {report.readable:,} can be read; {'; '.join(counts)}. "
        f"{format_count(len(report.problems), 'problem')}{f', the first {MAX_SHOWN}' * (len(report.problems) > MAX_SHOWN)}."
    )
    with warnings.catch_warnings():  # of images that cannot be read, which the page says
        warnings.simplefilter("ignore", UserWarning)
        page = render_images("Data check", lead, groups, report.data, data_dir)
    write_atomically(out, page)
    console.log(f"page: {out}")


def _print_report(report: CheckReport) -> None:
    console.write_line(f"{report.data}: {format_count(report.total, 'image')}, {report.readable:,} can be read")
    if report.layout:
        console.write_line(f"layout         {report.layout}")
    if report.shorter_sides:
        low, middle, high = report.shorter_sides
        console.write_line(f"shorter side   {low:,} to {high:,} pixels, median {middle:,.0f}")
        console.write_line(f"kinds          {', '.join(f'{kind} {n:,}' for kind, n in report.kinds.items())}")
    splits = list(report.classes)
    names = list(dict.fromkeys(name for counts in report.classes.values() for name in counts))
    if names:
        print()
        rows = [(name, *(f"{report.classes[split][name]:,}" for split in splits)) for name in names]
        console.print_table("", ("class", *map(format_split, splits)), rows, right=tuple(range(1, len(splits) + 1)))
    if report.problems:
        print()
        console.print_first(("kind", "file", "detail"), report.problems, "--json")
    sys.stdout.flush()  # before the speed is measured
