"""What a study leaves behind: report.html (one file, its layout is pages/study.html.j2), rows.csv and rows.json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from residuum.data import sources
from residuum.evaluation.page import pages
from residuum.records import write_atomically, writing_error
from residuum.runtime import environment
from residuum.studies.runs import Outcome
from residuum.studies.setting import Setting
from residuum.studies.study import Done, span
from residuum.studies.verdicts import percent
from residuum.studies.version import version

COLUMNS = ("study", "data", "what", "figure", "unit", "mean", "sd", "n", "values", "diverged", "paper", "paper_source",
           "budget", "verdict")  # fmt: skip


def write(done: Sequence[Done], folder: Path, command: str) -> None:
    """Writes the three files; raises RunError where there is no space or no permission."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_error(folder, error) from error
    rows = [row for each in done for row in each.rows]
    document = {"command": command, "rows": rows, "environment": machine(done)}
    write_atomically(folder / "rows.json", json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "rows.csv", table(rows))
    write_atomically(folder / "report.html", render(done, command))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; the values of all seeds stand in one cell, with spaces between."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "values": " ".join(map(repr, row["values"]))})
    return text.getvalue()


def machine(done: Sequence[Done]) -> dict[str, Any]:
    """Versions and hardware: of the runs where there are any, else of this process."""
    for each in done:
        for outcome in each.outcomes:
            if outcome.environment:
                kept = {k: v for k, v in outcome.environment.items() if k not in ("data_dir", "started_in")}
                return kept | {"code": version()}
    return environment() | {"code": version()}


def render(done: Sequence[Done], command: str) -> str:
    """The page as HTML: one study, or several with a front page."""
    templates = pages()
    templates.filters |= {"figure": figure, "share": share, "span": span}
    setting = done[0].setting
    page = templates.get_template("study.html.j2").render(
        title=done[0].study.name if len(done) == 1 else "all studies",
        studies=[
            {
                "name": each.study.name,
                "question": each.study.question,
                "place": each.study.place,
                "reading": each.reading,
                "rows": each.rows,
                "runs": [run_row(outcome) for outcome in each.outcomes],
            }
            for each in done
        ],
        data=sources.short_name(setting.data),
        seeds=setting.seeds,
        budget=budget(done),
        command=command,
        environment=machine(done),
    )
    return page.encode(errors="replace").decode()


def budget(done: Sequence[Done]) -> str | None:
    """The label of runs that are not as long as the paper's; None where they are, or where nothing was trained."""
    setting = done[0].setting
    if not any(each.outcomes for each in done) or abs(setting.share - 1) < 0.001:
        return None
    return f"budget {setting.budget}: {label(setting)}"


def label(setting: Setting) -> str:
    """A budget in words: its steps and its share of the paper's passes over the pictures."""
    base = setting.base
    return f"{base.steps:,} steps of {base.batch}, {percent(setting.share)} of the paper's passes over the pictures"


def run_row(outcome: Outcome) -> dict[str, Any]:
    """One run, as the page lists it."""
    result = outcome.result
    return {
        "label": outcome.trial.label,
        "seed": outcome.trial.recipe.seed,
        "folder": outcome.folder.name,
        "seconds": result.get("seconds"),
        "training_error": outcome.training_error,
        "test_error": outcome.test_error,
        "diverged": outcome.diverged,
    }


def figure(value: float | None, unit: str) -> str:
    """A figure as people read it: "8.75 %", "269,722", "1.81e9", "0.123"."""
    if value is None:
        return "–"
    if unit == "error":
        return f"{100 * value:.2f}\u00a0%"
    if unit == "count":
        return f"{value:,.0f}"
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.2g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def share(value: float | None) -> str:
    """A budget as a share of the paper's."""
    return "–" if value is None else percent(value).replace(" ", "\u00a0")
