"""Parts of a page about predictions: the confusion matrix, the classes, the mistakes; and figures as inline SVG.

Every function is pure: equal input gives equal text. Figures name their colours by role, as CSS variables of pages/style.css,
and so follow the reader's light or dark mode.
"""

from __future__ import annotations

import io
import re
import unicodedata
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from torch import Tensor

from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.evaluation.metrics import ClassificationMetrics, ClassMetrics
from resnetlab.preprocessing import render_pixels

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

MAX_MATRIX = 12  # classes; with more, the table of the most confused pairs is clearer
CELL, NAME = 44, 16  # pixels on a side of a cell; columns of a class's name beside them
# pixels on a side: larger images are shrunk to the first, smaller ones than the second enlarged without smoothing
MAX_IMAGE, SMALL_IMAGE = 256, 96
MISTAKES = 24  # images shown at most
PAIRS = 12  # rows of confused classes shown at most
CLASSES = 24  # rows of classes shown at first, at most

# Colours to draw with in matplotlib. Each is a placeholder for a role, whose colour the page decides.
INK, MUTED, LINE, TRAIN, HELD_OUT, CARD = (f"#0000f{i}" for i in range(6))
_ROLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", TRAIN: "--train", HELD_OUT: "--held-out", CARD: "--card"}
SERIES = tuple(f"#0000e{i}" for i in range(7))  # for several curves in one figure
_ROLES |= {colour: f"--series-{i}" for i, colour in enumerate(SERIES)}


def plot_style(ink: str, muted: str, line: str) -> dict[str, Any]:
    """The style of all figures, as matplotlib's rcParams, in the colours of text, of labels and of lines."""
    return {
        "svg.fonttype": "none",  # text stays text, in the reader's fonts: no glyph can be missing here
        "text.parse_math": False,
        "text.color": ink,
        "axes.edgecolor": line,
        "axes.labelcolor": muted,
        "axes.axisbelow": True,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "grid.color": line,
        "xtick.color": line,
        "xtick.labelcolor": muted,
        "ytick.major.size": 0,
        "ytick.labelcolor": muted,
    }


_STYLE: Any = plot_style(INK, MUTED, LINE) | {
    "font.size": 12,
    "lines.markersize": 4.5,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class ClassRow(ClassMetrics):
    """One class of a split: its figures, and the class most often predicted instead, None where nothing is wrong."""

    taken_for: str | None


@dataclass(frozen=True)
class ConfusedPair:
    """How often images of one class were taken for another."""

    true: str
    predicted: str
    count: int
    n: int  # images of the true class


@dataclass(frozen=True)
class Mistake:
    """An image that the network got wrong, and its confidence."""

    index: int  # position in the split, from 0
    true: str
    predicted: str
    confidence: float  # softmax of the predicted class
    true_confidence: float  # softmax of the true class
    uri: str  # the image, as a data URI
    small: bool  # enlarged without smoothing


@dataclass(frozen=True)
class Prototype:
    """The image that the network takes for the most typical of a class."""

    index: int  # position in the split, from 0
    name: str
    confidence: float  # softmax of its class
    uri: str
    small: bool


def class_rows(metrics: ClassificationMetrics) -> list[ClassRow]:
    """A row for every class, in the order of the metrics."""
    rows = zip(metrics.per_class, metrics.taken_for, strict=True)
    return [ClassRow(**vars(each), taken_for=others[0][0] if others else None) for each, others in rows]


def confused_pairs(metrics: ClassificationMetrics) -> list[ConfusedPair]:
    """The pairs of classes that are confused most often, by count; at most PAIRS."""
    wrong = sorted((row for row in metrics.confusion_counts if row[0] != row[1]), key=lambda row: -row[2])[:PAIRS]
    classes, n = metrics.classes, [each.n for each in metrics.per_class]
    return [ConfusedPair(classes[true], classes[predicted], count, n[true]) for true, predicted, count in wrong]


def find_mistakes(metrics: ClassificationMetrics, limit: int) -> list[int]:
    """The positions of the wrong images, the most confident first; at most `limit`."""
    wrong = (~metrics.right).nonzero().flatten()
    return wrong[metrics.confidence[wrong].argsort(descending=True, stable=True)][:limit].tolist()


def worst_mistakes(
    metrics: ClassificationMetrics, images: Tensor | PreprocessedSplit, limit: int = MISTAKES
) -> list[Mistake]:
    """The wrong images, the most confident first; at most `limit`.

    Args:
        images: uint8 (N, h, w, C), in the order of the metrics.
    """
    small = max(images.shape[1:3]) <= SMALL_IMAGE
    rows = [(i, int(metrics.labels[i]), int(metrics.predicted[i])) for i in find_mistakes(metrics, limit)]
    return [
        Mistake(
            index=i,
            true=metrics.classes[true],
            predicted=metrics.classes[guess],
            confidence=float(metrics.confidence[i]),
            true_confidence=float(metrics.true_scores[i]),
            uri=image_uri(images[i]),
            small=small,
        )
        for i, true, guess in rows
    ]


def class_prototypes(
    metrics: ClassificationMetrics, images: Tensor | PreprocessedSplit, limit: int = CLASSES
) -> list[Prototype]:
    """A typical image of each of the first `limit` classes that have a correct one.

    It is the correct image whose log scores, which are linear in the network's features, are nearest to the mean of its class's
    correct images; of several the first. There are none where the scores were too many to be kept.

    Args:
        images: uint8 (N, h, w, C), in the order of the metrics.
    """
    if metrics.all_scores is None:
        return []
    right, log_scores, rows = metrics.right, metrics.log_scores, list[tuple[int, int]]()
    for k in range(len(metrics.classes)):
        if len(rows) == limit:
            break
        if len(of_class := (right & (metrics.labels == k)).nonzero().flatten()):
            scores = log_scores[of_class]  # (n, classes)
            rows.append((int(of_class[(scores - scores.mean(0)).square().sum(1).argmin()]), k))
    small = max(images.shape[1:3]) <= SMALL_IMAGE
    return [
        Prototype(i, metrics.classes[k], float(metrics.confidence[i]), image_uri(images[i]), small) for i, k in rows
    ]


def image_uri(image: Tensor) -> str:
    """An image (h, w, C) as a data URI, as `render_pixels` shows it: PNG if small, else JPEG of at most 256 pixels a side."""
    return pil_image_uri(render_pixels(image.cpu()))


def pil_image_uri(image: Image.Image) -> str:
    """A Pillow image as a data URI: PNG where it is small, else JPEG of at most 256 pixels on a side."""
    if max(image.size) <= SMALL_IMAGE:
        return encode_uri(image, "png", optimize=True)
    return encode_uri(image, "jpeg", MAX_IMAGE, quality=85)


def encode_uri(image: Image.Image, kind: str, limit: int = MAX_IMAGE, **options: Any) -> str:
    """A Pillow image, resized in place to at most `limit` pixels on a side, as a data URI of a kind of file."""
    image.thumbnail((limit, limit))
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{b64encode(buffer.getvalue()).decode()}"


def confusion_svg(classes: Sequence[str], confusion: Tensor) -> str:
    """The confusion matrix as inline SVG: rows are true classes, columns predicted ones, counts in the cells.

    Correct cells have one hue, wrong ones another; opacity is the share of the true class, relative to the largest.
    """
    names = [_shorten(name) for name in classes]
    widest = max(map(_display_width, names)) * 8  # pixels
    slanted = widest > CELL - 4  # names that do not fit above their columns are slanted
    overhang = widest * 7 // 10 if slanted else 0
    left, top = max(56, widest + 16), overhang + (40 if slanted else 46)
    side = CELL * len(names)
    share = confusion / confusion.sum(1, keepdim=True).clamp(min=1)
    strongest = {True: float(share.diag().max()), False: float((share - share.diag().diag()).max())}
    parts = [f'<text class="axis" x="{left}" y="14">predicted →</text>']
    parts.append(f'<text class="axis" x="{left - 8}" y="{top - 8}" text-anchor="end">true ↓</text>')
    for i, name in enumerate(map(escape, names)):
        x, y = left + i * CELL + CELL // 2, top - 8
        place = f'transform="translate({x} {y}) rotate(-40)"' if slanted else f'x="{x}" y="{y}" text-anchor="middle"'
        parts.append(f"<text {place}>{name}</text>")
        parts.append(f'<text x="{left - 8}" y="{top + i * CELL + CELL // 2 + 5}" text-anchor="end">{name}</text>')
    for i, row in enumerate(confusion.tolist()):
        for j, count in enumerate(row):
            strength = float(share[i, j]) / (strongest[i == j] or 1)
            what = f"{classes[i]} taken for {classes[j]}: {count} of {sum(row)}"
            parts.append(_cell(left + j * CELL, top + i * CELL, count, strength, i == j, what))
    width, height = left + side + max(2, overhang - CELL // 2), top + side + 2
    right, n = int(confusion.diag().sum()), int(confusion.sum())
    label = f"Confusion matrix of {len(names)} classes: {right:,} of {n:,} images are on the diagonal, so are correct."
    box = f'viewBox="0 0 {width} {height}" style="max-width: {width}px"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" class="matrix" {box} role="img" aria-label="{label}">'
    return "".join([opening, *parts, "</svg>"])


def _cell(x: int, y: int, count: int, strength: float, right: bool, what: str) -> str:
    """One cell of the matrix, with a strength from 0 to 1; an empty one has only its outline."""
    box = f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{CELL - 2}" rx="4"'
    if not count:
        return f'{box} class="none"/>'
    fill = f'class="{"right" if right else "wrong"}" fill-opacity="{0.06 + 0.4 * strength:.3f}"'
    fit = f' textLength="{CELL - 8}" lengthAdjust="spacingAndGlyphs"' if count > 9999 else ""
    place = f'x="{x + CELL // 2}" y="{y + CELL // 2 + 5}" text-anchor="middle"{fit}'
    return f'<g><title>{escape(what)}</title>{box} {fill}/><text class="count" {place}>{count}</text></g>'


def _display_width(text: str) -> int:
    """The width of a text in columns: East Asian characters count 2, combining ones 0."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _shorten(text: str) -> str:
    """A class's name in at most NAME columns."""
    if _display_width(text) <= NAME:
        return text
    while _display_width(text) >= NAME:
        text = text[:-1]
    return text + "…"


def draw_svg(draw: Callable[[Figure], None], style: Any, size: tuple[float, float], dpi: float = 100) -> str:
    """A matplotlib figure of a style, a mapping of rcParams, and a size in inches as SVG; equal figures give equal text."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # ignores the user's matplotlibrc
        matplotlib.rcParams.update(style)
        figure = Figure(figsize=size, dpi=dpi)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return buffer.getvalue()


def inline_svg(draw: Callable[[Figure], None], *, width: int, height: int, name: str, label: str) -> str:
    """A matplotlib figure as inline SVG: the page's fonts and colours, no background.

    Args:
        draw: draws on a figure in which a point is a pixel of the page, in the colours INK, MUTED, LINE, ...
        width, height: of the figure, in pixels.
        name: unique in the page.
        label: the text for readers who cannot see the figure.
    """

    def draw_transparent(figure: Figure) -> None:
        figure.patch.set_visible(False)
        draw(figure)

    svg = draw_svg(draw_transparent, _STYLE | {"svg.hashsalt": name}, (width / 72, height / 72), dpi=72)
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    body = body[body.index(">", body.index("<svg")) + 1 :]
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body).replace("url(#", f"url(#{name}-")
    body = re.sub(r"font-family: [^;\"]*", "font-family: inherit", body)
    for colour, role in _ROLES.items():
        body = body.replace(colour, f"var({role})")
    body = re.sub(r"\s*\n\s*", " ", body)
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">'
    return opening + body.strip()
