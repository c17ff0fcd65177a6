"""Several runs on one page: their figures, the differences of their recipes, and their curves (pages/runs.html.j2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from resnetlab.evaluation import figures
from resnetlab.evaluation.page import render_page
from resnetlab.formatting import format_duration
from resnetlab.run_folder import RunFolder, read_metrics
from resnetlab.training.curves import curve_points
from resnetlab.training.report import format_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_RUNS = len(figures.SERIES)


def compare_recipes(runs: Sequence[RunFolder]) -> dict[str, list[str]]:
    """The values in which the recipes differ: key -> the value of each run, "–" where it has none."""
    recipes = [run.read_recipe() for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    values = {key: [format_value(recipe[key]) if key in recipe else "–" for recipe in recipes] for key in keys}
    return {key: row for key, row in values.items() if len(set(row)) > 1}


def render_comparison(
    runs: Sequence[RunFolder], summaries: Sequence[Mapping[str, Any]], differences: Mapping[str, Sequence[str]]
) -> str:
    """The page as HTML.

    Args:
        summaries: of each run, the figures for the table.
        differences: of `compare_recipes`.
    """
    metrics = [read_metrics(run) for run in runs]
    names = [str(summary["run"]) for summary in summaries]
    measures = {
        "Training loss": ("train", "loss"),
        "Training error": ("train", "error"),
        "Held-out loss": ("held_out", "loss"),
        "Held-out error": ("held_out", "top1_error"),
        "Held-out label error": ("held_out", "label_error"),
        "Held-out mAP": ("held_out", "map"),
        "Held-out 1 - mAP": ("held_out", "map_error"),  # of several classes per image
        "Held-out mean IoU": ("held_out", "mean_iou"),
    }
    curves = {}
    for title, (kind, key) in measures.items():
        lines = [[line for line in run if line["kind"] == kind and key in line] for run in metrics]
        if any(lines):
            curves[title] = _draw([curve_points(run, key) for run in lines], title)
    values = {"runs": summaries, "names": names, "differences": differences, "curves": curves}
    return render_page("runs.html.j2", {"duration": format_duration}, **values)


def _draw(curves: Sequence[Sequence[tuple[float, float]]], title: str) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for colour, points in zip(figures.SERIES, curves, strict=False):
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.5) if points else None
        axes.set_ylim(bottom=0)
        axes.set_xlabel("step")
        figure.subplots_adjust(left=0.1, right=0.98, top=0.97, bottom=0.16)

    return figures.inline_svg(
        draw, width=720, height=280, name=title.lower().replace(" ", "-"), label=f"{title} by step."
    )
