"""The page of an evaluation: one HTML file that needs nothing but itself (its layout is pages/evaluation.html.j2)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from residuum.data.dataset import Pictures
from residuum.evaluation import figures
from residuum.evaluation.calibration import reliability
from residuum.evaluation.evaluate import Evaluation
from residuum.evaluation.metrics import Judgement, wilson
from residuum.preprocessing import Preprocessing, picture_of
from residuum.records import write_atomically, writing_error

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure

MISTAKES = 24  # pictures shown at most
PAIRS = 12  # rows of confused classes shown at most
CLASSES = 24  # rows of classes shown at most
UNIT = "\u00a0%"


def pages() -> Environment:
    """The templates, with the words they write numbers in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("residuum", "pages")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"percent": percent, "count": count}
    return found


def percent(fraction: float | None, n: int = 0) -> str:
    """A fraction in per cent, with two decimals where `n` pictures can tell them: "0.6 %" of 360, "8.75 %" of 10,000."""
    if fraction is None:
        return "–"
    return f"{100 * fraction:.{2 if n >= 1000 else 1}f}{UNIT}"


def between(low: float, high: float, n: int) -> str:
    """An interval of fractions in per cent: "0.2 to 2.0 %"."""
    return f"{percent(low, n).removesuffix(UNIT)} to {percent(high, n)}".replace(" ", "\u00a0")


def count(number: float) -> str:
    """A count with separators: "174,970"."""
    return f"{number:,.0f}"


class _Shown:
    """The pictures of a split as a model's one crop shows them, read when they are asked for."""

    def __init__(self, pictures: Pictures, preprocessing: Preprocessing) -> None:
        self._pictures, self._preprocessing = pictures, preprocessing
        self.shape = (len(pictures), *preprocessing.size, preprocessing.channels)

    def __getitem__(self, i: int) -> Tensor:
        """uint8 (h, w, C)."""
        return self._preprocessing(picture_of(self._pictures.pictures([i])[0]))


def write(evaluation: Evaluation, folder: Path) -> None:
    """Writes evaluation.json and evaluation.html; raises RunError where there is no space or no permission."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_error(folder, error) from error
    write_atomically(folder / "evaluation.json", json.dumps(evaluation.to_json(), indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / "evaluation.html", render(evaluation))


def render(evaluation: Evaluation) -> str:
    """The page as HTML."""
    judgement, n = evaluation.judgement, evaluation.n
    confusion = judgement.confusion
    rows = figures.class_rows(judgement.classes, confusion)
    images: Any = _Shown(evaluation.pictures, evaluation.bundles[0].preprocessing)
    mistakes = figures.mistakes(judgement, images, MISTAKES)
    names = evaluation.pictures.names
    page = (
        pages()
        .get_template("evaluation.html.j2")
        .render(
            title=f"{' + '.join(Path(name).name if len(evaluation.models) > 1 else name for name in evaluation.models)}",
            figures=evaluation.to_json(),
            calibration=[sentence[0].upper() + sentence[1:] for sentence in evaluation.calibration],
            n=n,
            interval=between(*wilson(judgement.top1_error, n), n),
            wrong=int((judgement.predicted != judgement.labels).sum()),
            matrix=figures.confusion_svg(judgement.classes, confusion) if len(rows) <= figures.LARGEST_MATRIX else None,
            diagram=diagram(judgement),
            pairs=figures.confused_pairs(judgement.classes, confusion, PAIRS),
            classes=sorted(rows, key=lambda row: -(row.error or 0))[:CLASSES],
            total_classes=len(rows),
            mistakes=[(names[m.index], m) for m in mistakes],
        )
    )
    return page.encode(errors="replace").decode()  # a name that is no UTF-8 must not keep the page from being written


def diagram(judgement: Judgement) -> str:
    """The reliability diagram as inline SVG: how often predictions of each confidence are right, and how many there are."""
    bins = [each for each in reliability(judgement.scores, judgement.labels) if each.n]

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3, 1]})
        top.plot([0, 1], [0, 1], color=figures.MUTED, linewidth=1, linestyle=":")
        top.bar(
            [b.low for b in bins],
            [b.accuracy or 0 for b in bins],
            1 / 15,
            align="edge",
            color=figures.HELD_OUT,
            alpha=0.35,
        )
        top.plot([b.confidence or 0 for b in bins], [b.accuracy or 0 for b in bins], "o-", color=figures.HELD_OUT)
        top.set_ylim(0, 1)
        top.set_ylabel("right")
        bottom.bar([b.low for b in bins], [b.n / judgement.n for b in bins], 1 / 15, align="edge", color=figures.TRAIN)
        bottom.set_xlim(0, 1)
        bottom.set_ylabel("share")
        bottom.set_xlabel("confidence")
        figure.subplots_adjust(left=0.13, right=0.98, top=0.97, bottom=0.13, hspace=0.15)

    error = f"{judgement.calibration_error:.4f}"
    label = f"Reliability diagram: share of right predictions by confidence; expected calibration error {error}."
    return figures.inline_svg(draw, width=440, height=380, name="reliability", label=label)
