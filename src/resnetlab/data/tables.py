"""Tables of images: CSV, TSV or Parquet with columns of paths and labels, and if you like of splits and of groups.

    photos.csv                              path,label,split,group
                                            photos/daisy/1.jpg,daisy,train,garden 7
    photos.csv:label=species,group=garden   names the columns that have other names than the usual ones
    photos.csv                              path,labels              several classes per image, or none
                                            1.jpg,cat;dog
    photos.csv                              path,cat,dog             the same, a column of 0 and 1 for each class
                                            1.jpg,1,1
    photos.csv:labels=tags                  names the list's column; labels=cat+dog those of some classes

Paths are relative to the table's folder. Images get names below the folder that all of them share, and are in the order of
classes and names, so a table that names a folder's images is the same data set as the folder, bit for bit.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
import os
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from resnetlab.data.dataset import GROUP, Columns, Dataset
from resnetlab.data.disk_split import FileNames, FileSource, ReadOptions
from resnetlab.data.file_lookup import find_spelling, index_folder
from resnetlab.data.folder import PART, LabelledImages, guess_split, make_dataset, name_below, require_classes
from resnetlab.data.label_sets import INDICATORS, LabelLists, join_classes, split_classes
from resnetlab.data.object_store import strip_secrets
from resnetlab.data.slow_disk import map_files
from resnetlab.data.text_files import read_text
from resnetlab.errors import DataError, DataErrors, UsageError, missing_package, warn
from resnetlab.formatting import format_count, format_list

USUAL_NAMES = {  # use -> names of its column, in small letters with "_" between words
    "path": (
        "path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path",
    ),
    "label": ("label", "class", "class_name", "category", "target"),
    "labels": ("labels", "tags", "classes", "class_names", "categories", "targets"),  # several per image
    "split": ("split", "set", "subset", "partition"),
    GROUP: (GROUP, "group_id"),
}  # fmt: skip
TABLE = re.compile(r"(.+\.(?:csv|tsv|parquet))(?::([^/\\]+))?", re.IGNORECASE)
MAX_MISSING = 100  # files; for more that are not there, no other form of their names is tried


@dataclass(frozen=True, eq=False)
class ImageList:
    """Paths of images with what is known of each.

    Attributes:
        name: of the list, in messages.
        base: the folder that the paths are relative to.
        splits: of each image "train", "val" or "test" (or another usual name); empty if all images are together.
        columns: whatever else is known.
        classes: all that there are, where `labels` name several each (data.label_sets); empty where each image has one.
    """

    name: str
    base: Path
    paths: Sequence[str]
    labels: Sequence[str]
    splits: Sequence[str] = ()
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    classes: Sequence[str] = ()

    def describe(self, row: int, problem: str) -> str:
        """The sentence for a problem in a row, counted from 0."""
        return f"{self.name}, row {row + 1:,}: {problem}"


def is_table(data: str) -> bool:
    """Whether DATA is a table, by the suffix of its file."""
    return TABLE.fullmatch(data) is not None and not Path(data).is_dir()


def table_file(data: str) -> Path:
    """The file of a table that may be followed by the names of columns."""
    match = TABLE.fullmatch(data)
    return Path(match[1] if match else data)


def load_table(data: str, read_options: ReadOptions) -> Dataset:
    """Loads the data set of a table.

    Raises:
        DataError: the table is missing or damaged, or a row of it cannot be used.
        UsageError: a column that DATA names is not there.
    """
    file = table_file(data)
    columns = _read_columns(file)
    uses = _find_columns(data, columns, ("path",))
    labels: list[str]
    several = None if "label" in uses else _read_label_lists(file, columns, uses)
    if several is not None:
        (labels, used), classes = several, several[0].classes
    else:
        uses = _find_columns(data, columns, ("path", "label"))
        labels, used, classes = columns[uses["label"]], [uses["label"]], []
        if any(";" in label for label in labels):
            warn(
                f"{file} has labels with a ';', each of which is one class here; if they name several classes, say so: "
                f"{file}:labels={uses['label']}"
            )
    splits = columns[uses["split"]] if "split" in uses else ()
    others = {name: values for name, values in columns.items() if name not in (uses["path"], *used)}
    others |= {GROUP: columns[uses[GROUP]]} if GROUP in uses else {}
    images = ImageList(str(file), file.parent, columns[uses["path"]], labels, splits, others, classes)
    return load_listed(images, read_options)


def _read_label_lists(
    file: Path, columns: Mapping[str, Sequence[str]], uses: Mapping[str, str]
) -> tuple[LabelLists, list[str]] | None:
    """The classes of each image, and the columns that give them: a list, or 0 and 1 per class; None if there are none.

    Raises DataError if a column is mostly of 0 and 1, but not everywhere.
    """
    named = uses.get("labels")
    if named is not None and named in columns:
        return LabelLists(map(split_classes, columns[named])), [named]
    others = [name for name in columns if name not in uses.values()]
    found = []
    for name in named.split("+") if named else others:
        known = [value.strip().lower() in INDICATORS for value in columns[name]]
        if not all(known) and (named or 2 * sum(known) > len(known)):
            row = known.index(False)
            raise DataError(
                f"{file}, row {row + 1:,}: column {name} has {columns[name][row]!r}, while it has 0 or 1 elsewhere, for images "
                f"without and with this class; correct it, or name the columns of the classes: {file}:labels=CLASS+CLASS"
            )
        if all(known):
            found.append(name)
    if len(found) < 2:
        return None
    flags = [[INDICATORS[value.strip().lower()] for value in columns[name]] for name in found]
    return LabelLists((itertools.compress(found, row) for row in zip(*flags, strict=True)), found), found


def list_table_images(data: str) -> list[Path]:
    """The image files that a table names; it needs no labels."""
    file = table_file(data)
    columns = _read_columns(file)
    paths = columns[_find_columns(data, columns, ("path",))["path"]]
    return [Path(os.path.normpath(file.parent / path)) for path in paths]


def load_listed(images: ImageList, read_options: ReadOptions) -> Dataset:
    """The data set of listed images. Raises DataError if none is there, a row is incomplete, or an image occurs twice."""
    several = bool(images.classes)
    labels = [unicodedata.normalize("NFC", label.strip()) for label in images.labels]
    splits, problems = _normalise_splits(images)
    for row, (path, label) in enumerate(zip(images.paths, labels, strict=True)):
        if not (path.strip() and (label or several)):
            problem = "a path and a label are needed, and one is empty; fill it in, or remove the row."
            problems.append(images.describe(row, problem))
    if problems:
        raise DataErrors(images.name, problems)
    classes = require_classes(images.name, images.classes or labels, read_options)
    files, sizes = _find_files(images)
    root = os.path.commonpath({os.path.dirname(file) for file in files})
    names = [name_below(root, file) for file in files]
    row_of: dict[str, int] = {}
    for row, name in enumerate(names):
        if (first := row_of.setdefault(name, row)) != row:
            other = f" as {labels[first]!r} and here as {labels[row]!r}" if labels[first] != labels[row] else ""
            problem = f"{images.paths[row]} is in row {first + 1:,} too{other}; remove one of the rows."
            problems.append(images.describe(row, problem))
    if problems:
        raise DataErrors(images.name, problems)
    parts = {}
    for split in dict.fromkeys(splits):
        rows = [row for row in range(len(names)) if splits[row] == split]
        rows.sort(key=lambda row: (labels[row], names[row]))  # a folder's order
        own = np.array([sizes[row] for row in rows], np.int64)
        columns: Columns = {
            k: np.array([sys.intern(v[row]) for row in rows], object) for k, v in images.columns.items()
        }
        source = FileSource(Path(root), FileNames(names[row] for row in rows), own)
        parts[split] = LabelledImages(source, [labels[row] for row in rows], columns=columns)
    trained_on = parts.get("train", next(iter(parts.values()))).labels
    if not several and (unseen := sorted(set(classes) - set(trained_on))):
        raise DataError(f"{images.name} has no image to train on of class {format_list(unseen)}; add some.")
    return make_dataset(images.name, Path(root), classes, parts, read_options, multi_label=several)


def _read_columns(file: Path) -> dict[str, list[str]]:
    """The columns of a table as text, in its order; "" for missing values."""
    if not file.is_file():
        raise DataError(f"{file} is not there.")
    try:
        if file.suffix.lower() == ".parquet":
            return _read_parquet(file)
        return _read_csv(read_text(file), file)
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}).") from error


def _read_csv(text: str, file: Path) -> dict[str, list[str]]:
    head = text.partition("\n")[0]
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=head.count)  # Excel may write semicolons
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True) if any(row)]
    except csv.Error as error:
        raise DataError(f"{file} cannot be read as a table ({error}); fix its quotes.") from error
    if len(rows) < 2:
        raise DataError(f"{file} has no rows below its header; give one row per image.")
    header = [name.strip() for name in rows[0]]
    if twice := {name for name in header if name and header.count(name) > 1}:
        raise DataError(f"{file} has two columns {min(twice)!r}; rename one.")
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(header):
            raise DataError(
                f"{file}, row {number:,}: {format_count(len(row), 'value')}, but the header has "
                f"{format_count(len(header), 'column')}; quote values that contain {delimiter!r}."
            )
    return {name: list(values) for name, values in zip(header, zip(*rows[1:], strict=True), strict=True) if name}


def _read_parquet(file: Path) -> dict[str, list[str]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise missing_package(str(file), "pyarrow", "parquet") from None
    try:
        table = parquet.read_table(file)
    except ArrowException as error:
        raise DataError(f"{file} cannot be read as Parquet ({error}).") from error
    if not table.num_rows:
        raise DataError(f"{file} has no rows; give one row per image.")

    def to_text(value: object) -> str:
        if value is None or value != value:  # NaN is missing too
            return ""
        return join_classes(map(str, value)) if isinstance(value, list) else str(value)

    return {name: list(map(to_text, table[name].to_pylist())) for name in table.column_names}


def _find_columns(data: str, columns: Mapping[str, Sequence[str]], needed: Sequence[str]) -> dict[str, str]:
    """use ("path", "label", "split", "group") -> the column for it, named by DATA or by a usual name."""
    file, (_, named) = table_file(data), TABLE.fullmatch(data).groups()  # type: ignore[union-attr]
    uses: dict[str, str] = {}
    for pair in named.split(",") if named else ():
        use, _, column = (part.strip() for part in pair.partition("="))
        column = next((name for name in columns if name.casefold() == column.casefold()), column)
        several = set(column.split("+")) <= columns.keys() if use == "labels" else False
        if use not in USUAL_NAMES or not (column in columns or several):
            raise UsageError(
                f"{pair!r} after {file} is not one of {', '.join(USUAL_NAMES)} = one of its columns "
                f"({format_list(list(columns))}); for example {file}:label={list(columns)[-1]}"
            )
        uses[use] = column
    plain = {re.sub(r"[ -]+", "_", name.strip().lower()): name for name in columns}
    for use in USUAL_NAMES.keys() - uses.keys() - ({"label"} if "labels" in uses else set()):
        found = [plain[name] for name in USUAL_NAMES[use] if name in plain]
        if len(found) > 1 and use in needed:
            raise UsageError(
                f"{file} has several columns for the {use}, {format_list(found)}; name one: {file}:{use}={found[0]}"
            )
        if found:
            uses[use] = found[0]
    if missing := [use for use in needed if use not in uses]:
        example = next((name for name in reversed(list(columns)) if name not in uses.values()), "COLUMN")
        raise UsageError(
            f"{file} has no column called {' or '.join(USUAL_NAMES[missing[0]])}, but {format_list(list(columns))}; name the "
            f"one of the {missing[0]}, for example {file}:{missing[0]}={example}"
        )
    return uses


def _find_files(images: ImageList) -> tuple[list[str], list[int]]:
    """Normalised absolute paths, and sizes in bytes: -1 for a file that is not there, which is reported when it is read.

    Names in other capitals, with backslashes or without their suffix are understood (data.file_lookup). Raises DataError if no
    file is there.
    """
    base, list_names, missing = os.path.abspath(images.base), functools.cache(index_folder), 0
    files, sizes, ending = [], [], ""  # which the names before left out
    respelled = []

    def list_parts() -> Iterator[tuple[Sequence[str], str]]:
        for start in range(0, len(images.paths), PART):
            yield images.paths[start : start + PART], ending

    def measure(part: tuple[Sequence[str], str]) -> list[tuple[str, str, int]]:
        found = [os.path.normpath(os.path.join(base, path)) for path in part[0]]
        return [(file, part[1], _file_size(file + part[1])) for file in found]

    measured = itertools.chain.from_iterable(map_files(measure, list_parts()))
    for row, (path, (file, tried, size)) in enumerate(zip(images.paths, measured, strict=True)):
        if "://" in path:
            problem = f"{strip_secrets(path)} is an address; download the images, and name their files."
            raise DataError(images.describe(row, problem))
        if size < 0 and tried != ending:  # which a row of the same part had
            tried, size = ending, _file_size(file + ending)
        if size >= 0:
            file += tried
        elif missing < MAX_MISSING:
            spelled = os.path.normpath(os.path.join(base, path.replace("\\", "/")))
            if (found := find_spelling(spelled, list_names)) is not None:
                file, size = found, _file_size(found)
                if not unicodedata.normalize("NFC", found).startswith(unicodedata.normalize("NFC", spelled)):
                    respelled.append((path, os.path.relpath(found, base)))
                ending = found.removeprefix(spelled) if found.startswith(spelled) else ending
        missing += size < 0
        files.append(file)
        sizes.append(size)
    if respelled:
        (path, found), count = respelled[0], format_count(len(respelled), "name")
        warn(f"{images.name}: {count} taken in other capitals than the rows have, such as {found} for {path}.")
    if max(sizes) < 0:
        raise DataError(
            f"none of the {format_count(len(files), 'image')} of {images.name} is there, such as {images.paths[0]!r}; "
            f"paths are relative to {base}."
        )
    return files, sizes


def _file_size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except (OSError, ValueError):
        return -1


def _normalise_splits(images: ImageList) -> tuple[list[str], list[str]]:
    """Of each image "train", "val" or "test", "" if the list has no splits or an empty one for every image; and problems."""
    if not any(text.strip() for text in images.splits):
        return [""] * len(images.paths), []
    splits = [guess_split(text) for text in images.splits]
    problems = [
        images.describe(row, f"{text!r} is not a split; write train, val or test.")
        for row, (split, text) in enumerate(zip(splits, images.splits, strict=True))
        if not split
    ]
    return splits, problems
