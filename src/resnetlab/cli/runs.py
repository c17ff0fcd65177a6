"""`resnetlab runs` and `resnetlab runs compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts import App

from resnetlab.cli import console
from resnetlab.cli.options import Json
from resnetlab.errors import ResNetLabError, RunError, UsageError
from resnetlab.formatting import format_duration, format_figure, format_split, is_number

app = App(name="runs", help="List the runs in a folder with their figures; compare some of them on one page.")


@app.default
def list_runs(folder: Path = Path("runs"), /, *, json: Json = False) -> None:
    """List the runs in a folder with their figures.

    Example: `resnetlab runs`

    Parameters
    ----------
    folder
        A folder with run folders in it, at any depth.
    """
    if not folder.is_dir():
        run = Path("runs", folder)
        hint = f"did you mean {run}?" if run.is_dir() else "`resnetlab train` writes runs into the folder runs."
        raise UsageError(f"{folder} is not a folder; {hint}")
    found = [summarise_run(recipe.parent) for recipe in sorted(folder.rglob("recipe.toml"))]
    if json:
        return console.print_json({"runs": found})
    if not found:
        return console.write_line(f"no runs in {folder}; `resnetlab train` makes one")
    return print_runs(found)


@app.command
def compare(*runs: Path, out: Path = Path("runs-compared.html"), json: Json = False) -> None:
    """Compare runs: their figures, the values in which their recipes differ, and their curves, on one page.

    Example: `resnetlab runs compare runs/digits runs/digits-2`

    Parameters
    ----------
    runs
        Run folders, at most seven.
    out
        The page to write.
    """
    from resnetlab.run_folder import RunFolder, check_output_file, write_atomically
    from resnetlab.training.run_comparison import MAX_RUNS, compare_recipes, render_comparison

    if not 2 <= len(runs) <= MAX_RUNS:
        raise UsageError(f"runs compare needs from 2 to {MAX_RUNS} run folders, not {len(runs)}.")
    check_output_file(out, [run / name for run in runs for name in ("recipe.toml", "metrics.jsonl", "result.json")])
    folders = [RunFolder.open(run) for run in runs]
    summaries = [summarise_run(run.path) for run in folders]
    if broken := next((s for s in summaries if "error" in s), None):
        raise RunError(broken["error"])
    differences = compare_recipes(folders)
    write_atomically(out, render_comparison(folders, summaries, differences))
    console.log(f"page: {out}")
    if json:
        return console.print_json({"page": str(out), "runs": summaries, "differences": differences})
    print_runs(summaries)
    print()
    rows = [(key, *map(str, values)) for key, values in differences.items()]
    return console.print_table("", ("value", *(s["run"] for s in summaries)), rows)


def summarise_run(path: Path) -> dict[str, Any]:
    """The figures of a run for a table; "error" where its files cannot be read."""
    from resnetlab.run_folder import RunFolder, get_step, list_checkpoints, read_metrics

    run = RunFolder(path)
    try:
        recipe, result = run.read_recipe(), run.read_json("result.json")
        lines = read_metrics(run)
    except ResNetLabError as error:
        return {"run": str(path), "error": str(error)}
    if not is_number(recipe.get("steps")):
        return {"run": str(path), "error": f"{path / 'recipe.toml'} has no number of steps, so it is not a run's."}
    if missing := [key for key in ("steps", "seconds", "split") if result and key not in result]:
        return {
            "run": str(path),
            "error": f"{path / 'result.json'} lacks {', '.join(missing)}; `{run.resume_command}` writes it.",
        }
    steps = [*(line["step"] for line in lines), *map(get_step, list_checkpoints(run))]
    held_out = [line for line in lines if line["kind"] == "held_out"]
    summary = {
        "run": str(path),
        "task": recipe.get("task", "classify"),
        "net": recipe.get("net"),
        "data": recipe.get("data"),
        "step": result["steps"] if result else max(steps, default=0),
        "steps": recipe.get("steps"),
        "finished": result is not None,
        "seconds": result["seconds"] if result else max((line.get("seconds", 0.0) for line in lines), default=0.0),
    }
    figures = {k: v for k, v in (held_out[-1] if held_out else {}).items() if k not in ("kind", "step")}
    keys = ("top1_error", "mean_ap", "map", "map_50", "mean_iou")
    main = {key: result[key] for key in keys if key in result} if result else {}
    return summary | {"held_out": figures, "split": result and result["split"], "result": main}


def print_runs(summaries: list[dict[str, Any]]) -> None:
    """Prints a table of runs."""
    rows = []
    for s in summaries:
        if "error" in s:
            rows.append((s["run"], s["error"], "", "", "", "", ""))
            continue
        held_out = next(iter(s["held_out"].items()), None)
        figures = [f"{format_split(s['split'])} {format_figure(k, v)}" for k, v in s["result"].items()]
        rows.append(
            (
                s["run"],
                str(s["net"]),
                str(s["data"]),
                f"{s['step']:,}/{s['steps']:,}",
                format_duration(s["seconds"]),
                "–" if held_out is None else format_figure(*held_out),
                ", ".join(figures) if s["finished"] else "not finished",
            )
        )
    columns = ("run", "net", "data", "steps", "time", "while training", "result")
    console.print_table("", columns, rows, right=(3, 4))
