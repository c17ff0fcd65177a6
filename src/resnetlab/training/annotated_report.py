"""The report of a detector's or segmenter's run: one self-contained HTML file (pages/annotated.html.j2)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from resnetlab.evaluation import figures
from resnetlab.training.curves import curve_points
from resnetlab.training.report import RunDescription
from resnetlab.training.result import TrainResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_IMAGES = 12  # in a report


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary:
    """What the report shows of the evaluation.

    Attributes:
        merit, lead: the headline metric, and a sentence on what was measured.
        columns: (key, heading) of the per-class table; floats are fractions.
        images: (name, data URI) of the first evaluated images, with predictions.
        curve: an inline SVG beside the table, such as precision against recall.
        caption: what the images show.
    """

    merit: str
    lead: str
    columns: Sequence[tuple[str, str]]
    images: Sequence[tuple[str, str]]
    curve: str | None = None
    caption: str


def render_annotated_report(
    description: RunDescription, task: str, result: TrainResult, summary: EvaluationSummary
) -> str:
    """Renders the report as HTML."""
    model, data = shlex.quote(result.model), shlex.quote(description.recipe["data"])
    return description.render(
        "annotated.html.j2",
        **vars(summary),
        result=result.to_json(),
        learning=learning_curve_svg(description.metrics),
        commands=[f"resnetlab {task} predict {model} IMAGE...", f"resnetlab {task} evaluate {model} --data {data}"],
    )


def learning_curve_svg(metrics: Sequence[Mapping[str, Any]]) -> str | None:
    """Loss by step, and a held-out metric if there is one, as inline SVG; None if no step was logged."""
    train = [line for line in metrics if line["kind"] == "train"]
    held_out = [line for line in metrics if line["kind"] == "held_out"]
    if not train:
        return None
    metric = next((key for key in held_out[0] if key not in ("kind", "step")), "") if held_out else ""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.07, 0.1, 0.86, 0.84))
        axes.plot(*zip(*curve_points(train, "loss"), strict=True), color=figures.TRAIN, linewidth=1.4)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("loss")
        if metric:
            other = axes.twinx()
            other.plot(*zip(*curve_points(held_out, metric), strict=True), "o-", color=figures.HELD_OUT)
            other.set_ylim(0, 1)
            other.set_ylabel(metric)

    suffix = f", and {metric} on held-out images" if metric else ""
    return figures.inline_svg(draw, width=848, height=300, name="learning", label=f"Training loss by step{suffix}.")
