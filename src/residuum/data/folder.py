"""A folder of class folders, with or without train/, val/ and test/; ImageNet's usual layout is one.

    flowers/daisy/1.jpg …                       a stratified hold-out of a fifth is drawn by the pictures' names
    flowers/train/daisy/1.jpg …  flowers/val/…  val is judged once, at the end
    flowers/train/…  val/…  test/…              val is judged while training, test once, at the end

Folders are followed through symbolic links; hidden ones (.git, …) and files that are no pictures are left out. Folders such
as n01440764 have ImageNet's names; a file beside them may name them otherwise, and give the classes of a val/ that lies flat
(data.labels).
"""

from __future__ import annotations

import os
import re
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from residuum.data.dataset import Dataset, Pictures, stratified
from residuum.data.decode import SUFFIXES, above, hidden
from residuum.data.labels import DEVKIT, class_names, flat, some
from residuum.data.stored import Files, Names, Reading, Stored
from residuum.errors import DataError

SPLITS = ("train", "val", "test")
OTHER_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}  # of splits
ENDINGS = re.compile(r"[ _-]?(set|data|images)$")  # training_set, Test Data, …
OTHER_PICTURES = frozenset(
    {"", ".jpe", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".dng", ".cr2", ".nef", ".arw"}
)  # not read
HELD_OUT = 0.2  # of a folder without val/ and test/


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
    found = {name: _flat(root, folder) or _pictures(root, folder) for name, folder in parts.items()}
    for part in found.values():
        _be_utf8(root, part.names)
    folders = _same_classes(root, {name: set(part.classes) for name, part in found.items()})
    names = class_names(root, folders)
    quarantined = reading.quarantined()
    splits = {name: _stored(root, part, folders, reading, quarantined) for name, part in found.items()}
    order = sorted(range(len(folders)), key=names.__getitem__)  # classes are in the order of their names
    places = torch.tensor(order).argsort()
    splits = {name: split.labelled(places[split.labels]) for name, split in splits.items()}
    return arrange(str(root), tuple(names[i] for i in order), splits)


def _be_utf8(root: Path, names: list[str]) -> None:
    """Raises DataError where a name is bytes of another encoding, which no model file and no report could hold."""
    try:
        "".join((str(root), *names)).encode()
    except UnicodeEncodeError:
        odd = next(str(root / name) for name in names if any("\ud800" <= c <= "\udfff" for c in str(root / name)))
        raise DataError(
            f"the name {odd!a} is not in UTF-8; rename it (convmv -f latin1 -t utf8 -r --notest {str(root)!a} does so for "
            "names from old archives)."
        ) from None


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
    """The folders that hold class folders, by the name of their split (in any case: Train); "" for the root itself.

    Raises DataError where folders beside them, or folders such as training, leave it open what the splits are.
    """
    inside = _folders(root)
    parts: dict[str, Path] = {}
    for split in SPLITS:
        # a class may be called Train, and holds no folders
        called = [name for name in inside if name == split or (name.lower() == split and _folders(root / name))]
        if len(called) > 1:
            raise DataError(f"{root} holds {' and '.join(called)}; put the pictures of both into {split}.")
        if called:
            parts[split] = root / called[0]
    for name in inside:
        if root / name not in parts.values() and (split := _split_meant(name)) and _folders(root / name):
            raise DataError(
                f"{root} holds {name}, with folders in it; call the splits train, val and test: rename it to {split}."
            )
    if not parts:
        return {"": root}
    if others := [name for name in inside if root / name not in parts.values() and DEVKIT not in name.lower()]:
        raise DataError(
            f"{root} holds {', '.join(parts)} and beside them {some(others)}; put class folders inside the splits, "
            "and call the splits train, val and test."
        )
    return parts


def _split_meant(name: str) -> str:
    """The split that a folder of this name is likely to be; "" where it looks like none."""
    plain = ENDINGS.sub("", name.lower())
    return plain if plain in SPLITS else OTHER_NAMES.get(plain, "")


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones left out."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not hidden(e.name) and e.is_dir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); give yourself permission to read it.") from error


def _flat(root: Path, folder: Path) -> Found | None:
    """A split whose pictures lie side by side, their classes told by a file (data.labels); None for any other."""
    if folder == root or _folders(folder):
        return None
    files = sorted(_walk(folder, above(folder)))
    if not files or (classes := flat(root, folder.name, [os.path.basename(file) for file, _ in files])) is None:
        return None
    return Found([os.path.relpath(file, root) for file, _ in files], [size for _, size in files], classes)


def _pictures(root: Path, folder: Path) -> Found:
    """All pictures of a split, sorted by name. Raises DataError where there is none, or a class has none."""
    found = Found([], [], [])
    others: list[str] = []
    for name in _folders(folder):
        before = len(found.names)
        for file, size in sorted(_walk(folder / name, above(folder / name), others)):
            found.names.append(os.path.relpath(file, root))
            found.sizes.append(size)
            found.classes.append(name)
        if len(found.names) == before:
            raise DataError(f"the class folder {folder / name} holds no picture; put some there, or remove it.")
    if not found.names:
        loose = strays(folder)
        hint = f"its {len(loose):,} pictures lie in no class folder" if loose else "it is empty of pictures"
        listed = f", or list them in {folder.name}.txt beside it" if loose and folder != root else ""
        raise DataError(
            f"{folder} holds no class folders with pictures: {hint}; give each class a folder of its own{listed}."
        )
    if loose := strays(folder):
        warnings.warn(
            f"{len(loose):,} pictures beside the class folders of {folder} belong to no class and are left out, such as "
            f"{loose[0]}.",
            UserWarning,
            stacklevel=2,
        )
    if others:
        warnings.warn(
            f"{len(others):,} files in the class folders of {folder} may be pictures, but of a kind that is not read or "
            f"without suffix, and are left out, such as {os.path.relpath(min(others), folder)}; save them as JPEG or PNG.",
            UserWarning,
            stacklevel=2,
        )
    return found


def strays(folder: Path) -> list[str]:
    """Names of pictures that lie beside class folders."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if _is_picture(e.name) and not e.is_dir())


def unread(folder: Path) -> list[str]:
    """Files in class folders, by their names below `folder`, that may be pictures but are of a kind that is not read."""
    others: list[str] = []
    for name in _folders(folder):
        for _ in _walk(folder / name, above(folder / name), others):
            pass
    return sorted(os.path.relpath(file, folder) for file in others)


def _is_picture(name: str) -> bool:
    return not hidden(name) and os.path.splitext(name)[1].lower() in SUFFIXES


def _may_be_picture(name: str) -> bool:
    return not hidden(name) and os.path.splitext(name)[1].lower() in OTHER_PICTURES


def _walk(folder: Path, parents: frozenset[str], others: list[str] | None = None) -> Iterator[tuple[str, int]]:
    """(path, size in bytes) of every picture below a folder; links are followed, but not back to its `parents`.

    Files that may be pictures of a kind that is not read are added to `others`.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not hidden(entry.name):
                        yield from _walk(Path(entry.path), parents | {real}, others)
                elif _is_picture(entry.name):
                    try:
                        yield entry.path, entry.stat().st_size
                    except (
                        OSError
                    ):  # a link to nowhere is a picture that cannot be read, and is told by name when it is
                        yield entry.path, -1
                elif others is not None and _may_be_picture(entry.name):
                    others.append(entry.path)
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
                f"{some(sorted(named[first] - named[other]))}, only in {other} {some(sorted(named[other] - named[first]))}; "
                "give both the same class folders."
            )
    if len(named[first]) == 1:
        raise DataError(f"{root} has one class only, {min(named[first])}; a classifier needs two or more.")
    return sorted(named[first])


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
