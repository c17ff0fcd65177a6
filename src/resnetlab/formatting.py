"""Numbers and lists as text for messages, tables and pages."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def format_percent(fraction: float, decimals: int = 2) -> str:
    """A fraction in per cent.

    >>> format_percent(0.0827)
    '8.27 %'
    """
    return f"{100 * fraction:.{decimals}f} %"


def format_known(value: float | None, form: str = "") -> str:
    """A fraction in per cent, or a number in another form; a dash where there is none.

    >>> format_known(0.0827), format_known(0.5, "{:.3f}"), format_known(None)
    ('8.27 %', '0.500', '–')
    """
    return "–" if value is None else form.format(value) if form else format_percent(value)


def format_share(fraction: float) -> str:
    """A share in per cent, with two significant digits.

    >>> format_share(0.02), format_share(0.000612), format_share(1.0)
    ('2 %', '0.061 %', '100 %')
    """
    return f"{100 * fraction:.2g} %" if fraction < 0.995 else format_percent(fraction, 0)


def format_count(number: int, noun: str) -> str:
    """A number and what it counts, in the singular or the plural.

    >>> format_count(1, "step"), format_count(1200, "class")
    ('1 step', '1,200 classes')
    """
    plural = f"{noun}es" if noun.endswith(("s", "x", "ch")) else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def format_split(name: str) -> str:
    """The name of a split as text: images that are drawn for the test ("held-out" in files) are test images.

    "Held out" are the training images that are evaluated while training.
    """
    return "test" if name == "held-out" else name


def format_split_of(split: str, data: str) -> str:
    """A split of a data set as text.

    >>> format_split_of("held-out", "photos"), format_split_of("all", "photos")
    ('the test split of photos', 'all of photos')
    """
    return f"all of {data}" if split == "all" else f"the {format_split(split)} split of {data}"


def format_figure(key: str, value: float) -> str:
    """A figure of an evaluation with its name: errors in per cent, mAP and IoU as fractions, as everywhere.

    >>> format_figure("top1_error", 0.0512), format_figure("map_50", 0.5)
    ('error 5.12 %', 'mAP@.5 0.500')
    """
    names = {"mean_ap": "mAP", "map": "mAP@[.5:.95]", "map_50": "mAP@.5", "mean_iou": "mean IoU"}
    if key in names:
        return f"{names[key]} {value:.3f}"
    return f"{key.removeprefix('top1_').replace('_', ' ')} {format_percent(value)}"


def format_duration(seconds: float, decimals: int = 0) -> str:
    """A duration; `decimals` are those of less than a minute.

    >>> format_duration(14.23, 1), format_duration(192.4), format_duration(7980)
    ('14.2 s', '3 min 12 s', '2 h 13 min')
    """
    if seconds < 60:
        return f"{seconds:.{decimals}f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"


def format_estimate(seconds: float) -> str:
    """A rough duration, in one unit.

    >>> format_estimate(40), format_estimate(700), format_estimate(12_600), format_estimate(180_000)
    ('40 s', '12 min', '3.5 h', '2.1 days')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86_400 else f"{seconds / 86_400:.1f} days"


def format_json(value: Any, ascii: bool = False) -> str:
    """JSON with an entry a line, and lists of numbers on one line; `ascii` escapes all other characters.

    >>> print(format_json({"a": [1, 2.5]}))
    {
      "a": [1, 2.5]
    }
    """
    text = json.dumps(value, indent=2, ensure_ascii=ascii, allow_nan=False)
    return re.sub(r"\[\n\s+([-+.\de,\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)


def format_list(names: Sequence[str], limit: int = 8) -> str:
    """The first few of many names.

    >>> format_list(["a", "b", "c"], 2), format_list([])
    ('a, b and 1 more', 'none')
    """
    shown = ", ".join(names[:limit]) or "none"
    return shown + (f" and {len(names) - limit:,} more" if len(names) > limit else "")


def unbreakable(text: str) -> str:
    """The text with spaces at which a browser breaks no line."""
    return text.replace(" ", "\u00a0")


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for notebooks.

    >>> html_table(["a"], [["<b>"]])
    '<table><tr><th>a</th></tr><tr><td>&lt;b&gt;</td></tr></table>'
    """
    cells = [[f"<th>{escape(name)}</th>" for name in columns]]
    cells += [[f"<td>{escape(str(value))}</td>" for value in row] for row in rows]
    return "<table>" + "".join(f"<tr>{''.join(row)}</tr>" for row in cells) + "</table>"


class HtmlFigures:
    """A result that notebooks show as a table of its single values; what it has of every class is left out."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary."""

    def _repr_html_(self) -> str:
        single = {k.replace("_", " "): v for k, v in self.to_json().items() if isinstance(v, str | int | float)}
        rows = [(key, f"{value:.4g}" if isinstance(value, float) else value) for key, value in single.items()]
        return html_table(("", type(self).__name__), rows)


def find_name_problem(names: Sequence[object]) -> str | None:
    """Why values cannot be the class names of a model, which are different words; None if they can."""
    for name in names:
        if not isinstance(name, str) or not name.strip():
            return f"{name!r} is no class name"
        try:
            name.encode()
        except UnicodeEncodeError:
            return f"the class name {name!a} cannot be encoded as UTF-8"
    twice = next((name for name, n in Counter(names).items() if n > 1), None)
    return None if twice is None else f"two classes are called {twice}"


def parse_json(text: str | bytes) -> Any:
    """A JSON document of anyone; raises ValueError, also for one that is nested too deep to be read."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def is_number(value: object) -> bool:
    """Whether a value that was read is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)
