"""The report of a training run: one HTML file that needs nothing but itself (its layout is pages/report.html.j2)."""

from __future__ import annotations

import shlex
from ast import literal_eval
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from residuum.data.reading import Views
from residuum.evaluation import figures
from residuum.evaluation.heat import Look
from residuum.evaluation.metrics import Judgement, wilson
from residuum.evaluation.page import between, pages
from residuum.training.curves import curves

MISTAKES = 24  # pictures shown at most
PAIRS = 12  # rows of confused classes shown at most
LOOKS = 6  # heat maps of right pictures, and of wrong ones
CLASSES = 24  # rows of classes shown at once; the others fold away


def render(
    *,
    title: str,
    recipe: Mapping[str, Any],
    differences: Sequence[str],
    budget: str | None,
    metrics: Sequence[Mapping[str, Any]],
    judgement: Judgement,
    images: Tensor | Views,
    looks: Sequence[Look] = (),
    environment: Mapping[str, Any],
    result: Mapping[str, Any],
) -> str:
    """The report as HTML.

    Args:
        title: network and data, "resnet14 on digits".
        recipe: every value of it, resolved.
        differences: what it changes in the recipe it is named after, each "key = value (not value)".
        budget: the label of a run that is not as long as its recipe; None where it is.
        metrics: the lines of metrics.jsonl; may be empty.
        judgement: of the test split, by the last iterate.
        images: the test pictures, uint8 (N, h, w, C), in the judgement's order.
        looks: some of them with heat maps.
        environment: versions and hardware.
        result: what the run ended with; errors are fractions, `held_out_error` None where nothing was held out.
    """
    templates = pages()
    templates.filters |= {"duration": duration, "plain": plain}
    confusion, n = judgement.confusion, int(result["n"])
    rows = figures.class_rows(judgement.classes, confusion)
    page = templates.get_template("report.html.j2").render(
        title=title,
        recipe=recipe,
        recipe_rows=recipe_rows(recipe, differences),
        changed=len(differences),
        budget=budget,
        judgement=judgement,
        environment=environment,
        result=result,
        interval=between(*wilson(float(result["top1_error"]), n), n),
        wrong=round(float(result["top1_error"]) * n),
        curves=curves(metrics, recipe, result),
        matrix=figures.confusion_svg(judgement.classes, confusion) if len(rows) <= figures.LARGEST_MATRIX else None,
        pairs=figures.confused_pairs(judgement.classes, confusion, PAIRS),
        classes=rows,
        worst_classes=sorted(rows, key=lambda row: -(row.error or 0))[:CLASSES],
        mistakes=figures.mistakes(judgement, images, MISTAKES),
        looks=looks,
        commands=commands(recipe, result),
    )
    return page.encode(
        errors="replace"
    ).decode()  # a file name that is no UTF-8 must not keep the page from being written


def render_running(
    *,
    title: str,
    recipe: Mapping[str, Any],
    differences: Sequence[str],
    budget: str | None,
    metrics: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
    run: str,
) -> str:
    """The page of a run that goes on, as HTML that loads itself anew every half minute; arguments as for `render`."""
    templates = pages()
    templates.filters |= {"duration": duration, "plain": plain}
    train = [line for line in metrics if line["kind"] == "train"]
    held_out = [line for line in metrics if line["kind"] == "held_out"]
    return templates.get_template("running.html.j2").render(
        title=title,
        recipe=recipe,
        recipe_rows=recipe_rows(recipe, differences),
        budget=budget,
        curves=curves(metrics, recipe, None),
        last=train[-1] if train else None,
        held_out=held_out[-1] if held_out else None,
        environment=environment,
        run=run,
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them: "14.2 s", "3 min 12 s", "2 h 13 min"."""
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest}\u00a0s"
    return f"{minutes // 60:,}\u00a0h {minutes % 60}\u00a0min"


def plain(value: Any) -> str:
    """A value of the recipe or the environment, written as `--set` takes it."""
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case Mapping():
            return ", ".join(f"{key}={plain(item)}" for key, item in value.items()) or "none"
        case list() | tuple():
            return ", ".join(map(plain, value)) or "none"
    return str(value)


def recipe_rows(recipe: Mapping[str, Any], differences: Sequence[str]) -> list[tuple[str, str, str | None]]:
    """The recipe as rows of key, value, and the named recipe's value where it is another ("100" of "lr = 1 (not 100)")."""
    others = {}
    for text in differences:
        key, _, values = text.partition(" = ")
        other = values.rpartition(" (not ")[2].removesuffix(")")
        try:
            others[key] = plain(literal_eval(other))
        except (ValueError, SyntaxError):
            others[key] = other
    return [(key, plain(value), others.get(key)) for key, value in recipe.items()]


def commands(recipe: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    """What to type next, to use the model."""
    model = shlex.quote(str(result["model"]))
    return [
        f"residuum predict {model} PICTURE...",
        f"residuum explain {model} PICTURE...",
        f"residuum evaluate {model} --data {shlex.quote(str(recipe.get('data', 'DATA')))}",
    ]
