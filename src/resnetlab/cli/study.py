"""`resnetlab study`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from resnetlab.cli import console
from resnetlab.cli.options import DataDir, Flag, Json
from resnetlab.formatting import format_count, format_estimate

if TYPE_CHECKING:
    from resnetlab.studies.setting import Setting
    from resnetlab.studies.study import StudyOutput


def study(
    name: str | None = None,
    /,
    *,
    data: str = "digits",
    budget: str = "quick",
    seeds: int | None = None,
    depths: Annotated[str | None, Parameter(help="Depths of the networks, separated by commas, such as 20,56.")] = None,
    steps: int | None = None,
    epochs: float | None = None,
    yes: Flag = False,
    data_dir: DataDir = Path("data"),
    device: str = "auto",
    precision: str = "auto",
    out: Path | None = None,
    any_version: Flag = False,
    records: Flag = False,
    json: Json = False,
) -> None:
    """Repeat one of the papers' experiments: its runs, a table beside the paper's numbers, figures, and a verdict.

    Without a name: the list of studies, each with its question and its cost here. `all` makes all but ImageNet's,
    in one report.
    Runs are kept in runs/studies and reused by every study that needs them; a study that was stopped is resumed.

    Example: `resnetlab study degradation --data cifar10 --budget quick --seeds 3 --data-dir data`

    Parameters
    ----------
    name
        A study, or all.
    data
        digits, cifar10, cifar100, or a folder of class folders; of the studies imagenet and imagenet-preact a folder laid
        out as ImageNet.
    budget
        smoke (does it run), quick (a first look) or paper (the paper's own length); the cost is reported before it starts.
    seeds
        Runs of each network; by default 1, 3 and 5 for the three budgets.
    steps
        Length of each run, in place of the budget's.
    epochs
        The same in epochs.
    yes
        Start even if it takes more than a day.
    device
        cpu, cuda, cuda:1, …; several networks train at once, one on each core or each GPU (eight where NVIDIA's MPS runs).
    precision
        bf16 or fp32, of every run; auto takes bf16 where the device computes it.
    any_version
        Count finished runs whatever version of the code made them, such as a cluster's; the report says so.
    out
        Folder for report.html, rows.csv and rows.json; by default runs/study-NAME-DATA-BUDGET.
    records
        Write the runs' records too, without weights, to runs/ in that folder: what results/ of the repository keeps.
    """
    from resnetlab.data import sources
    from resnetlab.models.spec import parse_value
    from resnetlab.run_folder import check_output_folder
    from resnetlab.studies import catalogue, report
    from resnetlab.studies.setting import SEEDS, Setting
    from resnetlab.studies.study import Callbacks, run_studies

    check_output_folder(out)
    num_seeds = SEEDS.get(budget, 1) if seeds is None else seeds
    chosen = () if depths is None else tuple(parse_value("--depths", depths, "tuple[int, ...]"))
    setting = Setting(
        data, data_dir, budget, num_seeds, chosen, device, steps,
        epochs=epochs, precision=precision, any_version=any_version,
    )  # fmt: skip
    if name is None:
        return _print_catalogue(setting, json)
    studies = catalogue.select_studies(name)
    with console.ProgressBar(f"study {name}") as bar:
        outputs = run_studies(studies, setting, yes=yes, callbacks=Callbacks(console.log, bar.update, bar.update))
    length = f"{steps}-steps" if steps else f"{epochs:g}-epochs" if epochs else budget
    folder = out or Path("runs") / f"study-{name}-{sources.short_name(data)}-{length}"
    command = shlex.join(["resnetlab", *map(sources.strip_signature, sys.argv[1:])])
    report.write_study(outputs, folder, command)
    if records:
        console.log(f"records of {format_count(report.write_records(outputs, folder), 'run')}: {folder / 'runs'}")
    console.log(f"report: {folder / 'report.html'}")
    if json:
        rows = [row for output in outputs for row in output.rows]
        return console.print_json({"report": str(folder / "report.html"), "rows": rows})
    return _print_studies(outputs)


def _print_studies(outputs: list[StudyOutput]) -> None:
    """Prints the tables and verdicts."""
    from resnetlab.studies.report import describe_study_budget, format_budget, format_figure

    for output in outputs:
        rows = [
            (
                row["what"],
                row["figure"],
                format_figure(row["mean"], row["unit"])
                + (f" ± {format_figure(row['sd'], row['unit'])}" if row["sd"] is not None else ""),
                str(row["n"]),
                _format_paper(row, format_figure),
                format_budget(row["budget"]),
                row["verdict"],
            )
            for row in output.rows
        ]
        columns = ("what", "figure", "mean ± sd", "n", "paper", "budget", "verdict")
        console.print_table(output.study.name, columns, rows, right=(2, 3))
        print()
        console.write_line(f"{output.result.answer} {output.result.details}")
        if output.outcomes:
            seeds = output.setting.seeds
            console.write_line(f"Budget: {describe_study_budget(output.setting)}, {format_count(seeds, 'seed')}.")
        print()


def _format_paper(row: dict[str, Any], format_figure: Callable[[float | None, str], str]) -> str:
    """The paper's number and its table."""
    if row["paper"] is None:
        return row["paper_source"] or ""
    return f"{format_figure(row['paper'], row['unit'])}, {row['paper_source']}"


def _print_catalogue(setting: Setting, json: bool) -> None:
    """Prints the studies and their costs."""
    from resnetlab.studies.catalogue import estimate_costs

    rows = estimate_costs(setting)
    if json:
        return console.print_json({"rows": rows})
    columns = ("study", "question", "in the papers", "smoke", "quick", "paper")
    cells = []
    for row in rows:
        seconds = (row["seconds"][budget] for budget in ("smoke", "quick", "paper"))
        times = ("–" if each is None else format_estimate(each) for each in seconds)
        cells.append((row["study"], row["question"], row["place"], *times))
    console.print_table("", columns, cells, right=(3, 4, 5))
    print()
    console.write_line(
        f"Times are for {setting.data} on this machine, from a few timed steps, without the runs that are finished."
    )
    return None
