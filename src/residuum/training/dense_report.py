"""The report of a detector's or segmenter's run: one HTML file that needs nothing but itself (pages/dense.html.j2)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from residuum.evaluation import figures
from residuum.evaluation.page import pages
from residuum.records import Run, read_metrics
from residuum.runtime import automatic_precision
from residuum.tasks.task import Task
from residuum.training import recipes
from residuum.training.curves import series
from residuum.training.recipe import Training
from residuum.training.report import duration, plain, recipe_rows
from residuum.training.result import Ended

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = 12  # shown at most


def render(
    task: Task,
    recipe: Training,
    run: Run,
    result: Ended,
    *,
    title: str,
    merit: str,
    lead: str,
    columns: Sequence[tuple[str, str]],
    pictures: Sequence[tuple[str, str]],
    curve: str | None,
    caption: str,
) -> str:
    """The report as HTML.

    Args:
        merit, lead: the figure to see first, and a sentence on what was measured.
        columns: (key, heading) of the per-class table; a number that is no count is a fraction.
        pictures: (name, data URI) of the first ones judged, with what was found.
        curve: an inline SVG beside the table, such as precision by recall.
        caption: what the pictures show.
    """
    templates = pages()
    templates.filters |= {"duration": duration, "plain": plain}
    differences = recipes.changes(recipe, automatic_precision(task.engine.device))
    model, data = shlex.quote(result.model), shlex.quote(recipe.data)
    page = templates.get_template("dense.html.j2").render(
        title=title,
        merit=merit,
        lead=lead,
        result=result.to_json(),
        columns=columns,
        pictures=pictures,
        curve=curve,
        caption=caption,
        learning=learning(read_metrics(run)),
        recipe=recipe.to_json(),
        recipe_rows=recipe_rows(recipe.to_json(), differences),
        changed=len(differences),
        environment=run.read_json("environment.json") or {},
        commands=[
            f"residuum {recipe.task} predict {model} PICTURE...",
            f"residuum {recipe.task} evaluate {model} --data {data}",
        ],
    )
    return page.encode(
        errors="replace"
    ).decode()  # a file name that is no UTF-8 must not keep the page from being written


def learning(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss by step, and the held-out figure where there is one, as inline SVG; None where no step was recorded."""
    train = [line for line in metrics if line["kind"] == "train"]
    held_out = [line for line in metrics if line["kind"] == "held_out"]
    if not train:
        return None
    watched = next((key for key in held_out[0] if key not in ("kind", "step")), "") if held_out else ""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.07, 0.1, 0.86, 0.84))
        axes.plot(*zip(*series(train, "loss"), strict=True), color=figures.TRAIN, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("loss")
        if watched:
            other = axes.twinx()
            other.plot(*zip(*series(held_out, watched), strict=True), "o-", color=figures.HELD_OUT)
            other.set_ylim(0, 1)
            other.set_ylabel(watched)

    words = f", and {watched} on held-out pictures" if watched else ""
    return figures.inline_svg(draw, width=848, height=300, name="learning", label=f"Training loss by step{words}.")
