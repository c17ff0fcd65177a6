"""A folder of class folders, with or without train/, val/ and test/; ImageNet's usual layout is one.

    flowers/daisy/1.jpg …                       a stratified fifth, chosen by the images' names, is held out
    flowers/train/daisy/1.jpg …  flowers/val/…  val is evaluated once, at the end
    flowers/train/…  val/…  test/…              val is evaluated while training, test once, at the end

Symbolic links are followed; hidden folders (.git, …) and files that are not images are left out. Folders such as n01440764
get ImageNet's names; a file beside them may give other names, and the classes of a val/ without class folders (data.labels).
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

from resnetlab.data.dataset import Dataset, Split, split_stratified
from resnetlab.data.decode import SUFFIXES, is_hidden, resolve_ancestors
from resnetlab.data.disk_split import DiskSplit, FileNames, FileSource, ReadOptions
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.labels import DEVKIT, read_class_names, read_flat_labels
from resnetlab.errors import DataError
from resnetlab.formatting import format_list

SPLITS = ("train", "val", "test")
OTHER_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}  # of splits
ENDINGS = re.compile(r"[ _-]?(set|data|images)$")  # training_set, Test Data, …
UNSUPPORTED = frozenset(
    {"", ".jpe", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".dng", ".cr2", ".nef", ".arw"}
)  # suffixes
HELD_OUT = 0.2  # of a folder without val/ and test/


class FolderLayout(NamedTuple):
    """The images of one split: names below the root, sizes in bytes, and each image's class folder."""

    names: list[str]
    sizes: list[int]
    classes: list[str]


def load_folder(root: Path, read_options: ReadOptions) -> Dataset:
    """Loads the data set in a folder.

    Raises DataError if it is empty, a class has no image, splits differ in their classes, or a folder cannot be read.
    """
    split_folders = find_split_folders(root)
    layouts = {
        name: _read_flat_split(root, path) or _read_class_folders(root, path) for name, path in split_folders.items()
    }
    for layout in layouts.values():
        _require_utf8(root, layout.names)
    folders = _folder_classes(root, {name: set(layout.classes) for name, layout in layouts.items()})
    names = read_class_names(root, folders)
    quarantined = read_options.read_quarantine()
    splits = {
        name: _make_folder_split(root, layout, folders, read_options, quarantined) for name, layout in layouts.items()
    }
    order = sorted(range(len(folders)), key=names.__getitem__)  # classes are in the order of their names
    new_labels = torch.tensor(order).argsort()
    splits = {name: split.with_labels(new_labels[split.labels]) for name, split in splits.items()}
    return arrange_splits(str(root), tuple(names[i] for i in order), splits)


def _require_utf8(root: Path, names: list[str]) -> None:
    """Raises DataError if a name is in another encoding, which neither model files nor reports could store."""
    try:
        "".join((str(root), *names)).encode()
    except UnicodeEncodeError:
        invalid = next(str(root / name) for name in names if any("\ud800" <= c <= "\udfff" for c in str(root / name)))
        raise DataError(
            f"the name {invalid!a} is not in UTF-8; rename it (convmv -f latin1 -t utf8 -r --notest {str(root)!a} does so for "
            "names from old archives)."
        ) from None


def arrange_splits(name: str, classes: tuple[str, ...], splits: dict[str, DiskSplit]) -> Dataset:
    """A data set from splits called "train", "val", "test", or "" for all images together."""
    if (everything := splits.get("")) is not None:
        if len(everything) < 2 * len(classes):
            raise DataError(
                f"{name} has {len(everything):,} images of {len(classes)} classes; a fifth cannot be held out."
            )
        count = max(len(classes), round(HELD_OUT * len(everything)))
        rest, chosen = split_stratified(everything.labels, count, names=everything.names)
        return Dataset(
            name,
            classes,
            everything.subset(rest),
            everything.subset(chosen),
            evaluated_split="held-out",
            all_images=everything,
        )
    present = [split for split in ("test", "val", "train") if split in splits]
    evaluated = present[0] if present[0] != "train" else "held-out"
    train = splits.get("train", splits[present[0]].subset(torch.empty(0, dtype=torch.long)))
    if evaluated == "held-out":  # train/ alone
        return arrange_splits(name, classes, {"": train})
    val: Split | None = splits.get("val") if evaluated == "test" else None
    return Dataset(name, classes, train, splits[evaluated], val=val, evaluated_split=evaluated)


def find_split_folders(root: Path) -> dict[str, Path]:
    """The folders that contain class folders, by the name of their split (in any case: Train); "" for the root itself.

    Raises DataError if folders beside them, or folders such as training, make the splits ambiguous.
    """
    folders = _list_folders(root)
    found: dict[str, Path] = {}
    for split in SPLITS:
        # a class may be called Train, but contains no folders
        names = [n for n in folders if n == split or (n.lower() == split and _list_folders(root / n))]
        if len(names) > 1:
            raise DataError(f"{root} holds {' and '.join(names)}; put the images of both into {split}.")
        if names:
            found[split] = root / names[0]
    others = [name for name in folders if root / name not in found.values()]
    for name in others:
        if (split := _guess_split(name)) and _list_folders(root / name):
            raise DataError(
                f"{root} holds {name}, with folders in it; call the splits train, val and test: rename it to {split}."
            )
    if not found:
        return {"": root}
    if others := [name for name in others if DEVKIT not in name.lower()]:
        raise DataError(
            f"{root} holds {', '.join(found)} and beside them {format_list(others)}; put class folders inside the splits, "
            "and call the splits train, val and test."
        )
    return found


def _guess_split(name: str) -> str:
    """The split that a folder of this name is likely to be; "" if none."""
    plain = ENDINGS.sub("", name.lower())
    return plain if plain in SPLITS else OTHER_NAMES.get(plain, "")


def _list_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones."""
    try:
        with os.scandir(folder) as entries:
            return sorted(e.name for e in entries if not is_hidden(e.name) and e.is_dir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); give yourself permission to read it.") from error


def _read_flat_split(root: Path, folder: Path) -> FolderLayout | None:
    """A split without class folders, its classes listed in a file (data.labels); None for any other."""
    if folder == root or _list_folders(folder):
        return None
    files = sorted(_walk(folder, resolve_ancestors(folder)))
    if (
        not files
        or (classes := read_flat_labels(root, folder.name, [os.path.basename(file) for file, _ in files])) is None
    ):
        return None
    return FolderLayout([os.path.relpath(file, root) for file, _ in files], [size for _, size in files], classes)


def _read_class_folders(root: Path, folder: Path) -> FolderLayout:
    """The images in the class folders of a split, sorted by name. Raises DataError if there is none, or a class has none."""
    found = FolderLayout([], [], [])
    unsupported: list[str] = []
    for name in _list_folders(folder):
        before = len(found.names)
        for file, size in sorted(_walk(folder / name, resolve_ancestors(folder / name), unsupported)):
            found.names.append(os.path.relpath(file, root))
            found.sizes.append(size)
            found.classes.append(name)
        if len(found.names) == before:
            raise DataError(f"the class folder {folder / name} holds no image; put some there, or remove it.")
    if not found.names:
        loose = find_loose_images(folder)
        hint = f"its {len(loose):,} images are in no class folder" if loose else "it is empty of images"
        listed = f", or list them in {folder.name}.txt beside it" if loose and folder != root else ""
        raise DataError(
            f"{folder} holds no class folders with images: {hint}; give each class a folder of its own{listed}."
        )
    if loose := find_loose_images(folder):
        warnings.warn(
            f"{len(loose):,} images beside the class folders of {folder} belong to no class and are left out, such as "
            f"{loose[0]}.",
            UserWarning,
            stacklevel=2,
        )
    if unsupported:
        warnings.warn(
            f"{len(unsupported):,} files in the class folders of {folder} may be images, but of a kind that is not read or "
            f"without suffix, and are left out, such as {os.path.relpath(min(unsupported), folder)}; save them as JPEG or PNG.",
            UserWarning,
            stacklevel=2,
        )
    return found


def find_loose_images(folder: Path) -> list[str]:
    """Names of images beside class folders."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if _is_image(e.name) and not e.is_dir())


def find_unsupported_files(folder: Path) -> list[str]:
    """Files in class folders that may be images of an unsupported kind, by their names below `folder`."""
    unsupported: list[str] = []
    for name in _list_folders(folder):
        for _ in _walk(folder / name, resolve_ancestors(folder / name), unsupported):
            pass
    return sorted(os.path.relpath(file, folder) for file in unsupported)


def _is_image(name: str) -> bool:
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in SUFFIXES


def _may_be_image(name: str) -> bool:
    return not is_hidden(name) and os.path.splitext(name)[1].lower() in UNSUPPORTED


def _walk(folder: Path, parents: frozenset[str], unsupported: list[str] | None = None) -> Iterator[tuple[str, int]]:
    """Yields (path, size in bytes) of every image below a folder; follows links, but not back to its `parents`.

    Files that may be images of an unsupported kind are added to `unsupported`.
    """
    real = os.path.realpath(folder)
    if real in parents:
        return
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    if not is_hidden(entry.name):
                        yield from _walk(Path(entry.path), parents | {real}, unsupported)
                elif _is_image(entry.name):
                    try:
                        yield entry.path, entry.stat().st_size
                    except OSError:  # a broken link counts as an unreadable image, which is reported when it is read
                        yield entry.path, -1
                elif unsupported is not None and _may_be_image(entry.name):
                    unsupported.append(entry.path)
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); give yourself permission to read it.") from error


def _folder_classes(root: Path, classes: dict[str, set[str]]) -> list[str]:
    """The class folders of all splits, sorted; raises DataError with the difference if the splits differ."""
    normalized = {split: {unicodedata.normalize("NFC", name) for name in names} for split, names in classes.items()}
    (first, expected), *others = normalized.items()
    for split, names in others:
        if names != expected:
            raise DataError(
                f"{root / first} and {root / split} hold different classes: only in {first} "
                f"{format_list(sorted(expected - names))}, only in {split} {format_list(sorted(names - expected))}; "
                "give both the same class folders."
            )
    if len(expected) == 1:
        raise DataError(f"{root} has one class only, {min(expected)}; a classifier needs two or more.")
    return sorted(expected)


def _make_folder_split(
    root: Path, layout: FolderLayout, folders: list[str], read_options: ReadOptions, quarantined: frozenset[str]
) -> DiskSplit:
    label_of = {name: i for i, name in enumerate(folders)}
    labels = torch.tensor([label_of[unicodedata.normalize("NFC", name)] for name in layout.classes])
    source = FileSource(root, FileNames(layout.names), np.array(layout.sizes, dtype=np.int64))
    kept: Tensor = torch.arange(len(layout.names))
    if quarantined:
        kept = torch.tensor([i for i, name in enumerate(layout.names) if name not in quarantined], dtype=torch.long)
    empty = set(range(len(folders))) - set(labels[kept].tolist())
    if empty:
        raise DataError(f"the quarantine list leaves no image of class {folders[min(empty)]} in {root}.")
    return DiskSplit(source, kept, labels[kept], ErrorPolicy(read_options.on_bad), read_options.workers)
