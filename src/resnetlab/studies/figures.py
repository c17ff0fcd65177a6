"""The figures of a study, laid out as the papers' figures: inline SVG, a wide form for desktops and a narrow one for phones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from resnetlab.evaluation import figures
from resnetlab.evaluation.figures import SERIES as SERIES
from resnetlab.studies.runs import RunOutcome
from resnetlab.studies.verdicts import mean_sd
from resnetlab.training.curves import curve_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Panels = Sequence[Axes]

WIDE, NARROW = 848, 360  # pixels
CURVES = 4  # in one panel at most
LABEL = 84  # pixels to the right of a panel, for the names of its curves
POINTS = 120  # of a curve at most; neighbours are averaged where there are more
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class LegendKey:
    """An entry of a legend: the meaning of a colour or a kind of line."""

    text: str
    colour: str = "--ink"  # a CSS variable of pages/style.css
    line: str = "solid"  # "solid", "dashed", "dot"


@dataclass(frozen=True)
class StudyFigure:
    """A figure of a page; `wide` and `narrow` are SVG."""

    title: str
    wide: str
    narrow: str
    caption: str
    legend: Sequence[LegendKey] = ()


class FigureText(NamedTuple):
    """The words of a figure; `label` is for readers who cannot see it."""

    title: str
    caption: str
    label: str


class PanelLayout(NamedTuple):
    """How many panels, in how many rows of how many pixels; in the narrow form they are one below the other.

    `right` is the margin of a panel, in pixels: LABEL where curves are named there.
    """

    panels: int = 1
    rows: int = 1
    height: int = 300
    right: int = 12


def draw_study_figure(
    name: str,
    draw: Callable[[Panels], None],
    text: FigureText,
    layout: PanelLayout,
    legend: Sequence[LegendKey] = (),
) -> StudyFigure:
    """Draws a figure in its wide and its narrow form.

    Args:
        name: unique in the page.
        draw: draws on the panels' axes, left to right, row by row.
    """
    panels, rows, height, right = layout

    def draw_form(kind: str, width: int, columns: int, size: int) -> str:
        def draw_panels(figure: Figure) -> None:
            draw(_add_grid(figure, panels, columns, width, size, right))

        total = -(-panels // columns) * size
        return figures.inline_svg(draw_panels, width=width, height=total, name=f"{name}-{kind}", label=text.label)

    wide = draw_form("wide", WIDE, -(-panels // rows), height)
    return StudyFigure(text.title, wide, draw_form("narrow", NARROW, 1, min(height, 240)), text.caption, legend)


def _add_grid(figure: Figure, panels: int, columns: int, width: int, height: int, right: int) -> list[Axes]:
    """Axes with margins in pixels, for numbers on the left and below and a title above."""
    left, top, bottom = 46, 30, 34
    cell, total = width / columns, -(-panels // columns) * height
    axes = []
    for i in range(panels):
        row, column = divmod(i, columns)
        position = (
            (column * cell + left) / width,
            1 - ((row + 1) * height - bottom) / total,
            (cell - left - right) / width,
            (height - top - bottom) / total,
        )
        axes.append(figure.add_axes(position))
    return axes


def label_curves(axes: Axes, ends: Mapping[str, tuple[float, str]]) -> None:
    """Writes the names of curves to the right of a panel, at the heights where they end, one below the other.

    Args:
        ends: name -> (the curve's last value, its colour).
    """
    low, high = axes.get_ylim()
    scale = axes.yaxis.get_transform()
    bottom, top = scale.transform([low, high])
    wanted = {
        name: (scale.transform([max(value, low)])[0] - bottom) / (top - bottom) for name, (value, _) in ends.items()
    }
    free = 1.0
    for name, height in sorted(wanted.items(), key=lambda item: -item[1]):
        lines = name.replace(", ", ",\n")
        size = 0.075 * (1 + lines.count("\n"))
        y = max(min(height, free - size / 2), size / 2)
        axes.text(1.03, y, lines, transform=axes.transAxes, color=ends[name][1], fontsize=10.5, va="center")
        free = y - size / 2


def set_titles(axes: Axes, title: str, x: str = "") -> None:
    """Sets a panel's title and the label of its horizontal axis."""
    axes.set_title(title, loc="left", fontsize=12, pad=8)
    if x:
        axes.set_xlabel(x, fontsize=11, labelpad=3)


def set_error_axis(axes: Axes, top: float) -> None:
    """Makes the vertical axis one of errors, in per cent, from 0 to `top`."""
    from matplotlib.ticker import MaxNLocator

    axes.set_ylim(0, min(1.0, top))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def set_step_axis(axes: Axes, last: float) -> None:
    """Makes the horizontal axis one of training steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10], integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def set_log_axis(axes: Axes) -> None:
    """Makes the vertical axis logarithmic, a decade or more long, with plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 10 * low:
        middle = (low * high) ** 0.5
        low, high = middle / 10**0.5, middle * 10**0.5
        axes.set_ylim(low, high)
    subs = (1,) if high > 100 * low else (1, 2, 5)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def plot_learning(
    axes: Axes, title: str, networks: Mapping[str, Sequence[RunOutcome]], colours: Mapping[str, str]
) -> tuple[float, dict[str, tuple[float, str]]]:
    """Plots error by step as the papers do: training dashed and thin, held-out images bold, test as a diamond at the end.

    Each curve is the mean over seeds, with a band from the lowest to the highest of them.

    Returns:
        The largest error after the first fifth of the steps, a fraction, and what `label_curves` needs.
    """
    largest, last = 0.0, 1.0
    ends: dict[str, tuple[float, str]] = {}
    for label, outcomes in networks.items():
        finished = [o for o in outcomes if not o.diverged]
        for kind, key, style, width in (("train", "error", "--", 1.1), ("held_out", "top1_error", "-", 2.2)):
            lines = [[line for line in o.metrics if line["kind"] == kind] for o in finished]
            mean, low, high = _mean_and_range([curve_points(of_run, key, POINTS) for of_run in lines])
            if not mean:
                continue
            steps = [step for step, _ in mean]
            last = max(last, steps[-1])
            axes.plot(steps, [v for _, v in mean], style, color=colours[label], linewidth=width)
            axes.fill_between(steps, low, high, color=colours[label], alpha=0.12, linewidth=0)
            largest = max([largest, *(v for step, v in mean if step >= 0.2 * steps[-1])])
            ends[label] = mean[-1][1], colours[label]
        tests = [o.test_error for o in finished if o.test_error is not None]
        if tests:
            end = max(o.trial.recipe.steps for o in finished)
            mean_error, sd = mean_sd(tests)
            axes.errorbar(end, mean_error, sd or 0, color=colours[label], marker="D", markersize=6, capsize=0,
                          markeredgecolor=figures.CARD, clip_on=False, zorder=5)  # fmt: skip
            largest = max(largest, mean_error)
            ends[label] = mean_error, colours[label]
    set_step_axis(axes, last)
    set_titles(axes, title, "steps")
    return largest, ends


def plot_panels(panels: Panels, titles: Sequence[str], networks: Sequence[Mapping[str, Sequence[RunOutcome]]]) -> None:
    """Plots error by step in several panels of one scale, each of two networks at most (four curves), which it names.

    The first network of every panel has the same colour.
    """
    plotted = []
    for axes, title, nets in zip(panels, titles, networks, strict=True):
        colours = dict(zip(nets, SERIES, strict=False))
        plotted.append((axes, *plot_learning(axes, title, nets, colours)))
    for axes, _, ends in plotted:
        set_error_axis(axes, 1.1 * max(top for _, top, _ in plotted))
        label_curves(axes, ends)


LEARNING_KEYS = (
    LegendKey("training, augmented batches", line="dashed"),
    LegendKey("held out of the training images", line="solid"),
    LegendKey("test, once, at the end (± sd)", line="dot"),
)


def _mean_and_range(curves: Sequence[Points]) -> tuple[Points, list[float], list[float]]:
    """Mean, lowest and highest of curves over the same steps, up to the end of the shortest."""
    mean, low, high = [], [], []
    for points in zip(*curves, strict=False):
        values = [value for _, value in points]
        mean.append((points[0][0], sum(values) / len(values)))
        low.append(min(values))
        high.append(max(values))
    return mean, low, high


def plot_dots(
    axes: Axes, title: str, groups: Mapping[str, Sequence[float]], colours: Sequence[str] | None = None
) -> None:
    """Plots errors of networks, a line for each: mean as a diamond with standard deviation, every seed as a dot."""
    from matplotlib.ticker import MaxNLocator

    largest = max((value for values in groups.values() for value in values), default=1.0)
    for y, ((name, values), colour) in enumerate(zip(groups.items(), colours or SERIES * 3, strict=False)):
        axes.text(0, y - 0.22, name, fontsize=11)  # above its line, so that a long name needs no margin
        if not values:
            continue
        mean, sd = mean_sd(list(values))
        axes.plot(list(values), [y] * len(values), "o", color=colour, alpha=0.35, markersize=5, markeredgewidth=0)
        axes.errorbar(mean, y, xerr=sd or 0, color=colour, marker="D", markersize=7, capsize=0, elinewidth=1.6,
                      markeredgecolor=figures.CARD)  # fmt: skip
    axes.set_yticks(range(len(groups)), [""] * len(groups))
    axes.set_ylim(len(groups) - 0.6, -0.8)
    axes.set_xlim(0, 1.08 * largest or 0.01)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    set_titles(axes, title)
