"""The figure of an explanation: the picture, where the network looked, and what each block did; an SVG that stands alone."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any

from residuum.evaluation.heat import SMALLEST
from residuum.preprocessing import picture_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from residuum.use.explain import BlockShare, Explanation

INK, MUTED, LINE, BLUE, ORANGE = "#1b1d21", "#5b6069", "#e4e2dc", "#1d5fb0", "#c9571c"
LABELLED = 40  # blocks; of more than this only the first of each stage is named
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: the reader's fonts, and no glyph that could be missing here
    "svg.hashsalt": "explanation",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": LINE,
    "xtick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.major.size": 0,
    "ytick.color": LINE,
    "ytick.labelcolor": MUTED,
}


def draw(explanation: Explanation, name: str) -> str:
    """The figure as SVG text; equal explanations give equal text.

    Args:
        name: of the picture, for the title.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing", category=UserWarning
        )  # the reader's fonts have it
        matplotlib.rcdefaults()  # a reader's own matplotlibrc has no say here
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(10, 8.4))
        grid = figure.add_gridspec(3, 3, height_ratios=(1.25, 1, 1), hspace=0.5, wspace=0.12)
        figure.subplots_adjust(left=0.08, right=0.97, top=0.92, bottom=0.11)
        figure.suptitle(_printable(name, 90), x=0.08, ha="left", fontsize=12)
        _pictures([figure.add_subplot(grid[0, i]) for i in (0, 1)], explanation)
        _answer(figure.add_subplot(grid[0, 2]), explanation)
        _ratios(figure.add_subplot(grid[1, :]), explanation.blocks)
        _lesions(figure.add_subplot(grid[2, :]), explanation)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def _pictures(axes: list[Axes], explanation: Explanation) -> None:
    picture = picture_of(explanation.pixels).convert("RGB")
    factor = -(-SMALLEST // min(picture.size))
    shown = (picture.resize((picture.width * factor, picture.height * factor), 0), explanation.overlay)
    for ax, image, title in zip(axes, shown, ("as the network gets it", "where it looked (Grad-CAM)"), strict=True):
        ax.imshow(image)
        ax.set_title(title, color=MUTED)
        ax.set_axis_off()


def _answer(ax: Axes, explanation: Explanation) -> None:
    """The classes with the highest scores, as bars with their names above."""
    top = explanation.top[:5]
    ax.barh(range(len(top)), [score for _, score in top], height=0.22, color=[BLUE] + [MUTED] * (len(top) - 1))
    for i, (name, score) in enumerate(top):
        ax.text(0, i - 0.2, _printable(name, 26), va="bottom")
        ax.text(1, i - 0.2, f"{100 * score:.1f} %", va="bottom", ha="right", color=MUTED)
    ax.set(xlim=(0, 1), ylim=(4.6, -0.75))
    ax.set_title("what it says", color=MUTED)
    ax.set_axis_off()


def _ratios(ax: Axes, shares: tuple[BlockShare, ...]) -> None:
    """|F| / |shortcut|, block by block."""
    ax.set_title("how much each block adds: |F(x)| / |shortcut|")
    if all(share.ratio is None for share in shares):
        ax.text(0.5, 0.5, "a plain network has no shortcut to compare with", ha="center", color=MUTED)
        ax.set_axis_off()
        return
    ax.bar(range(len(shares)), [share.ratio or 0 for share in shares], width=0.7, color=BLUE)
    ax.axhline(1, color=MUTED, linewidth=0.8, linestyle=":")
    _name_blocks(ax, shares)


def _lesions(ax: Axes, explanation: Explanation) -> None:
    """The score of the answer without each block; orange where another class would win."""
    shares, (answer, score) = explanation.blocks, explanation.top[0]
    colours = [BLUE if share.answer == answer else ORANGE for share in shares]
    ax.bar(range(len(shares)), [share.score or 0 for share in shares], width=0.7, color=colours)
    for i, share in enumerate(shares):
        if share.score is None and len(shares) <= LABELLED:
            ax.text(i, 0.02, "no way past", rotation=90, ha="center", va="bottom", color=MUTED, fontsize=8)
    ax.axhline(score, color=MUTED, linewidth=0.8, linestyle=":")
    ax.set_ylim(0, 1)
    ax.set_title(f"score of {_printable(answer, 40)} without each block (dotted: with all; orange: another class wins)")
    _name_blocks(ax, shares)


def _name_blocks(ax: Axes, shares: tuple[BlockShare, ...]) -> None:
    named = [i for i, share in enumerate(shares) if len(shares) <= LABELLED or share.block.endswith(".0")]
    ax.set_xticks(named, [shares[i].block for i in named], rotation=45 if len(named) > 12 else 0)
    ax.set_xlim(-0.6, len(shares) - 0.4)
    ax.grid(axis="y")


def _printable(text: str, width: int) -> str:
    """A name as XML can hold it, shortened."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= width else text[: width - 1] + "…"
