"""The figure of an explanation: the image, its heat map and the effect of each block, as a self-contained SVG."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from resnetlab.evaluation.figures import draw_svg, plot_style
from resnetlab.evaluation.gradcam import MIN_SIDE
from resnetlab.formatting import format_percent
from resnetlab.preprocessing import render_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from resnetlab.inference.explain import BlockEffect, Explanation

INK, MUTED, LINE, BLUE, ORANGE = "#1b1d21", "#5b6069", "#e4e2dc", "#1d5fb0", "#c9571c"
MAX_LABELS = 40  # blocks; with more, only the first of each stage is named
_STYLE: Any = plot_style(INK, MUTED, LINE) | {
    "svg.hashsalt": "explanation",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "ytick.color": LINE,
}


def draw_explanation(explanation: Explanation, name: str) -> str:
    """The figure as SVG text; equal explanations give equal text.

    Args:
        name: of the image, for the title.
    """

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(3, 3, height_ratios=(1.25, 1, 1), hspace=0.5, wspace=0.12)
        figure.subplots_adjust(left=0.08, right=0.97, top=0.92, bottom=0.11)
        figure.suptitle(_printable(name, 90), x=0.08, ha="left", fontsize=12)
        _draw_images([figure.add_subplot(grid[0, i]) for i in (0, 1)], explanation)
        _draw_scores(figure.add_subplot(grid[0, 2]), explanation)
        _draw_ratios(figure.add_subplot(grid[1, :]), explanation.blocks)
        _draw_lesions(figure.add_subplot(grid[2, :]), explanation)

    with warnings.catch_warnings():  # glyphs that are missing here may be in the fonts of the reader
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        return draw_svg(draw, _STYLE, (10, 8.4))


def _draw_images(axes: list[Axes], explanation: Explanation) -> None:
    image = render_pixels(explanation.pixels).convert("RGB")
    factor = -(-MIN_SIDE // min(image.size))
    panels = (image.resize((image.width * factor, image.height * factor), 0), explanation.overlay)
    for ax, panel, title in zip(axes, panels, ("as the network gets it", "where it looked (Grad-CAM)"), strict=True):
        ax.imshow(panel)
        ax.set_title(title, color=MUTED)
        ax.set_axis_off()


def _draw_scores(ax: Axes, explanation: Explanation) -> None:
    """The classes with the highest scores, as bars with their names above."""
    top = explanation.top[:5]
    ax.barh(range(len(top)), [score for _, score in top], height=0.22, color=[BLUE] + [MUTED] * (len(top) - 1))
    for i, (name, score) in enumerate(top):
        ax.text(0, i - 0.2, _printable(name, 26), va="bottom")
        ax.text(1, i - 0.2, format_percent(score, 1), va="bottom", ha="right", color=MUTED)
    ax.set(xlim=(0, 1), ylim=(4.6, -0.75))
    ax.set_title("its prediction", color=MUTED)
    ax.set_axis_off()


def _draw_ratios(ax: Axes, effects: tuple[BlockEffect, ...]) -> None:
    """|F| / |shortcut|, block by block."""
    ax.set_title("how much each block adds: |F(x)| / |shortcut|")
    if all(effect.ratio is None for effect in effects):
        ax.text(0.5, 0.5, "a plain network has no shortcut to compare with", ha="center", color=MUTED)
        ax.set_axis_off()
        return
    ax.bar(range(len(effects)), [effect.ratio or 0 for effect in effects], width=0.7, color=BLUE)
    ax.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
    _label_blocks(ax, effects)


def _draw_lesions(ax: Axes, explanation: Explanation) -> None:
    """The score of the predicted class without each block; orange where another class would win."""
    effects, (answer, score) = explanation.blocks, explanation.top[0]
    colours = [BLUE if effect.predicted_without == answer else ORANGE for effect in effects]
    ax.bar(range(len(effects)), [effect.score_without or 0 for effect in effects], width=0.7, color=colours)
    for i, effect in enumerate(effects):
        if effect.score_without is None and len(effects) <= MAX_LABELS:
            ax.text(i, 0.02, "needed", rotation=90, ha="center", va="bottom", color=MUTED, fontsize=8)
    ax.axhline(score, color=MUTED, linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 1)
    ax.set_title(f"score of {_printable(answer, 40)} without each block (dotted: with all; orange: another class wins)")
    _label_blocks(ax, effects)


def _label_blocks(ax: Axes, effects: tuple[BlockEffect, ...]) -> None:
    labelled = [i for i, effect in enumerate(effects) if len(effects) <= MAX_LABELS or effect.block.endswith(".0")]
    ax.set_xticks(labelled, [effects[i].block for i in labelled], rotation=45 if len(labelled) > 12 else 0)
    ax.set_xlim(-0.6, len(effects) - 0.4)
    ax.grid(axis="y")


def _printable(text: str, width: int) -> str:
    """A name without characters that XML cannot hold, shortened."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"
