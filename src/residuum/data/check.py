"""The data doctor: every picture decoded in full, and what is wrong with them by name.

Memory holds some hundred bytes a picture, whatever its size. Problems are of these kinds:

    unreadable       the file is missing, damaged, no picture, or too large to be one honestly
    suspicious       it can be read, but is tiny, very narrow, of one colour, called otherwise than it is, or Pillow warns of it
    duplicate        the same bytes as another picture of the same split and class
    near-duplicate   nearly the same picture (resized, compressed again), likewise
    conflict         the same or nearly the same picture in another class
    leak             the same or nearly the same picture in another split
    stray            a picture beside the class folders
    layout           the folder cannot be taken for a data set at all
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from residuum.data.dataset import Dataset, Pictures
from residuum.data.look import Seen, look_at_file, look_at_pixels
from residuum.data.reading import in_order
from residuum.data.stored import Files, Stored
from residuum.errors import DataError

CHUNK = 32  # pictures that a worker looks at in one go
NEAR = 8  # of 128 bits that near copies may differ in
BANDS = NEAR + 1  # copies that differ in so few bits agree in one of this many bands at least


class Problem(NamedTuple):
    """Something to mend."""

    kind: str
    file: str
    detail: str


class Entry(NamedTuple):
    """One picture of the data set."""

    split: str
    name: str  # as a quarantine list has it
    file: str  # as a person finds it
    label: str
    seen: Seen | None


@dataclass
class Findings:
    """What `check` found.

    Attributes:
        pictures: how many were looked at; `readable` of them could be read.
        classes: split -> class -> how many pictures.
        kinds: "JPEG RGB" -> how many.
        shorter_sides: smallest, median and largest shorter side, in pixels; None where nothing could be read.
        quarantine: names of pictures that training should leave out: the unreadable ones, and of every group of copies all but
            one; where copies lie in two splits those for training go, where they are of two classes all for training go.
    """

    data: str
    pictures: int = 0
    readable: int = 0
    problems: list[Problem] = field(default_factory=list)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    shorter_sides: tuple[int, float, int] | None = None
    quarantine: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return {
            "data": self.data,
            "pictures": self.pictures,
            "readable": self.readable,
            "problems": [problem._asdict() for problem in self.problems],
            "classes": self.classes,
            "kinds": self.kinds,
            "shorter_sides": list(self.shorter_sides) if self.shorter_sides else None,
        }


def check(data: Dataset, workers: int = 0, progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
    """Looks at every picture of a data set.

    Args:
        workers: processes that decode.
        progress: called with pictures done and pictures in all.
    """
    splits = {name: split for name, split in data.splits.items() if name != "all"}
    findings = Findings(data.name, pictures=sum(map(len, splits.values())))
    findings.classes = {name: _balance(split, data.classes) for name, split in splits.items()}
    entries, kinds, sides = [], Counter[str](), []
    for entry, problem in _entries(splits, data.classes, workers):
        if problem is not None:
            findings.problems.append(problem)
            findings.quarantine.append(entry.name)
        elif entry.seen is not None:
            entries.append(entry)
            kinds[entry.seen.kind] += 1
            sides.append(min(entry.seen.size))
            findings.problems += [Problem("suspicious", entry.file, words) for words in entry.seen.odd]
        progress(len(entries) + len(findings.quarantine), findings.pictures)
    findings.readable, findings.kinds = len(entries), dict(kinds.most_common())
    findings.shorter_sides = (min(sides), median(sides), max(sides)) if sides else None
    for first, second, near in copies(entries):
        findings.problems.append(_copy(first, second, near))
        findings.quarantine += _spare(first, second)
    findings.quarantine = list(dict.fromkeys(findings.quarantine))
    return findings


def _balance(split: Pictures, classes: tuple[str, ...]) -> dict[str, int]:
    counts = split.labels.bincount(minlength=len(classes)).tolist()
    return dict(zip(classes, counts, strict=True))


@dataclass(frozen=True, eq=False)
class _Looks:
    """The looks at CHUNK pictures from a start on; a value, so that it can travel to a worker."""

    split: Pictures

    def __call__(self, start: int) -> list[Seen | str]:
        return [self._look(i) for i in range(start, min(start + CHUNK, len(self.split)))]

    def _look(self, i: int) -> Seen | str:
        if not isinstance(self.split, Stored):
            return look_at_pixels(self.split.pictures([i])[0])
        place = int(self.split.where[i])
        try:
            return look_at_file(self.split.source.read(place), self.split.source.label(place))
        except DataError as error:
            return str(error)


def _entries(
    splits: dict[str, Pictures], classes: tuple[str, ...], workers: int
) -> Iterator[tuple[Entry, Problem | None]]:
    """Every picture, and the problem with it where it cannot be read."""
    for name, split in splits.items():
        starts = range(0, len(split), CHUNK)
        names, labels = split.names, split.labels.tolist()
        seen = (look for looks in in_order(_Looks(split), starts, workers) for look in looks)
        for i, look in enumerate(seen):
            file = split.source.label(int(split.where[i])) if isinstance(split, Stored) else names[i]
            entry = Entry(name, names[i], file, classes[labels[i]], look if isinstance(look, Seen) else None)
            yield entry, Problem("unreadable", file, look) if isinstance(look, str) else None


def copies(entries: list[Entry]) -> Iterator[tuple[Entry, Entry, bool]]:
    """(first, copy, whether only nearly) of pictures that show the same; each copy told once, beside the first of its group."""
    same: dict[bytes, Entry] = {}
    distinct: list[Entry] = []
    for entry in entries:
        assert entry.seen is not None
        if (first := same.setdefault(entry.seen.content, entry)) is entry:
            distinct.append(entry)
        else:
            yield first, entry, False
    bands: dict[tuple[int, int], list[int]] = defaultdict(list)
    width = -(-128 // BANDS)
    for place, entry in enumerate(distinct):
        if entry.seen is None or (shape := entry.seen.shape) is None:
            continue
        keys = [(band, shape >> (band * width) & ((1 << width) - 1)) for band in range(BANDS)]
        near = {other for key in keys for other in bands[key] if _distance(distinct[other], shape) <= NEAR}
        if near:
            yield distinct[min(near)], entry, True
        for key in keys:
            bands[key].append(place)


def _distance(entry: Entry, shape: int) -> int:
    """How many of the 128 bits differ."""
    assert entry.seen is not None and entry.seen.shape is not None
    return (entry.seen.shape ^ shape).bit_count()


def _copy(first: Entry, second: Entry, near: bool) -> Problem:
    words = f"{'nearly ' if near else ''}the same picture as {first.file}"
    if first.split != second.split:
        return Problem("leak", second.file, f"{words}, which is in {first.split}")
    if first.label != second.label:
        return Problem("conflict", second.file, f"{words}, which is of class {first.label}, not {second.label}")
    return Problem("near-duplicate" if near else "duplicate", second.file, words)


def _spare(first: Entry, second: Entry) -> list[str]:
    """Which of two copies training should leave out."""
    if first.split != second.split:
        return [entry.name for entry in (first, second) if entry.split == "train"]
    if first.label != second.label:
        return [entry.name for entry in (first, second) if entry.split == "train"]
    return [second.name] if second.split == "train" else []


def strays(data: Dataset) -> list[Problem]:
    """Pictures beside the class folders of a folder."""
    from residuum.data import folder

    split = data.train if len(data.train) else data.test
    if not isinstance(split, Stored) or not isinstance(split.source, Files):
        return []
    root = Path(data.name)
    return [
        Problem("stray", os.path.join(place, name), "it lies beside the class folders and belongs to no class")
        for place in dict.fromkeys([root, *folder.split_folders(root).values()])
        for name in folder.strays(place)
    ]
