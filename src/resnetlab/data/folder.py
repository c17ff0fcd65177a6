"""A folder of class folders, with or without train/, val/ and test/; ImageNet's usual layout is one.

    flowers/daisy/1.jpg …                       a stratified fifth, chosen by the images' names, is held out
    flowers/train/daisy/1.jpg …  flowers/val/…  val is evaluated once, at the end
    flowers/train/…  val/…  test/…              val is evaluated while training, test once, at the end

A split may be called by another usual name: training, valid, validation, Test Data, ….

Symbolic links are followed; hidden folders (.git, …) and files that are not images are left out. Folders such as n01440764
get ImageNet's names; a file beside them may give other names, and the classes of a val/ without class folders (data.labels).
"""

from __future__ import annotations

import filecmp
import itertools
import os
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnetlab.data.dataset import GROUP, Columns, Dataset, Split, hold_out
from resnetlab.data.decode import is_hidden, is_image_name, walk_folder
from resnetlab.data.disk_split import DiskSplit, FileNames, FileSource, ImageSource, ReadOptions
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.label_sets import find_classes, number_label_sets
from resnetlab.data.labels import DEVKIT, read_class_names, read_flat_labels
from resnetlab.data.slow_disk import map_files
from resnetlab.errors import DataError, DataErrors, UsageError, warn
from resnetlab.formatting import format_count, format_list

SPLITS = ("train", "val", "test")
OTHER_NAMES = {"training": "train", "validation": "val", "valid": "val", "dev": "val", "testing": "test"}  # of splits
ENDINGS = re.compile(r"[ _-]?(set|data|images)$")  # training_set, Test Data, …
# suffixes of images that are not read
UNSUPPORTED = frozenset({"", ".jpe", ".heic", ".heif", ".jp2", ".jxl", ".tga", ".dng", ".cr2", ".nef", ".arw"})
PART = 256  # images whose sizes are asked for in one go
HELD_OUT = 0.2  # of a folder without val/ and test/


class FolderLayout(NamedTuple):
    """The images of one split: names below the root, sizes in bytes, and each image's class folder; class folders of none."""

    names: list[str]
    sizes: list[int]
    classes: list[str]
    empty: list[str]

    def source(self, root: Path) -> FileSource:
        return FileSource(root, FileNames(self.names), np.array(self.sizes, np.int64))


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """The images of one split.

    Attributes:
        source: may hold those of other splits too.
        indices: positions in `source`; None for all.
        labels: of each image its class, as text.
    """

    source: ImageSource
    labels: Sequence[str]
    indices: NDArray[np.int64] | None = None
    columns: Columns = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        everything = range(len(self.labels)) if self.indices is None else self.indices.tolist()
        return [self.source.names[i] for i in everything]


def load_folder(root: Path, read_options: ReadOptions) -> Dataset:
    """Loads the data set in a folder.

    Raises DataError if it is empty, a class has no image, splits differ in their classes, or a folder cannot be read.
    """
    layouts, problems = read_layouts(root)
    if problems:
        raise DataErrors(str(root), problems)
    images = {split: LabelledImages(layout.source(root), layout.classes) for split, layout in layouts.items()}
    classes = require_classes(str(root), {name for layout in layouts.values() for name in layout.classes}, read_options)
    _warn_of_copies(root, layouts)
    _warn_of_inner_classes(root, layouts)
    return make_dataset(str(root), root, classes, images, read_options)


def read_layouts(root: Path) -> tuple[dict[str, FolderLayout], list[str]]:
    """The images of each split, and all that keeps the folder from being a data set, in sentences.

    Raises DataError if it is ambiguous what the splits are, or a folder cannot be read.
    """
    split_folders = find_split_folders(root)
    layouts = {
        name: _read_flat_split(root, path) or _read_class_folders(root, path) for name, path in split_folders.items()
    }
    problems = []
    for split, layout in tuple(layouts.items()):
        folder = split_folders[split]
        if not layout.names and "train" in layouts and layouts["train"].names and not any(_sort_files(folder)):
            warn(f"{folder} holds no image: left out, as if it were not there.")
            del layouts[split]
        elif not layout.names:
            problems.append(_describe_no_images(root, folder))
        else:
            missing = "holds no image; put some there, or remove it."
            problems += [f"the class folder {folder / name} {missing}" for name in layout.empty]
    return layouts, problems + _compare_classes(root, layouts)


def _describe_no_images(root: Path, folder: Path) -> str:
    """The sentence for a folder without class folders that hold images."""
    loose = find_loose_images(folder)
    hint = f"it holds {format_count(len(loose), 'image')} in no class folder" if loose else "it is empty of images"
    listed = f", or list them in {folder.name}.txt beside it" if loose and folder != root else ""
    name = f" (a folder called {folder.name} is a split here, never a class: rename a class)" if listed else ""
    return f"{folder} holds no class folders with images: {hint}; give each class a folder of its own{listed}{name}."


def make_dataset(
    name: str,
    root: Path,
    classes: Sequence[str],
    images: Mapping[str, LabelledImages],
    read_options: ReadOptions,
    *,
    multi_label: bool = False,
) -> Dataset:
    """A data set of labelled images, by split ("train", "val", "test", or "" for all together).

    Args:
        name: of the data, in messages.
        root: the folder that image names are below; a file in it may name the classes (data.labels).
        classes: the labels' texts, sorted, in Unicode's form NFC.
        multi_label: the labels' texts name several classes each (data.label_sets).
    """
    _warn_of_similar_classes(name, classes)
    names = read_class_names(root, classes)
    order = sorted(range(len(classes)), key=names.__getitem__)  # classes are in the order of their names
    label_of, label_sets = {classes[i]: label for label, i in enumerate(order)}, None
    if multi_label:
        texts = (text for part in images.values() for text in part.labels)
        label_of, label_sets = number_label_sets(texts, [classes[i] for i in order])
    splits = {}
    for split, part in images.items():
        _require_utf8(root, part.names)
        labels = torch.tensor([label_of[unicodedata.normalize("NFC", text)] for text in part.labels])
        indices = torch.arange(len(labels)) if part.indices is None else torch.from_numpy(part.indices)
        errors = ErrorPolicy(read_options.on_bad)
        splits[split] = DiskSplit(part.source, indices, labels, errors, read_options.workers, part.columns)
    ordered = tuple(names[i] for i in order)
    return arrange_splits(name, ordered, select_images(name, splits, ordered, read_options, label_sets), label_sets)


def select_images(
    name: str,
    splits: Mapping[str, DiskSplit],
    classes: Sequence[str],
    read_options: ReadOptions,
    label_sets: Tensor | None = None,
) -> dict[str, DiskSplit]:
    """The splits without the images of the quarantine list, with GROUP as a column if groups are asked for.

    Raises DataError if a class loses all its images, or a group has images in two splits.
    """
    names = {split: part.names for split, part in splits.items()}
    kept, selected = read_options.apply_quarantine(names, name), {}
    for split, part in splits.items():
        columns = _add_groups(part.columns, read_options.groups, names[split], name)
        selected[split] = replace(part, columns=columns).subset(kept[split])
        before, after = (find_classes(each.labels, label_sets) for each in (part, selected[split]))
        if empty := before - after:
            raise DataError(f"the quarantine list leaves no image of class {classes[min(empty)]} in {name}.")
    groups = {split: set(part.columns[GROUP]) for split, part in selected.items() if GROUP in part.columns}
    for (one, first), (two, second) in itertools.combinations(groups.items(), 2):
        if both := sorted(first & second):
            raise DataError(
                f"{name} has images of the group{'s' * (len(both) > 1)} {format_list(both)} in {one} and in {two}; put each "
                "group into one split."
            )
    return selected


def _add_groups(columns: Columns, groups: str, names: Sequence[str], place: str) -> Columns:
    """The columns with GROUP: a column of the table, or what a pattern finds in the images' names.

    Raises DataError if the pattern is not found in a name, UsageError if it is invalid.
    """
    if not groups or groups in columns:
        return {**columns, GROUP: columns[groups]} if groups else columns
    try:
        found = [re.search(groups, name) for name in names]
    except re.error as error:
        raise UsageError(f"groups={groups} is neither a column of {place} nor a valid pattern ({error}).") from None
    if missing := [name for name, match in zip(names, found, strict=True) if match is None]:
        hint = f"columns: {', '.join(columns)}" if columns else "give a regular expression, such as patient[0-9]+"
        raise DataError(
            f"groups={groups} is not found in the names of {format_count(len(missing), 'image')} of "
            f"{place}, such as {missing[0]}; {hint}."
        )
    values = [(match[1] or "") if match.re.groups else match[0] for match in found if match is not None]
    return {**columns, GROUP: np.array(values, object)}


def _warn_of_similar_classes(name: str, classes: Sequence[str]) -> None:
    """Warns of classes that differ in capitals or in spaces at the ends only."""
    same: dict[str, str] = {}
    for text in classes:
        if (other := same.setdefault(text.strip().casefold(), text)) != text:
            warn(f"{name} has two classes {other!r} and {text!r}; if they are one, give their images one name.")


def _warn_of_copies(root: Path, layouts: Mapping[str, FolderLayout]) -> None:
    """Warns if most images of a split have the name, class and size in bytes of a training image, and some its bytes.

    Arrays and images without compression all have one size, so the bytes of three pairs are compared.
    """

    def keys_of(layout: FolderLayout) -> Iterator[tuple[str, str, int]]:
        return zip(map(os.path.basename, layout.names), layout.classes, layout.sizes, strict=True)

    for split in layouts.keys() - {"train", ""} if "train" in layouts else ():
        # not of the training images, which are many more
        own = dict(zip(keys_of(layouts[split]), layouts[split].names, strict=True))
        train = zip(keys_of(layouts["train"]), layouts["train"].names, strict=True)
        pairs = {own[key]: name for key, name in train if key in own}
        some = [pair for _, pair in zip(range(3), pairs.items(), strict=False)]
        if (n := len(pairs)) > len(own) // 2 and any(_have_same_bytes(root / a, root / b) for a, b in some):
            warn(
                f"{format_count(n, 'image')} of {root / split} {'has' if n == 1 else 'have'} the name, class and size of an "
                "image of train: they look like copies, "
                f"and an error measured on them says nothing about others (resnetlab data check {root} compares them)."
            )


def _have_same_bytes(a: Path, b: Path) -> bool:
    try:
        return filecmp.cmp(a, b, shallow=False)
    except OSError:  # which reading the images reports
        return False


def _warn_of_inner_classes(root: Path, layouts: Mapping[str, FolderLayout]) -> None:
    """Warns if all images are in folders inside the class folders, and those have the same names in every class."""
    inner: dict[str, set[str]] = {}
    for split, layout in layouts.items():
        above = 2 if split else 1  # the folders of the split and of the class
        for name, label in zip(layout.names, layout.classes, strict=True):
            if name.count(os.sep) <= above:
                return
            inner.setdefault(label, set()).add(os.path.dirname(name.split(os.sep, above)[-1]))
    common = set.intersection(*inner.values()) if len(inner) > 1 else set()
    if len(common) > 1:
        advice = "if those are the classes, put them into one folder each, or give a table of paths and labels."
        if all(map(guess_split, common)):
            advice = "those are taken together; to use them as splits, put the class folders inside them."
        warn(
            f"the classes of {root} are its folders {format_list(sorted(inner))}, and each of them holds "
            f"{format_list(sorted(common))}; {advice}"
        )


def _require_utf8(root: Path, names: list[str]) -> None:
    """Raises DataError if a name is not in UTF-8, which model files and reports need, or Python's locale cannot open it."""
    text = "".join((str(root), *names))
    if not text.isascii() and sys.getfilesystemencoding() != "utf-8":
        raise DataError(
            f"file names of {str(root)!a} have letters that Python cannot use with the locale's encoding "
            f"({sys.getfilesystemencoding()}); the names are fine: set the environment variable PYTHONUTF8=1."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        invalid = next(str(root / name) for name in names if any("\ud800" <= c <= "\udfff" for c in str(root / name)))
        raise DataError(
            f"the name {invalid!a} is not in UTF-8; rename it (convmv -f latin1 -t utf8 -r --notest {str(root)!a} does so for "
            "names from old archives)."
        ) from None


def arrange_splits(
    name: str, classes: tuple[str, ...], splits: Mapping[str, Split], label_sets: Tensor | None = None
) -> Dataset:
    """A data set from splits called "train", "val", "test", or "" for all images together."""
    if (everything := splits.get("")) is not None:
        if len(everything) < 2 * len(classes):  # too few to train on, but they can be evaluated
            rest, chosen = torch.empty(0, dtype=torch.long), torch.arange(len(everything))
        else:
            count = max(len(classes), round(HELD_OUT * len(everything)))
            rest, chosen = hold_out(everything, count, by_name=True)
        train, test = everything.subset(rest), everything.subset(chosen)
        return Dataset(
            name, classes, train, test, evaluated_split="held-out", all_images=everything, label_sets=label_sets
        )
    evaluated = next(split for split in ("test", "val", "train") if split in splits)
    if evaluated == "train":  # train/ alone
        return arrange_splits(name, classes, {"": splits["train"]}, label_sets)
    train = splits.get("train", splits[evaluated].subset(torch.empty(0, dtype=torch.long)))
    val = splits.get("val") if evaluated == "test" else None
    return Dataset(name, classes, train, splits[evaluated], val=val, evaluated_split=evaluated, label_sets=label_sets)


def find_split_folders(root: Path) -> dict[str, Path]:
    """The folders that contain class folders, by the name of their split (`guess_split`); "" for the root itself.

    Folders beside them without any image are left out with a warning. Raises DataError if others make the splits ambiguous.
    """
    folders = _list_folders(root)
    inner = {name: _list_folders(root / name) for name in folders if guess_split(name)}
    found: dict[str, Path] = {}
    for split in SPLITS:
        # a class may be called Train, but contains no folders
        names = [n for n in folders if guess_split(n) == split and (inner[n] or n == split)]
        if len(names) > 1:
            raise DataError(f"{root} holds {' and '.join(names)}; put the images of both into {split}.")
        if names:
            found[split] = root / names[0]
    others = [name for name in folders if root / name not in found.values() and DEVKIT not in name.lower()]
    if not found or (others and not any(inner[path.name] for path in found.values()) and _hold_images(root, others)):
        return {"": root}  # all are class folders, even one called train
    unused = [name for name in others if not _hold_images(root, [name]) and os.listdir(root / name)]
    if others := [name for name in others if name not in unused]:
        raise DataError(
            f"{root} holds {', '.join(found)} and beside them {format_list(others)}; put class folders inside the splits, "
            "and call the splits train, val and test."
        )
    if unused:
        warn(f"{root}: {format_list(unused)} without images left out.")
    return found


def _hold_images(root: Path, folders: Sequence[str]) -> bool:
    """Whether one of the folders holds an image."""
    return any(is_image_name(entry.name) for name in folders for entry in _walk_files(root / name))


def guess_split(name: str) -> str:
    """The split that a folder, a file or a value of this name means: "train", "val", "test", or "" if none."""
    plain = ENDINGS.sub("", name.strip().lower())
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
    files = [file for _, part in _find_images([folder], []) for file in part]
    names = [os.path.basename(file) for file, _ in files]
    if not files or (classes := read_flat_labels(root, folder.name, names)) is None:
        return None
    return FolderLayout([name_below(root, file) for file, _ in files], [size for _, size in files], classes, [])


def _read_class_folders(root: Path, folder: Path) -> FolderLayout:
    """The images in the class folders of a split, sorted by name."""
    found = FolderLayout([], [], [], [])
    unsupported: list[str] = []
    folders = [folder / name for name in _list_folders(folder)]
    for class_folder, files in _find_images(folders, unsupported):
        found.names.extend(name_below(root, file) for file, _ in files)
        found.sizes.extend(size for _, size in files)
        found.classes.extend(itertools.repeat(class_folder.name, len(files)))
    filled = set(found.classes)
    found.empty.extend(each.name for each in folders if each.name not in filled)
    if found.names and (loose := find_loose_images(folder)):
        warn(
            f"{format_count(len(loose), 'image')} beside the class folders of {folder} left out, of no class, such as "
            f"{loose[0]}."
        )
    if unsupported:
        warn(
            f"{format_count(len(unsupported), 'file')} in the class folders of {folder} left out, of a kind that is not read "
            f"or without suffix, such as {os.path.relpath(min(unsupported), folder)}; save them as JPEG or PNG."
        )
    return found


def find_loose_images(folder: Path) -> list[str]:
    """Names of images beside class folders."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if is_image_name(e.name) and not e.is_dir())


def find_unsupported_files(folder: Path) -> list[str]:
    """Files in class folders that may be images of an unsupported kind, by their names below `folder`."""
    listed = map_files(_sort_files, [folder / name for name in _list_folders(folder)])
    return sorted(os.path.relpath(file, folder) for _, unsupported in listed for file in unsupported)


def _find_images(folders: Sequence[Path], unsupported: list[str]) -> Iterator[tuple[Path, list[tuple[str, int]]]]:
    """Yields each folder with (path, size in bytes) of the images below it, sorted, PART at a time.

    Files that may be images of an unsupported kind are added to `unsupported`.
    """

    def list_parts() -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
        for folder, (images, others) in zip(folders, map_files(_sort_files, folders), strict=True):
            unsupported.extend(others)
            for start in range(0, len(images), PART):
                yield folder, images[start : start + PART]

    yield from map_files(_measure_images, list_parts())


def _sort_files(folder: Path) -> tuple[list[os.DirEntry[str]], list[str]]:
    """The images below a folder, sorted by their paths, and the paths of files that may be images of an unsupported kind."""
    images, unsupported = list[os.DirEntry[str]](), list[str]()
    for entry in _walk_files(folder):
        if is_image_name(entry.name):
            images.append(entry)
        elif os.path.splitext(entry.name)[1].lower() in UNSUPPORTED:
            unsupported.append(entry.path)
    return sorted(images, key=attrgetter("path")), unsupported


def _walk_files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yields the files below a folder (`decode.walk_folder`); raises DataError for a folder that cannot be read."""
    for entry in walk_folder(folder):
        if isinstance(entry, DataError):
            raise entry
        yield entry


def _measure_images(part: tuple[Path, list[os.DirEntry[str]]]) -> tuple[Path, list[tuple[str, int]]]:
    """The same with path and size of each image; -1 for a broken link, which is reported when it is read."""
    sizes: list[tuple[str, int]] = []
    for entry in part[1]:
        try:
            sizes.append((entry.path, entry.stat().st_size))
        except OSError:
            sizes.append((entry.path, -1))
    return part[0], sizes


def name_below(root: str | Path, file: str) -> str:
    """The path of a file below a folder, relative to it; `os.path.relpath` takes half the time of reading a large folder."""
    above = os.path.join(root, "")
    return file[len(above) :] if file.startswith(above) else os.path.relpath(file, root)


def _compare_classes(root: Path, layouts: Mapping[str, FolderLayout]) -> list[str]:
    """Sentences on the splits whose class folders differ from those of the first one."""
    (first, expected), *others = (
        (split, {unicodedata.normalize("NFC", name) for name in {*layout.classes, *layout.empty}})
        for split, layout in layouts.items()
    )
    problems = []
    for split, names in others:
        if names and expected and names != expected:
            same = {name.casefold() for name in names - expected} & {name.casefold() for name in expected - names}
            hint = ", in the same capitals" if same else ""
            problems.append(
                f"{root / first} and {root / split} hold different classes: only in {first} "
                f"{format_list(sorted(expected - names))}, only in {split} {format_list(sorted(names - expected))}; "
                f"give both the same class folders{hint}."
            )
    return problems


def require_classes(name: str, labels: Iterable[str], read_options: ReadOptions) -> list[str]:
    """The classes, sorted and in Unicode's form NFC; raises DataError if there is one only, unless that is enough."""
    classes = sorted({unicodedata.normalize("NFC", label) for label in labels})
    if len(classes) == 1 and not read_options.one_class:
        raise DataError(f"{name} has one class only, {classes[0]}; a classifier needs two or more.")
    return classes
