"""The files that a study writes: report.html (one file, its layout is pages/study.html.j2), rows.csv and rows.json."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resnetlab.data import sources
from resnetlab.device import environment
from resnetlab.evaluation.page import render_page
from resnetlab.formatting import format_count, format_estimate, format_percent, format_share, unbreakable
from resnetlab.run_folder import write_together
from resnetlab.studies.code_version import source_hash
from resnetlab.studies.runs import DIVERGED, RunOutcome
from resnetlab.studies.setting import Setting
from resnetlab.studies.study import StudyOutput

COLUMNS = ("study", "data", "what", "figure", "unit", "mean", "sd", "n", "values", "diverged", "paper", "paper_source",
           "budget", "verdict", "compared_with", "difference", "difference_low", "difference_high", "difference_n",
           "from_paper", "from_paper_low", "from_paper_high", "from_paper_n")  # fmt: skip

LOCAL = ("data_dir", "started_in")  # keys of a run's environment that mean nothing elsewhere
RECORDS = ("recipe.toml", "metrics.jsonl", "result.json", DIVERGED)  # of a run, beside its environment


def write_study(outputs: Sequence[StudyOutput], folder: Path, command: str) -> None:
    """Writes the three files; raises RunError where there is no space or no permission."""
    rows = [row for output in outputs for row in output.rows]
    document = {"command": command, "rows": rows, "environment": study_environment(outputs)}
    files = {
        "rows.json": json.dumps(document, indent=2, ensure_ascii=False) + "\n",
        "rows.csv": rows_to_csv(rows),
        "report.html": render_study(outputs, command),
    }
    write_together(folder, files)


def write_records(outputs: Sequence[StudyOutput], folder: Path) -> int:
    """Copies what the runs recorded (recipe, curves, result, environment; no weights) to `folder`/runs; returns their number.

    What only this machine has a use for, folders of data and of the start, is left out of the environment.
    """
    outcomes = {outcome.folder: outcome for output in outputs for outcome in output.outcomes}
    for source, outcome in outcomes.items():
        kept = {key: value for key, value in outcome.environment.items() if key not in LOCAL}
        files = {name: (source / name).read_text("utf-8") for name in RECORDS if (source / name).is_file()}
        write_together(folder / "runs" / source.name, files | {"environment.json": json.dumps(kept, indent=2) + "\n"})
    return len(outcomes)


def rows_to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV; the values of all seeds are in one cell, separated by spaces."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "values": " ".join(map(repr, row["values"]))})
    return text.getvalue()


def study_environment(outputs: Sequence[StudyOutput]) -> dict[str, Any]:
    """Versions and hardware: of the runs where there are any, else of this process."""
    recorded = (outcome.environment for output in outputs for outcome in output.outcomes)
    first = next(filter(None, recorded), None) or environment()
    return {key: value for key, value in first.items() if key not in LOCAL} | {"code": source_hash()}


def render_study(outputs: Sequence[StudyOutput], command: str) -> str:
    """The page as HTML: one study, or several with a front page."""
    numbers: dict[str, Any] = {
        "figure": format_figure,
        "evidence": format_evidence,
        "share": format_budget,
        "estimate": format_estimate,
    }
    setting = outputs[0].setting
    return render_page(
        "study.html.j2",
        numbers,
        title=outputs[0].study.name if len(outputs) == 1 else "all studies",
        studies=[
            {
                "name": output.study.name,
                "question": output.study.question,
                "place": output.study.place,
                "result": output.result,
                "rows": output.rows,
                "runs": [run_row(outcome) for outcome in output.outcomes],
            }
            for output in outputs
        ],
        data=sources.short_name(setting.data),
        seeds=setting.seeds,
        budget=budget_label(outputs),
        command=command,
        environment=study_environment(outputs),
    )


def budget_label(outputs: Sequence[StudyOutput]) -> str | None:
    """The label of runs that are shorter than the paper's; None where they are not, or where nothing was trained."""
    setting = outputs[0].setting
    if not any(output.outcomes for output in outputs) or abs(setting.share - 1) < 0.001:
        return None
    return f"budget {setting.budget}: {describe_study_budget(setting)}"


def describe_study_budget(setting: Setting) -> str:
    """A budget in words: its steps and its share of the paper's epochs."""
    base = setting.base
    return f"{format_count(base.steps, 'step')} of {base.batch}, {format_share(setting.share)} of the paper's epochs"


def run_row(outcome: RunOutcome) -> dict[str, Any]:
    """One run, as the page lists it."""
    return {
        "label": outcome.trial.label,
        "seed": outcome.seed,
        "folder": outcome.folder.name,
        "seconds": outcome.result.get("seconds"),
        "training_error": outcome.training_error,
        "test_error": outcome.test_error,
        "diverged": outcome.diverged,
    }


def format_figure(value: float | None, unit: str) -> str:
    """A figure by its unit: "8.75 %", "269,722", "1.81e9", "0.123"."""
    if value is None:
        return "–"
    if unit == "error":
        return unbreakable(format_percent(value))
    if unit == "count":
        return f"{value:,.0f}"
    if value and not 1e-3 <= abs(value) < 1e4:
        return f"{value:.2g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def format_evidence(row: Mapping[str, Any], key: str) -> str:
    """A difference with its interval and n, for a table: "+2.31 % (1.20 % to 3.42 %), n = 3"; "–" where there is none."""
    if row[key] is None:
        return "–"

    def number(value: float) -> str:
        return f"{'−' * (value < 0)}{format_figure(abs(value), row['unit'])}"

    low, high, n = (row[f"{key}_{end}"] for end in ("low", "high", "n"))
    interval = "no interval" if low is None else f"{number(low)} to {number(high)}"
    return f"{'+' * (row[key] > 0)}{number(row[key])} ({interval}), n = {n}"


def format_budget(value: float | None) -> str:
    """A budget as a share of the paper's."""
    return "–" if value is None else unbreakable(format_share(value))
