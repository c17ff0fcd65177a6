"""Images with several classes, or none: a text "cat;dog" of each image becomes its position in a table of label sets.

So `Split.labels` is one number per image here too, and splits, groups and sampling go by it; `Dataset.label_sets` has
the classes of each number.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from resnetlab.errors import DataError
from resnetlab.random import seed_for

SEPARATOR = ";"
INDICATORS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}  # of a class's own column


class LabelLists(list[str]):
    """Texts such as "cat;dog", one per image, and the classes that there are."""

    def __init__(self, rows: Iterable[Iterable[str]], classes: Iterable[str] = ()) -> None:
        super().__init__(join_classes(names) for names in rows)
        self.classes = sorted({name for text in self for name in split_classes(text)} | set(classes))


def join_classes(names: Iterable[str]) -> str:
    """The text of an image's classes; raises DataError if a name contains the separator."""
    parts = sorted({unicodedata.normalize("NFC", name.strip()) for name in names} - {""})
    if bad := [name for name in parts if SEPARATOR in name]:
        raise DataError(f"the class {bad[0]!r} has a {SEPARATOR!r} in its name, which separates classes; rename it.")
    return SEPARATOR.join(parts)


def split_classes(text: str) -> list[str]:
    """The classes that a text names."""
    return [name for part in text.split(SEPARATOR) if (name := part.strip())]


def number_label_sets(texts: Iterable[str], classes: Sequence[str]) -> tuple[dict[str, int], Tensor]:
    """Of each different text its position, and the label sets, float32 (sets, classes) of 0 and 1.

    Their order is random, but depends on the texts alone: what is held out of many rare sets must not be the first letters.
    """
    column = {name: i for i, name in enumerate(classes)}
    order = sorted(set(texts), key=lambda text: (seed_for(0, "label set", text), text))
    sets = torch.zeros(len(order), len(classes))
    for row, text in enumerate(order):
        sets[row, [column[name] for name in split_classes(text)]] = 1
    return {text: row for row, text in enumerate(order)}, sets


def find_classes(labels: Tensor, label_sets: Tensor | None) -> set[int]:
    """The classes that occur among labels, int64 (N,)."""
    found = set(labels.tolist())
    return found if label_sets is None else set(label_sets[sorted(found)].any(0).nonzero().flatten().tolist())
