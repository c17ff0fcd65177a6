"""Classes of images as annotation tools export them in a folder, besides class folders.

labels.json, data/1.jpg          FiftyOneImageClassificationDataset; in the folder, or in one for each split
samples.json, data/1.jpg         FiftyOne's own data sets, of which a field holds classifications; tags are the splits
project.json, 1.jpg              Label Studio's tasks with choices
train/_classes.csv, train/1.jpg  Roboflow's "multi-label classification": a column of 0 and 1 for each class
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from resnetlab.data.fiftyone import read_class_label
from resnetlab.data.file_lookup import ImageFinder, NameIndex, find_first_split, list_json_files, list_subfolders
from resnetlab.data.json_exports import find_task_image, list_results
from resnetlab.data.label_sets import INDICATORS, LabelLists
from resnetlab.data.tables import ImageList
from resnetlab.data.text_files import PEEKED_FILES, has_patterns, peek_text, read_json, read_text
from resnetlab.errors import DataError, warn
from resnetlab.formatting import format_count, format_list

Row = tuple[str, Path | None, Any, Sequence[str]]


class ClassExport(NamedTuple):
    """A form in which classes are exported.

    Attributes:
        name: of the form, for messages.
        find: the files of a folder that have it.
        read: gives of each image of a file (entry for messages, file, classes, words of which one may name its split); classes
            are a text where images have one, a list where they may have several, None for an image without.
    """

    name: str
    find: Callable[[Path], list[Path]]
    read: Callable[[Path, ImageFinder], Iterator[Row]]


def read_class_export(root: Path) -> ImageList | None:
    """The images of a folder with the classes that a tool's export gives them; None if there is no such export.

    Warns of images without a class, where others have one. Raises DataError for an image that is not there.
    """
    for form in FORMS:
        if not (files := form.find(root)):
            continue
        finder, rows, without = ImageFinder(root), list[tuple[str, Any, str]](), list[str]()
        for file in files:
            try:
                for entry, image, classes, words in form.read(file, finder):
                    if image is None:
                        raise DataError(f"{file}, {entry}: its image does not exist below {root}.")
                    split = find_first_split((*words, *file.relative_to(root).parts[:-1]))
                    if classes is None:
                        without.append(finder.name_of(image))
                    else:
                        rows.append((finder.name_of(image), classes, split))
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                kinds = f"{type(error).__name__}: {error}"
                raise DataError(
                    f"{file} looks like {form.name}, but has another form ({kinds}); export it again."
                ) from error
        if rows:
            return _make_image_list(root, form.name, rows, without)
    return None


def _make_image_list(root: Path, name: str, rows: list[tuple[str, Any, str]], without: list[str]) -> ImageList:
    in_splits = [row for row in rows if row[2]]
    outside = [path for path, _, split in rows if in_splits and not split]
    rows = in_splits or rows
    for left, what in ((without, "class"), (outside, "split")):
        if left:
            count = format_count(len(left), "image")
            warn(f"{root} ({name}): {count} without a {what} left out, such as {left[0]}.")
    paths, found, splits = (list(column) for column in zip(*rows, strict=True))
    if not any(isinstance(classes, list) for classes in found):
        return ImageList(str(root), root, paths, found, splits)
    lists = LabelLists([classes] if isinstance(classes, str) else classes for classes in found)
    return ImageList(str(root), root, paths, lists, splits, classes=lists.classes)


def _find_json(root: Path, stem: str, *patterns: str) -> list[Path]:
    """The JSON files of a folder and the folders in it, of one name if it is given, that `has_patterns` finds patterns in."""
    files = [file for file in list_json_files(root) if stem in ("", file.stem.lower())][:PEEKED_FILES]
    return [file for file in files if has_patterns(file, *patterns)]


def _find_label_files(root: Path) -> list[Path]:
    files = _find_json(root, "labels", r'"classes"\s*:', r'"labels"\s*:')
    return [file for file in files if not has_patterns(file, "", r'"bounding_box"\s*:')]


def _read_label_file(file: Path, finder: ImageFinder) -> Iterator[Row]:
    content = read_json(file)
    by_stem = finder.by_stem(f"{finder.folder_of(file)}/data".strip("/"))
    stems, names = NameIndex(by_stem), content["classes"] or ()
    for name, value in content["labels"].items():
        stem = stems.find(name) or stems.find(Path(name).stem)
        yield name, by_stem[stem] if stem is not None else None, _read_fiftyone_classes(value, names), ()


def _read_fiftyone_classes(value: Any, names: Sequence[str]) -> Any:
    """A number among the names or a name, alone or as "label" of a mapping, or a list of those."""
    if isinstance(value, list):
        return [_read_fiftyone_classes(entry, names) for entry in value]
    label = value["label"] if isinstance(value, dict) else value
    return None if label is None else read_class_label(label, names)


def _read_sample_classes(file: Path, finder: ImageFinder) -> Iterator[Row]:
    """The first field in the order of names that has classifications, "ground_truth" before others."""
    samples = read_json(file)["samples"]
    values = ((key, value) for sample in samples for key, value in sample.items() if isinstance(value, dict))
    fields = {key for key, value in values if str(value.get("_cls")).startswith("Classification")}
    if not fields:  # such values are inside others alone: of objects
        return
    field = _take_first_field(file, sorted(fields, key=lambda name: (name != "ground_truth", name)))
    folder = finder.folder_of(file)
    for number, sample in enumerate(samples, 1):
        value = sample.get(field)
        if value is not None and "classifications" in value:
            value = [entry["label"] for entry in value["classifications"] or ()]
        elif value is not None:
            value = value["label"]
        image = finder.find(str(sample["filepath"]), (folder, f"{folder}/data".strip("/")))
        yield f"sample {number}", image, value, list(map(str, sample.get("tags") or ()))


def _take_first_field(file: Path, fields: list[str]) -> str:
    first, *others = fields
    if others:
        warn(f"{file}: the classes of {first} are read, not those of {format_list(others)}.")
    return first


def _find_task_choices(root: Path) -> list[Path]:
    keys = r'"(choices|annotation_id)"\s*:'  # JSON-MIN gives a single choice as a text, and its annotation's number
    regions = r'"(rectangle|polygon|ellipse|brush)labels"'  # of a project that asks for objects, and of each image more
    files = _find_json(root, "", r"^\s*\[", keys)
    return [file for file in files if not has_patterns(file, "", regions)]


def _read_task_choices(file: Path, finder: ImageFinder) -> Iterator[Row]:
    """The choices of the first control that has any, by the order of names."""
    content = read_json(file)
    if any("data" not in task for task in content):
        raise DataError(f"{file} is Label Studio's JSON-MIN; export JSON, which says what is a choice.")
    tasks = [(task, list_results(task)[0]) for task in content]
    fields = {str(r.get("from_name", "")) for _, results in tasks for r in results if "choices" in r["value"]}
    if not fields:  # such words are in another place
        return
    field = _take_first_field(file, sorted(fields))
    for number, (task, results) in enumerate(tasks, 1):
        mine = [r["value"]["choices"] for r in results if r.get("from_name", "") == field and "choices" in r["value"]]
        chosen = [str(choice) for choices in mine for choice in choices]
        classes = (chosen if len(chosen) > 1 else chosen[0]) if chosen else None
        yield f"task {task.get('id', number)}", find_task_image(task, finder)[1], classes, ()


def _find_roboflow(root: Path) -> list[Path]:
    files = [folder / "_classes.csv" for folder in (root, *list_subfolders(root))]
    return [file for file in files if file.is_file() and peek_text(file).lower().startswith("filename")]


def _read_roboflow(file: Path, finder: ImageFinder) -> Iterator[Row]:
    (_, *names), *rows = csv.reader(read_text(file).splitlines())
    for number, row in enumerate(filter(None, rows), 1):
        name, *values = map(str.strip, row)
        flags = zip(names, (INDICATORS[value.lower()] for value in values), strict=True)
        yield f"row {number}", finder.find(name, (finder.folder_of(file),)), [n for n, given in flags if given], ()


FORMS = (
    ClassExport("FiftyOne's labels.json", _find_label_files, _read_label_file),
    ClassExport(
        "FiftyOne's samples.json",
        lambda root: _find_json(root, "samples", r'"samples"\s*:', r'"_cls"\s*:\s*"Classification'),
        _read_sample_classes,
    ),
    ClassExport("Label Studio's tasks", _find_task_choices, _read_task_choices),
    ClassExport("Roboflow's _classes.csv", _find_roboflow, _read_roboflow),
)
