"""The report of a training run: one self-contained HTML file (its layout is pages/report.html.j2)."""

from __future__ import annotations

import shlex
from ast import literal_eval
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.evaluation import figures
from resnetlab.evaluation.gradcam import CamOverlay
from resnetlab.evaluation.metrics import ClassificationMetrics, wilson_interval
from resnetlab.evaluation.page import format_interval, load_templates
from resnetlab.formatting import format_duration, unbreakable
from resnetlab.training.curves import draw_curves

MISTAKES = 24  # images shown at most
PAIRS = 12  # rows of confused classes shown at most
OVERLAYS = 6  # heat maps of correct images, and of wrong ones
CLASSES = 24  # rows of classes shown at first; the others are folded


def render_report(
    *,
    title: str,
    recipe: Mapping[str, Any],
    differences: Sequence[str],
    budget: str | None,
    metrics: Sequence[Mapping[str, Any]],
    evaluation: ClassificationMetrics,
    images: Tensor | PreprocessedSplit,
    overlays: Sequence[CamOverlay] = (),
    environment: Mapping[str, Any],
    result: Mapping[str, Any],
) -> str:
    """The report as HTML.

    Args:
        title: network and data, "resnet14 on digits".
        recipe: every value of it, resolved.
        differences: what it changes in the recipe it is named after, each "key = value (not value)".
        budget: the label of a run that is shorter than its recipe; None where it is not.
        metrics: the lines of metrics.jsonl; may be empty.
        evaluation: the metrics of the test split, by the last iterate.
        images: the test images, uint8 (N, h, w, C), in the order of `evaluation`.
        overlays: heat maps of some of them.
        environment: versions and hardware.
        result: the figures that the run ended with; errors are fractions, `held_out_error` None where nothing was held out.
    """
    templates = load_templates()
    templates.filters |= {"duration": format_page_duration, "plain": format_value}
    confusion, n = evaluation.confusion, int(result["n"])
    rows = figures.class_rows(evaluation.classes, confusion)
    page = templates.get_template("report.html.j2").render(
        title=title,
        recipe=recipe,
        recipe_rows=recipe_rows(recipe, differences),
        changed=len(differences),
        budget=budget,
        evaluation=evaluation,
        environment=environment,
        result=result,
        interval=format_interval(*wilson_interval(float(result["top1_error"]), n), n),
        wrong=round(float(result["top1_error"]) * n),
        curves=draw_curves(metrics, recipe, result),
        matrix=figures.confusion_svg(evaluation.classes, confusion) if len(rows) <= figures.MAX_MATRIX else None,
        pairs=figures.confused_pairs(evaluation.classes, confusion, PAIRS),
        classes=rows,
        worst_classes=sorted(rows, key=lambda row: -(row.error or 0))[:CLASSES],
        mistakes=figures.worst_mistakes(evaluation, images, MISTAKES),
        overlays=overlays,
        commands=next_commands(recipe, result),
    )
    return page.encode(errors="replace").decode()  # a file name may not be valid UTF-8


def render_progress(
    *,
    title: str,
    recipe: Mapping[str, Any],
    differences: Sequence[str],
    budget: str | None,
    metrics: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    run: str,
) -> str:
    """The page of an unfinished run, as HTML that reloads every half minute; arguments as for `render_report`."""
    templates = load_templates()
    templates.filters |= {"duration": format_page_duration, "plain": format_value}
    train = [line for line in metrics if line["kind"] == "train"]
    held_out = [line for line in metrics if line["kind"] == "held_out"]
    return templates.get_template("running.html.j2").render(
        title=title,
        recipe=recipe,
        recipe_rows=recipe_rows(recipe, differences),
        budget=budget,
        curves=draw_curves(metrics, recipe, None),
        last=train[-1] if train else None,
        held_out=held_out[-1] if held_out else None,
        environment=environment,
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


def recipe_rows(recipe: Mapping[str, Any], differences: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """The recipe as rows of key, value, and the named recipe's value where it differs ("100" of "lr = 1 (not 100)")."""
    defaults = {}
    for text in differences:
        key, _, values = text.partition(" = ")
        default = values.rpartition(" (not ")[2].removesuffix(")")
        try:
            defaults[key] = format_value(literal_eval(default))
        except (ValueError, SyntaxError):
            defaults[key] = default
    return [(key, format_value(value), defaults.get(key)) for key, value in recipe.items()]


def next_commands(recipe: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """Commands that use the model."""
    model = shlex.quote(str(result["model"]))
    return [
        f"resnetlab predict {model} IMAGE...",
        f"resnetlab explain {model} IMAGE...",
        f"resnetlab evaluate {model} --data {shlex.quote(str(recipe.get('data', 'DATA')))}",
    ]
