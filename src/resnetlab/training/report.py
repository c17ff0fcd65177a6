"""The report of a run: one self-contained HTML file, laid out by a template of pages/."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.device import DeviceConfig, default_precision
from resnetlab.evaluation import figures
from resnetlab.evaluation.gradcam import CamOverlay
from resnetlab.evaluation.metrics import ClassificationMetrics, wilson_interval
from resnetlab.evaluation.multi_label import MultiLabelMetrics, describe_thresholds
from resnetlab.evaluation.page import format_interval, render_page
from resnetlab.formatting import format_duration, unbreakable
from resnetlab.run_folder import RunFolder, read_metrics
from resnetlab.training import recipes
from resnetlab.training.curves import curve_points, draw_curves
from resnetlab.training.recipe import BaseRecipe
from resnetlab.training.result import ClassificationResult, MultiLabelResult, TrainResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OVERLAYS = 6  # heat maps of correct images, and of wrong ones
MAX_IMAGES = 12  # with a detector's or segmenter's predictions


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What the page of any run shows, finished or not.

    Attributes:
        title: network and data, "resnet14 on digits".
        recipe: every value of it, resolved.
        differences: the values of the recipe that it is named after, by key, where they are others.
        budget: the label of a run that is shorter than its recipe; None where it is not.
        metrics: the lines of metrics.jsonl; may be empty.
        environment: versions and hardware.
    """

    title: str
    recipe: Mapping[str, Any]
    differences: Mapping[str, Any]
    budget: str | None
    metrics: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]

    @classmethod
    def from_run(
        cls,
        run: RunFolder,
        title: str,
        recipe: BaseRecipe,
        device_config: DeviceConfig,
        start_size: Mapping[str, int] | None = None,
    ) -> Self:
        """The description of a run in its folder; see `recipes.find_named`."""
        precision = default_precision(device_config.device)
        return cls(
            title=title,
            recipe=recipe.to_json(),
            differences=recipe.other_values(recipes.find_named(recipe, precision, start_size)),
            budget=recipes.describe_run_budget(run, recipe),
            metrics=read_metrics(run),
            environment=run.read_json("environment.json") or {},
        )

    def render(self, template: str, **values: Any) -> str:
        """A page of pages/, as HTML: the description, and what the template shows beside it."""
        filters = {"duration": format_page_duration, "plain": format_value}
        others = {key: format_value(value) for key, value in self.differences.items()}
        rows = [(key, format_value(value), others.get(key)) for key, value in self.recipe.items()]
        return render_page(template, filters, **vars(self), recipe_rows=rows, changed=len(others), **values)


def render_report(
    description: RunDescription,
    result: ClassificationResult,
    evaluation: ClassificationMetrics,
    images: Tensor | PreprocessedSplit,
    overlays: Sequence[CamOverlay] = (),
    holds: str = "",
) -> str:
    """The report as HTML.

    Args:
        evaluation: the metrics of the test split.
        images: the test images, uint8 (N, h, w, C), in the order of `evaluation`.
        overlays: heat maps of some of them.
        holds: a sentence on the images in the model file.
    """
    rows, figures_of_run = figures.class_rows(evaluation), result.to_json()
    matrix = (
        figures.confusion_svg(evaluation.classes, evaluation.confusion) if len(rows) <= figures.MAX_MATRIX else None
    )
    model, data = shlex.quote(result.model), shlex.quote(str(description.recipe.get("data", "DATA")))
    return description.render(
        "report.html.j2",
        evaluation=evaluation,
        result=figures_of_run,
        interval=format_interval(*wilson_interval(result.top1_error, result.n), result.n),
        wrong=round(result.top1_error * result.n),
        curves=draw_curves(description.metrics, description.recipe, figures_of_run),
        matrix=matrix,
        pairs=figures.confused_pairs(evaluation),
        classes=rows,
        worst_classes=sorted(rows, key=lambda row: -(row.error or 0))[: figures.CLASSES],
        mistakes=figures.worst_mistakes(evaluation, images),
        prototypes=figures.class_prototypes(evaluation, images),
        overlays=overlays,
        holds=holds,
        commands=[
            f"resnetlab predict {model} IMAGE...",
            f"resnetlab explain {model} IMAGE...",
            f"resnetlab evaluate {model} --data {data}",
        ],
    )


def render_multi_label_report(
    description: RunDescription,
    result: MultiLabelResult,
    evaluation: MultiLabelMetrics,
    holds: str,
    calibration: Mapping[str, Any],
) -> str:
    """The report of a run whose images have several classes, or none, as HTML; `calibration` is that of the model."""
    model, data = shlex.quote(result.model), shlex.quote(str(description.recipe.get("data", "DATA")))
    return description.render(
        "multi_label.html.j2",
        figures=evaluation.to_json(),
        n=evaluation.n,
        split=result.split,
        curves=draw_curves(description.metrics, description.recipe, result.to_json()),
        calibration=describe_thresholds(calibration),
        notes=[holds],
        options={},
        commands=[f"resnetlab predict {model} IMAGE...", f"resnetlab evaluate {model} --data {data}"],
    )


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


def render_progress(description: RunDescription, run: str) -> str:
    """The page of an unfinished run, as HTML that reloads every half minute."""
    train = [line for line in description.metrics if line["kind"] == "train"]
    held_out = [line for line in description.metrics if line["kind"] == "held_out"]
    return description.render(
        "running.html.j2",
        curves=draw_curves(description.metrics, description.recipe, None),
        last=train[-1] if train else None,
        held_out=held_out[-1] if held_out else None,
        run=run,
    )


def format_page_duration(seconds: float) -> str:
    """A duration on a page: "14.2 s", "3 min 12 s"."""
    return unbreakable(format_duration(seconds, 1))


def format_value(value: Any) -> str:
    """A value of the recipe or the environment, in the syntax of `--set`."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case Mapping():
            return ", ".join(f"{key}={format_value(item)}" for key, item in value.items()) or "none"
        case list() | tuple():
            return ", ".join(map(format_value, value)) or "none"
    return str(value)
