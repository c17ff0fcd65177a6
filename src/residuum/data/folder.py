"""A folder of class folders, with or without train/, val/ and test/; ImageNet's usual layout is one.

    flowers/daisy/1.jpg …                       a stratified hold-out of a fifth is drawn by the pictures' names
    flowers/train/daisy/1.jpg …  flowers/val/…  val is judged once, at the end
    flowers/train/…  val/…  test/…              val is judged while training, test once, at the end

Folders are followed through symbolic links; hidden ones (.git, …) and files that are no pictures are left out. A file with
class names beside the folders (CLASS_FILES) gives names to folders such as n01440764.
"""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from residuum.data.dataset import Dataset, Pictures, stratified
from residuum.data.decode import SUFFIXES
from residuum.data.stored import Files, Names, Reading, Stored
from residuum.errors import DataError

SPLITS = ("train", "val", "test")
HELD_OUT = 0.2  # of a folder without val/ and test/
CLASS_FILES = ("classes.txt", "LOC_synset_mapping.txt", "synset_words.txt")


class Found(NamedTuple):
    """What lies in the class folders of one split: names below the root, sizes in bytes, and each one's class folder."""

    names: list[str]
    sizes: list[int]
    classes: list[str]


def load(root: Path, reading: Reading) -> Dataset:
    """The data set in a folder.

    Raises DataError where it is empty, a class has no picture, splits differ in their classes, or a folder cannot be read.
    """
    parts = split_folders(root)
    found = {name: _pictures(root, folder) for name, folder in parts.items()}
    folders = _same_classes(root, {name: set(part.classes) for name, part in found.items()})
    names = class_names(root, folders)
    quarantined = reading.quarantined()
    splits = {name: _stored(root, part, folders, reading, quarantined) for name, part in found.items()}
    order = sorted(range(len(folders)), key=names.__getitem__)  # classes are in the order of their names
    places = torch.tensor(order).argsort()
    splits = {name: split.labelled(places[split.labels]) for name, split in splits.items()}
    return arrange(str(root), tuple(names[i] for i in order), splits)


def arrange(name: str, classes: tuple[str, ...], splits: dict[str, Stored]) -> Dataset:
    """The data set of splits called "train", "val", "test", or "" where all pictures stand together."""
    if (everything := splits.get("")) is not None:
        if len(everything) < 2 * len(classes):
            raise DataError(
                f"{name} has {len(everything):,} pictures of {len(classes)} classes; a fifth cannot be held out."
            )
        count = max(len(classes), round(HELD_OUT * len(everything)))
        rest, chosen = stratified(everything.labels, count, names=everything.names)
        return Dataset(
            name, classes, everything.take(rest), everything.take(chosen), judged="held-out", whole=everything
        )
    present = [split for split in ("test", "val", "train") if split in splits]
    judged = present[0] if present[0] != "train" else "held-out"
    train = splits.get("train", splits[present[0]].take(torch.empty(0, dtype=torch.long)))
    if judged == "held-out":  # train/ alone
        return arrange(name, classes, {"": train})
    val: Pictures | None = splits.get("val") if judged == "test" else None
    return Dataset(name, classes, train, splits[judged], val=val, judged=judged)


def split_folders(root: Path) -> dict[str, Path]:
    """The folders that hold class folders, by the name of their split; "" for the root itself."""
    inside = _folders(root)
    parts = {name: root / name for name in SPLITS if name in inside}
    if not parts:
        return {"": root}
    if others := [name for name in inside if name not in SPLITS]:
        raise DataError(
            f"{root} holds {', '.join(parts)} and beside them {_some(others)}; put class folders inside the splits, "
            "and call the splits train, val and test."
        )
    return parts


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones left out."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not e.name.startswith((".", "__MACOSX")) and e.is_dir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); give yourself permission to read it.") from error


def _pictures(root: Path, folder: Path) -> Found:
    """All pictures of a split, sorted by name. Raises DataError where there is none, or a class has none."""
    found = Found([], [], [])
    for name in _folders(folder):
        before = len(found.names)
        for file, size in sorted(_walk(folder / name, frozenset())):
            found.names.append(os.path.relpath(file, root))
            found.sizes.append(size)
            found.classes.append(name)
        if len(found.names) == before:
            raise DataError(f"the class folder {folder / name} holds no picture; put some there, or remove it.")
    if not found.names:
        loose = strays(folder)
        hint = f"its {len(loose):,} pictures lie in no class folder" if loose else "it is empty of pictures"
        raise DataError(f"{folder} holds no class folders with pictures: {hint}; give each class a folder of its own.")
    if loose := strays(folder):
        warnings.warn(
            f"{len(loose):,} pictures beside the class folders of {folder} belong to no class and are left out, such as "
            f"{loose[0]}.",
            UserWarning,
            stacklevel=2,
        )
    return found


def strays(folder: Path) -> list[str]:
    """Names of pictures that lie beside class folders."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if _is_picture(e.name) and not e.is_dir())


def _is_picture(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _walk(folder: Path, above: frozenset[str]) -> Iterator[tuple[str, int]]:
    """(path, size in bytes) of every picture below a folder; links are followed, once around where they form a ring."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not entry.name.startswith("."):
                        yield from _walk(Path(entry.path), above | {real})
                elif _is_picture(entry.name):
                    try:
                        yield entry.path, entry.stat().st_size
                    except (
                        OSError
                    ):  # a link to nowhere is a picture that cannot be read, and is told by name when it is
                        yield entry.path, -1
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); give yourself permission to read it.") from error


def _same_classes(root: Path, classes: dict[str, set[str]]) -> list[str]:
    """The class folders that all splits share, sorted; raises DataError with the difference where they do not."""
    named = {split: {unicodedata.normalize("NFC", name) for name in names} for split, names in classes.items()}
    first, *others = named
    for other in others:
        if named[first] != named[other]:
            raise DataError(
                f"{root / first} and {root / other} hold different classes: only in {first} "
                f"{_some(sorted(named[first] - named[other]))}, only in {other} {_some(sorted(named[other] - named[first]))}; "
                "give both the same class folders."
            )
    if len(named[first]) == 1:
        raise DataError(f"{root} has one class only, {min(named[first])}; a classifier needs two or more.")
    return sorted(named[first])


def class_names(root: Path, folders: Sequence[str]) -> list[str]:
    """A name for each class folder: its own, or the one that a file beside says ("n01440764 tench, Tinca tinca" a line)."""
    for file in (root / name for name in CLASS_FILES):
        if not file.is_file():
            continue
        lines = [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
        parts = [line.split(maxsplit=1) for line in lines]
        pairs = {part[0]: part[-1] for part in parts}  # a folder's name alone stands for itself
        if missing := [name for name in folders if name not in pairs]:
            raise DataError(
                f"{file} does not name the class folders {_some(missing)}; add a line for each, or remove it."
            )
        names = [pairs[name] for name in folders]
        twice = {name for name in names if names.count(name) > 1}  # ImageNet has two cranes
        return [f"{name} ({folder})" if name in twice else name for name, folder in zip(names, folders, strict=True)]
    return list(folders)


def _stored(root: Path, found: Found, folders: list[str], reading: Reading, quarantined: frozenset[str]) -> Stored:
    place = {name: i for i, name in enumerate(folders)}
    labels = torch.tensor([place[unicodedata.normalize("NFC", name)] for name in found.classes])
    source = Files(root, Names(found.names), np.array(found.sizes, dtype=np.int64))
    where: Tensor = torch.arange(len(found.names))
    if quarantined:
        where = torch.tensor([i for i, name in enumerate(found.names) if name not in quarantined], dtype=torch.long)
    empty = set(range(len(folders))) - set(labels[where].tolist())
    if empty:
        raise DataError(f"the quarantine list leaves no picture of class {folders[min(empty)]} in {root}.")
    return Stored(source, where, labels[where], reading)


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")
