"""The page of an evaluation: one self-contained HTML file (its layout is pages/evaluation.html.j2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.evaluation import figures
from resnetlab.evaluation.calibration import reliability_bins
from resnetlab.evaluation.evaluate import Evaluation, MultiLabelEvaluation
from resnetlab.evaluation.metrics import ClassificationMetrics, wilson_interval
from resnetlab.evaluation.multi_label import describe_thresholds
from resnetlab.formatting import (
    format_count,
    format_figure,
    format_json,
    format_percent,
    format_split,
    format_split_of,
    unbreakable,
)
from resnetlab.run_folder import write_together

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure


@cache
def load_templates(**filters: Callable[..., Any]) -> Environment:
    """The templates, with filters for numbers and the given ones; each is compiled once."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("resnetlab", "pages")
    templates = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    templates.filters |= {
        "percent": format_rate,
        "count": "{:,.0f}".format,
        "counted": format_count,
        "split_name": format_split,
        "split_of": format_split_of,
        "figure": format_figure,
        "plain": str,
        **filters,
    }
    return templates


def render_page(template: str, filters: Mapping[str, Callable[..., Any]] | None = None, **values: Any) -> str:
    """A page as HTML; `filters` are those of this template beside those of all."""
    page = load_templates(**(filters or {})).get_template(template).render(values)
    return page.encode(errors="replace").decode()  # a file name may not be valid UTF-8


def format_rate(rate: float | None, n: int = 0) -> str:
    """A rate in per cent, with two decimals where `n` images justify them: "0.6 %" of 360, "8.75 %" of 10,000."""
    return "–" if rate is None else unbreakable(format_percent(rate, 2 if n >= 1000 else 1))


def format_interval(low: float, high: float, n: int) -> str:
    """An interval of fractions in per cent: "0.2 to 2.0 %"."""
    return unbreakable(f"{format_rate(low, n)[:-2]} to {format_rate(high, n)}")


def write_evaluation(evaluation: Evaluation, folder: Path) -> None:
    """Writes evaluation.json, evaluation.html and, with corrupted images, corruptions.csv.

    Raises RunError where there is no space or no permission.
    """
    figures = format_json(evaluation.to_json()) + "\n"
    files = {"evaluation.json": figures, "evaluation.html": render_evaluation(evaluation)}
    if evaluation.corruptions:
        files["corruptions.csv"] = evaluation.corruptions.to_csv()
    write_together(folder, files)


def render_evaluation(evaluation: Evaluation) -> str:
    """The page as HTML."""
    if isinstance(evaluation, MultiLabelEvaluation):
        return _render_multi_label(evaluation)
    metrics, n = evaluation.metrics, evaluation.n
    rows = figures.class_rows(metrics)
    with_images = [row for row in rows if row.n]
    images = PreprocessedSplit(evaluation.images, evaluation.trained_models[0].preprocessing)
    names = evaluation.images.names
    paths = [Path(name).name for name in evaluation.models] if len(evaluation.models) > 1 else evaluation.models
    return render_page(
        "evaluation.html.j2",
        title=" + ".join(paths),
        figures=evaluation.to_json(),
        calibration=[sentence[0].upper() + sentence[1:] for sentence in evaluation.calibration],
        n=n,
        interval=format_interval(*wilson_interval(metrics.top1_error, n), n),
        wrong=int((~metrics.right).sum()),
        matrix=figures.confusion_svg(metrics.classes, metrics.confusion) if len(rows) <= figures.MAX_MATRIX else None,
        diagram=draw_reliability(metrics),
        pairs=figures.confused_pairs(metrics),
        classes=sorted(with_images, key=lambda row: -(row.error or 0))[: figures.CLASSES],
        total_classes=len(with_images),
        show_top5=len(rows) > 5,
        scope=evaluation.scope,
        mistakes=[(names[m.index], m) for m in figures.worst_mistakes(metrics, images)],
        prototypes=figures.class_prototypes(metrics, images),
        names=names,
    )


def _render_multi_label(evaluation: MultiLabelEvaluation) -> str:
    """The page of several classes per image."""
    return render_page(
        "multi_label.html.j2",
        title=f"{evaluation.models[0]} on {evaluation.data}",
        figures=evaluation.to_json(),
        n=evaluation.n,
        split=evaluation.split,
        calibration=describe_thresholds(evaluation.trained_models[0].calibration),
        notes=[f"{note}." for note in evaluation.notes],
        options={"protocol": evaluation.protocol, **evaluation.protocol_options[0]},
        curves=None,
        budget=None,
        recipe_rows=(),
        environment={},
    )


def draw_reliability(metrics: ClassificationMetrics) -> str:
    """The reliability diagram as inline SVG: accuracy and number of the predictions by confidence."""
    bins = [each for each in reliability_bins(metrics.confidence, metrics.right) if each.n]

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
        top.plot([0, 1], [0, 1], color=figures.MUTED, linewidth=1, linestyle=":")
        accuracy, low = [b.accuracy or 0 for b in bins], [b.low for b in bins]
        top.bar(low, accuracy, 1 / 15, align="edge", color=figures.HELD_OUT, alpha=0.35)
        top.plot([b.confidence or 0 for b in bins], accuracy, "o-", color=figures.HELD_OUT)
        top.set_ylim(0, 1)
        top.set_ylabel("accuracy")
        bottom.bar(low, [b.n / metrics.n for b in bins], 1 / 15, align="edge", color=figures.TRAIN)
        bottom.set_xlim(0, 1)
        bottom.set_ylabel("share")
        bottom.set_xlabel("confidence")
        figure.subplots_adjust(left=0.13, right=0.98, top=0.97, bottom=0.13, hspace=0.15)

    error = f"{metrics.calibration_error:.4f}"
    label = f"Reliability diagram: share of correct predictions by confidence; expected calibration error {error}."
    return figures.inline_svg(draw, width=440, height=380, name="reliability", label=label)
