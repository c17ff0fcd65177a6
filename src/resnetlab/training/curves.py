"""The curves of a training run, from metrics.jsonl: error and loss by step, with the changes of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from resnetlab.evaluation import figures
from resnetlab.evaluation.metrics import wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]  # step, value

POINTS = 600  # of a curve; neighbours are averaged where a run has more
TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)  # of an error, where there is room


def draw_curves(
    metrics: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], result: Mapping[str, Any] | None
) -> dict[str, tuple[str, str]] | None:
    """The figures "error" and "loss" as inline SVG, each (wide, narrow); None where no step was recorded.

    Args:
        result: None for an unfinished run.
    """
    train = [line for line in metrics if line["kind"] == "train"]
    held_out = [line for line in metrics if line["kind"] == "held_out"]
    if not train and not held_out:
        return None
    stepwise = recipe.get("schedule") != "cosine"  # a cosine changes at every step, so it has no marks
    marks = learning_rate_changes(train, recipe.get("milestones", ())) if stepwise else []
    several = any("label_error" in line for line in held_out) or bool(result and "mean_ap" in result)
    key = "label_error" if several else "top1_error"
    error = curve_points(train, "error"), curve_points(held_out, key)
    losses = curve_points(train, "loss"), curve_points(held_out, "loss")
    loss = [[point for point in points if point[1] > 0] for points in losses]  # the axis is logarithmic
    steps = float(result["steps"] if result else recipe["steps"])
    test = float(result[key]) if result else math.nan
    interval = () if result is None else (test, test) if several else wilson_interval(test, int(result["n"]))
    last = max(steps, *(float(line["step"]) for line in metrics))

    def draw_error(figure: Figure) -> None:
        axes = _add_axes(figure, last, marks)
        _set_error_scale(axes, max([*interval, *(value for _, value in error[0] + error[1])]))
        _plot_lines(axes, *error)
        if not result:
            return
        axes.plot([steps, steps], interval, color=figures.INK, linewidth=1.5, clip_on=False, zorder=5)
        axes.plot(
            steps, test, "D", color=figures.INK, markeredgecolor=figures.CARD, markersize=8, clip_on=False, zorder=6
        )

    def draw_loss(figure: Figure) -> None:
        axes = _add_axes(figure, last, marks)
        _set_loss_scale(axes, [value for _, value in loss[0] + loss[1]])
        _plot_lines(axes, *loss)

    label = f"by step, 0 to {last:,.0f}: training as a thin line, held-out images as a heavier one"
    end = ", the test error as a diamond at the end" if result else ""
    return {
        "error": _draw_wide_and_narrow(
            draw_error, 330, "error", f"{'Label' if several else 'Top-1'} error {label}{end}."
        ),
        "loss": _draw_wide_and_narrow(draw_loss, 210, "loss", f"Loss {label}."),
    }


def curve_points(lines: Iterable[Mapping[str, Any]], key: str, limit: int = POINTS) -> list[Point]:
    """The points of a curve, neighbours averaged until there are at most `limit`."""
    points = [(float(line["step"]), float(line[key])) for line in lines if math.isfinite(line[key])]
    size = math.ceil(len(points) / limit) or 1
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def learning_rate_changes(train: Sequence[Mapping[str, Any]], milestones: Iterable[int]) -> list[Point]:
    """The steps at which a learning rate began, the first of them 0, with that rate.

    A line has the rate of its last step only, so a change is between two lines: at the milestone there, if there is one.
    """
    changes = [(0.0, float(line["lr"])) for line in train[:1]]
    for before, after in pairwise(train):
        if before["lr"] != after["lr"]:
            between = [m for m in milestones if before["step"] <= m < after["step"]]
            changes.append((float(between[-1] if between else before["step"]), float(after["lr"])))
    return changes


def _draw_wide_and_narrow(draw: Callable[[Figure], None], height: int, name: str, label: str) -> tuple[str, str]:
    """A figure for desktops and one for phones, with text of the same size."""
    wide = figures.inline_svg(draw, width=848, height=height, name=f"{name}-wide", label=label)
    return wide, figures.inline_svg(draw, width=360, height=height - 20, name=f"{name}-narrow", label=label)


def _add_axes(figure: Figure, last: float, marks: Sequence[Point]) -> Axes:
    """Axes over the steps, margins in pixels, with the changes of the learning rate marked."""
    from matplotlib.ticker import MaxNLocator

    width, height = figure.get_size_inches() * 72
    axes = figure.add_axes((50 / width, 26 / height, 1 - 66 / width, 1 - 52 / height))
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(10 if width > 500 else 4, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    pixels = (width - 66) / last
    for (step, rate), (following, _) in pairwise([*marks, (math.inf, 0.0)]):
        if step:
            axes.axvline(step, color=figures.MUTED, linewidth=1, linestyle=(0, (2, 3)), zorder=1)
        if (following - step) * pixels > 60:  # else the labels would overlap
            align = "left" if not step else "right" if (last - step) * pixels < 24 else "center"
            transform = axes.get_xaxis_transform()
            axes.text(step, 1.03, f"lr {rate:g}", transform=transform, color=figures.MUTED, fontsize=11, ha=align)
    return axes


def _set_error_scale(axes: Axes, largest: float) -> None:
    """A square-root scale from 0: small errors have room, and noise looks as wide at 1 % as at 50 %."""
    top = min(1.0, 1.05 * largest) or 0.01
    axes.set_yscale("function", functions=(lambda v: v.clip(0) ** 0.5, lambda v: v**2))
    axes.set_ylim(0, top)
    ticks = [0.0]
    for tick in TICKS:
        if tick <= top and tick**0.5 - ticks[-1] ** 0.5 > 0.09 * top**0.5:
            ticks.append(tick)
    axes.set_yticks(ticks, [f"{100 * tick:g} %" for tick in ticks])


def _set_loss_scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic scale with a few plain numbers on it."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values, default=0.1), max(values, default=1.0)
    axes.set_yscale("log")
    axes.set_ylim(low / 1.2, high * 1.2)
    narrow = high < 100 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _plot_lines(axes: Axes, train: Iterable[Point], held_out: Iterable[Point]) -> None:
    """The two curves: training thin, held-out heavy; few points get markers, so that a single one is visible."""
    for points, colour, width in ((list(train), figures.TRAIN, 1.1), (list(held_out), figures.HELD_OUT, 2.0)):
        marker = "o" if len(points) == 1 or (colour == figures.HELD_OUT and len(points) <= 40) else None
        axes.plot(
            *zip(*points, strict=True) if points else ((), ()),
            color=colour,
            linewidth=width,
            marker=marker,
            markersize=4.5,
        )
