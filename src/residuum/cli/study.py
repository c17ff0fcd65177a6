"""`residuum study`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from residuum.cli import console

if TYPE_CHECKING:
    from residuum.studies.setting import Setting
    from residuum.studies.study import Done


def study(
    name: str | None = None,
    /,
    *,
    data: str = "digits",
    budget: str = "quick",
    seeds: int | None = None,
    depths: Annotated[str | None, Parameter(help="Depths of the networks, with commas between, such as 20,56.")] = None,
    steps: int | None = None,
    yes: Annotated[bool, Parameter(negative="")] = False,
    data_dir: Path = Path("data"),
    device: str = "auto",
    out: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Make one of the papers' experiments: its runs, a table beside the paper's numbers, figures, and a verdict.

    Without a name: the list of studies, each with its question and what it costs here. `all` makes them all, in one report.
    Runs are kept in runs/studies and used again by every study that needs them; a study that was stopped goes on.

    Example: `residuum study degradation --data cifar10 --budget quick --seeds 3 --data-dir data`

    Parameters
    ----------
    name
        A study, or all.
    data
        digits, cifar10, cifar100, or a folder of class folders.
    budget
        smoke (does it run), quick (a first look) or paper (the paper's own length); told before it starts.
    seeds
        Runs of each network; by default 1, 3 and 5 for the three budgets.
    steps
        Length of each run, in place of the budget's.
    yes
        Start what takes more than a day.
    data_dir
        Where archives lie.
    device
        cpu, cuda, cuda:1, …; several networks learn at once, one on each core or several on each GPU.
    out
        Folder for report.html, rows.csv and rows.json; by default runs/study-NAME-DATA-BUDGET.
    json
        Print the rows as one JSON document.
    """
    from residuum.data import sources
    from residuum.studies import catalogue, report
    from residuum.studies.setting import SEEDS, Setting
    from residuum.studies.study import Told, carry_out

    chosen_depths = _depths(depths)
    runs = SEEDS.get(budget, 1) if seeds is None else seeds
    setting = Setting(data, data_dir, budget, runs, chosen_depths, device, steps)
    if name is None:
        return _list(setting, json)
    studies = catalogue.chosen(name)
    with console.Bar(f"study {name}") as bar:
        told = Told(console.say, bar.show, lambda done, total: bar.show(done, total))
        done = carry_out(studies, setting, yes=yes, told=told)
    folder = out or Path("runs") / f"study-{name}-{sources.short_name(data)}-{f'{steps}-steps' if steps else budget}"
    command = shlex.join(["residuum", *sys.argv[1:]])
    report.write(done, folder, command)
    console.say(f"report: {folder / 'report.html'}")
    if json:
        return console.print_json({"report": str(folder / "report.html"), "rows": [r for d in done for r in d.rows]})
    return _print(done)


def _depths(text: str | None) -> tuple[int, ...]:
    from residuum.models.spec import parse_value

    return () if text is None else tuple(parse_value("--depths", text, "tuple[int, ...]"))


def _print(done: list[Done]) -> None:
    """The tables and verdicts for a person."""
    from residuum.studies.report import figure, label, share

    for each in done:
        rows = [
            (
                row["what"],
                row["figure"],
                figure(row["mean"], row["unit"])
                + (f" ± {figure(row['sd'], row['unit'])}" if row["sd"] is not None else ""),
                str(row["n"]),
                _paper(row, figure),
                share(row["budget"]),
                row["verdict"],
            )
            for row in each.rows
        ]
        columns = ("what", "figure", "mean ± sd", "n", "paper", "budget", "verdict")
        console.print_table(each.study.name, columns, rows, right=(2, 3))
        print()
        print(each.reading.answer, each.reading.more)
        if each.outcomes:
            print(f"Budget: {label(each.setting)}, {each.setting.seeds} seed{'s' * (each.setting.seeds > 1)}.")
        print()


def _paper(row: dict[str, Any], figure: Callable[[float | None, str], str]) -> str:
    """The paper's number and its table."""
    if row["paper"] is None:
        return row["paper_source"] or ""
    return f"{figure(row['paper'], row['unit'])}, {row['paper_source']}"


def _list(setting: Setting, json: bool) -> None:
    """The catalogue."""
    from residuum.studies.catalogue import costs
    from residuum.studies.study import span

    rows = costs(setting)
    if json:
        return console.print_json({"rows": rows})
    columns = ("study", "question", "in the papers", "quick", "paper")
    cells = [
        (row["study"], row["question"], row["place"], *(span(row["seconds"][budget]) for budget in ("quick", "paper")))
        for row in rows
    ]
    console.print_table("", columns, cells, right=(3, 4))
    print(f"\nTimes are for {setting.data} on this machine, from a few steps, without runs that are there already.")
    return None
