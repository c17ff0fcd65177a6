"""The data doctor: every picture decoded in full, and what is wrong with them by name.

Memory holds less than a kilobyte a picture, whatever its size. Problems are of these kinds:

    unreadable       the file is missing, damaged, no picture, or too large to be one honestly
    suspicious       it can be read, but is damaged (of JPEGs the extra `fast` tells), tiny, very narrow, of one colour, called
                     otherwise than it is, or Pillow warns of it
    duplicate        the same bytes as another picture of the same split and class
    near-duplicate   nearly the same picture (resized, compressed again), likewise
    conflict         the same or nearly the same picture in another class
    leak             the same or nearly the same picture in another split
    stray            a picture beside the class folders
    layout           the folder cannot be taken for a data set at all
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from residuum.data.dataset import Dataset, Pictures
from residuum.data.look import Seen, look_at_file, look_at_pixels
from residuum.data.reading import in_order
from residuum.data.stored import Files, Stored
from residuum.errors import DataError

CHUNK = 32  # pictures that a worker looks at in one go
NEAR = 8  # of 128 bits that near copies may differ in
ALIKE = 0.995  # correlation of the thumbs of near copies, at least
BLOCK = 2048  # pictures compared at once
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
    with_shape = [entry for entry in distinct if entry.seen is not None and entry.seen.shape is not None]
    seen = [entry.seen for entry in with_shape if entry.seen is not None]
    first_of = nearest([look.shape or 0 for look in seen], [look.thumb for look in seen])
    for place, like in enumerate(first_of.tolist()):
        if like != place:
            yield with_shape[like], with_shape[place], True


def nearest(shapes: Sequence[int], thumbs: Sequence[bytes]) -> NDArray[np.int64]:
    """For each of many pictures the place of the first that is nearly the same, int64 (N,): itself where no other is.

    Two are nearly the same if their shapes differ in NEAR of 128 bits at most (Seen.shape) and their thumbs correlate: where
    a background is shared, most bits say nothing, so the shape alone is no proof. Only those are compared that agree in a whole
    band of bits, all of a band's at once; bits that say much are dealt out to all bands, so that none is of the background's.
    """
    first = np.arange(len(shapes))
    if not len(shapes):
        return first
    bits = np.unpackbits(
        np.frombuffer(b"".join(s.to_bytes(16, "big") for s in shapes), np.uint8).reshape(-1, 16), axis=1
    )
    halves = np.array([(shape >> 64, shape & (2**64 - 1)) for shape in shapes], dtype=np.uint64)
    small = np.frombuffer(b"".join(thumbs), np.uint8).reshape(len(shapes), -1)
    telling = np.argsort(np.abs(bits.mean(0) - 0.5), kind="stable")
    for band in range(BANDS):
        keys = np.packbits(bits[:, telling[band::BANDS]], axis=1)  # (N, 2)
        number = keys.astype(np.int64) @ (256 ** np.arange(keys.shape[1]))
        order = np.argsort(number, kind="stable")  # so that places rise within a group
        for group in np.split(order, np.flatnonzero(np.diff(number[order])) + 1):
            for start in range(0, len(group), BLOCK):
                later = group[start : start + BLOCK]
                for before in range(0, start + 1, BLOCK):
                    earlier = group[before : before + BLOCK]
                    np.minimum.at(first, *_pairs(later, earlier, small, halves))
    return first


def _pairs(
    later: NDArray[np.int64], earlier: NDArray[np.int64], small: NDArray[np.uint8], halves: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of near copies among `later`, and beside each that of an earlier picture that it is like."""
    if len(later) == len(earlier) == 1 and later[0] == earlier[0]:
        return later[:0], later[:0]
    one, other = np.nonzero(_standard(small[later]) @ _standard(small[earlier]).T >= ALIKE)
    one, other = later[one], earlier[other]
    near = (other < one) & (_ones(halves[one] ^ halves[other]).sum(1) <= NEAR)
    return one[near], other[near]


def _standard(thumbs: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Vectors of mean 0 and length 1, so that their products are correlations."""
    x = thumbs.astype(np.float32)
    x -= x.mean(1, keepdims=True)
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6)
    return x


def _ones(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """How many bits of each number are set."""
    fives, threes = (np.uint64(0x1111111111111111 * n) for n in (5, 3))
    x = x - (x >> np.uint64(1) & fives)
    x = (x & threes) + (x >> np.uint64(2) & threes)
    x = x + (x >> np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


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
    """Pictures beside the class folders of a folder, and files in them that may be pictures but are not read."""
    from residuum.data import folder

    split = data.train if len(data.train) else data.test
    if not isinstance(split, Stored) or not isinstance(split.source, Files):
        return []
    root = Path(data.name)
    parts = folder.split_folders(root).values()
    flat = {name for split in data.splits.values() for name in split.names if name.count(os.sep) == 1}
    return [
        Problem("stray", os.path.join(place, name), "it lies beside the class folders and belongs to no class")
        for place in dict.fromkeys([root, *parts])
        for name in folder.strays(place)
        if os.path.relpath(os.path.join(place, name), root) not in flat
    ] + [
        Problem(
            "stray",
            os.path.join(place, name),
            "it is of a kind that is not read, or has no suffix; save it as JPEG or PNG",
        )
        for place in parts
        for name in folder.unread(place)
    ]
