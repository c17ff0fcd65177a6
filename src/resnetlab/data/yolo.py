"""YOLO's format (Ultralytics, Roboflow, Label Studio): a text file for each image, and data.yaml or classes.txt for the names.

    images/train/1.jpg   labels/train/1.txt      "3 0.5 0.5 0.2 0.1": class, centre, width and height as fractions of the image,
    train/images/1.jpg   train/labels/1.txt      or "3 x1 y1 x2 y2 x3 y3 …", an outline; behind a box, key points (left out)

data.yaml has `names`, and `train`, `val` and `test`: folders or lists of images; obj.data (Darknet, CVAT's "YOLO 1.1") names
lists of images. An image without a text file, or with an empty one, is background.
"""

from __future__ import annotations

import math
import re
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from resnetlab.data.annotations import Annotations, ImageRecord, ObjectRecord
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.file_lookup import ImageFinder, NameIndex, find_entry, find_split, list_subfolders
from resnetlab.data.text_files import peek_lines, read_lines, read_text
from resnetlab.data.voc import split_by_folders
from resnetlab.errors import DataError
from resnetlab.formatting import format_count, format_list

CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels", "labels.txt")
LABEL_DEPTH = 3  # labels/train/day 1/0001.txt
ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|.)")
INLINE_ITEM = re.compile(
    r"""\s*((?:[^,:"']+:\s*)?(?:"(?:\\.|[^"\\])*"|'(?:''|[^'])*'|[^,]+))"""
)  # of [a, "b"] and {0: a, 1: "b"}


class YoloConfig(NamedTuple):
    """The names of the classes, the places of the splits, and whether boxes have key points, as data.yaml gives them."""

    file: Path | None
    names: tuple[str, ...]
    splits: dict[str, list[str]]
    key_points: bool = False


def find_yolo_labels(root: Path) -> bool:
    """Whether a folder has YOLO's label files, up to LABEL_DEPTH folders deep: numbers, a box or outline on each line."""
    folders = [root]
    for _ in range(LABEL_DEPTH + 1):
        for folder in folders:
            texts = filter(None, map(peek_lines, sorted(folder.glob("*.txt"))))  # empty ones are of background
            for lines in islice(texts, 20):
                if all(re.fullmatch(r"\d+(\s+-?[\d.]+([eE][-+]?\d+)?){4,}", line) for line in lines):
                    return True
        folders = [inner for folder in folders for inner in list_subfolders(folder)]
    return False


def read_yolo(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """The images of each split with their objects, whose coordinates are fractions."""
    config = read_yolo_config(root)
    finder = ImageFinder(root)
    texts = NameIndex(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() == ".txt")
    splits, without, count = {}, 0, 0
    listed, notes = _list_split_images(root, finder, config)
    used = {name for images in listed.values() for name in images}
    unused = [path for path in finder.paths if path not in used and "labels" not in path.split("/")[:-1]]
    for split, images in listed.items():
        records = []
        for name in images:
            expected = _label_file(name)
            labels = root / (texts.find(expected) or expected)
            objects = _read_labels(labels, config, errors) if labels.is_file() else []
            without += not labels.is_file()
            records.append(ImageRecord(name, root / name, str(labels), (0, 0), objects, relative=True))
        count += len(records)
        splits[split] = records
    if without == count:
        every = format_count(count, "image")
        raise DataError(f"{root}: none of its {every} has a label file labels/….txt; check where they are.")
    if without:
        notes.append(f"{without:,} of {count:,} images have no label file and count as background")
    if config.key_points:
        notes.append("the key points behind the boxes (kpt_shape) are left out")
    if unused:
        where = f"the splits of {config.file.name}" if config.splits and config.file else "the folders of the splits"
        notes.append(f"{format_count(len(unused), 'image')} outside {where} are left out, such as {unused[0]}")
    return Annotations("YOLO", config.names, dict(splits), tuple(notes))


def read_yolo_config(root: Path) -> YoloConfig:
    """The content of data.yaml (or another *.yaml with names), or of a class file; raises DataError without names."""
    for file in sorted((*root.glob("*.yaml"), *root.glob("*.yml")), key=lambda file: (file.stem != "data", file.name)):
        values = parse_simple_yaml(file)
        names = values.get("names")
        if isinstance(names, dict):
            if words := [key for key in names if not key.isdecimal()]:
                hint = "write the classes as 0: NAME, 1: NAME, …."
                raise DataError(f"{file}: {words[0]!r} in `names` is no number; {hint}")
            names = [names[key] for key in sorted(names, key=int)]
        if isinstance(names, list) and names:
            splits: dict[str, list[str]] = {}
            for key, value in values.items():  # valid: beside val: is the same split
                if (split := find_split(key)) and value:
                    splits.setdefault(split, []).extend([value] if isinstance(value, str) else value)
            return YoloConfig(file, tuple(map(str, names)), splits, bool(values.get("kpt_shape")))
    if (class_file := _find_class_file(root)) is not None:
        darknet = find_entry(root, "obj.data")
        pairs = (line.partition("=") for line in read_lines(darknet)) if darknet is not None else ()
        places: dict[str, list[str]] = {}
        for key, _, place in pairs:
            if split := find_split(key.strip()):
                places.setdefault(split, []).append(place.strip())
        return YoloConfig(darknet, tuple(read_lines(class_file)), places)
    raise DataError(f"{root} has YOLO's labels, but no data.yaml with `names` and no classes.txt; add one of them.")


def _find_class_file(root: Path) -> Path | None:
    """The file of class names in a folder, or in the folders of its splits; raises DataError if those differ."""
    splits = [folder for folder in list_subfolders(root) if find_split(folder.name)]
    found = [file for folder in (root, *splits) if (file := find_entry(folder, *CLASS_FILES)) is not None]
    if found and found[0].parent != root:
        for file in found[1:]:
            if read_lines(file) != read_lines(found[0]):
                raise DataError(
                    f"{found[0]} and {file} name different classes, or in another order; export both again."
                )
    return found[0] if found else None


def parse_simple_yaml(file: Path) -> dict[str, Any]:
    """The top level of a YAML file as YOLO's tools write it: texts, lists and mappings of one level, inline or on lines.

    Raises DataError for an inline list or mapping that is not closed.
    """
    values: dict[str, Any] = {}
    key = ""
    lines = iter([re.sub(r"\s+#.*$|^#.*$", "", line).rstrip() for line in read_text(file).split("\n")])
    for line in lines:
        item = re.fullmatch(r"\s*-\s+(.*)", line)
        pair = re.fullmatch(r"(\s*)([^\s:][^:]*):(?:\s+(.*))?", line)
        if item and key:
            values[key] = [*(values[key] or []), _parse_scalar(item[1])]
        elif pair and pair[1] and key:
            values[key] = {**(values[key] or {}), _parse_scalar(pair[2]): _parse_scalar(pair[3] or "")}
        elif pair and not pair[1]:
            key, text = pair[2].strip(), (pair[3] or "").strip()
            if close := {"[": "]", "{": "}"}.get(text[:1]):
                while not text.endswith(close):  # it goes on on the next line
                    if (more := next(lines, None)) is None:
                        raise DataError(f"{file}: {text[:40]!r} is not closed; write one name a line.")
                    text += f" {more.strip()}"
            values[key] = _parse_inline(text) if close else _parse_scalar(text)
    return values


def _parse_scalar(text: str) -> str:
    """A text without its quotes; in double ones, backslash and x, u or U with hexadecimal digits are a character."""
    text = text.strip()
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        return text
    if text[0] == "'":
        return text[1:-1].replace("''", "'")
    return ESCAPE.sub(lambda m: chr(int(m[1][1:], 16)) if m[1][1:] else m[1], text[1:-1])


def _parse_inline(text: str) -> list[str] | dict[str, str]:
    parts = [part for part in INLINE_ITEM.findall(text[1:-1]) if part.strip()]
    if text[0] == "[":
        return list(map(_parse_scalar, parts))
    return {_parse_scalar(key): _parse_scalar(value) for key, _, value in (part.partition(":") for part in parts)}


def _list_split_images(root: Path, finder: ImageFinder, config: YoloConfig) -> tuple[dict[str, list[str]], list[str]]:
    """The images of each split, paths below the root, by data.yaml, or else by the folders' names; and notes.

    A split to evaluate on whose places hold no image is left out, and a test split that is not there beside another
    (Roboflow's data.yaml names one in any case). Raises DataError if that is the one to train on.
    """
    paths = [path for path in finder.paths if "labels" not in path.split("/")[:-1]]
    found: dict[str, list[str]] = {}
    notes: list[str] = []
    for split, places in config.splits.items():
        listed = {place: _list_place(root, finder, place, paths) for place in places}
        missing = [place for place, names in listed.items() if names is None]
        if missing and (split != "test" or "val" not in config.splits or len(missing) < len(listed)):
            raise DataError(
                f"{config.file} names {missing[0]}, which is not below {root}; correct it, or move the images there."
            )
        if every := [name for names in listed.values() for name in names or ()]:
            found[split] = list(dict.fromkeys(every))
            continue
        state = "is not there" if missing else "holds no image"
        empty = f"{config.file} names {format_list(places)} for the {split} split, which {state}"
        if split in ("train", "trainval"):
            raise DataError(f"{empty}; put some there, or correct the line.")
        notes.append(f"{empty}, so that split is left out")
    if found:
        return found, notes
    found = split_by_folders(paths)
    if "train" in found:  # images beside the splits are previews of the tool
        found.pop("", None)
    return found, notes


def _list_place(root: Path, finder: ImageFinder, place: str, paths: list[str]) -> list[str] | None:
    """The images of a folder or list that data.yaml names: relative to `path`, to the file, or with leading parts dropped.

    None if there is none. Raises DataError if a list names an image that is not there.
    """
    parts = [part for part in re.split(r"[/\\]", place) if part not in ("", ".", "..")]
    for start in range(len(parts)):
        rest = "/".join(parts[start:])
        entry = root / rest
        if entry.is_dir():
            return [path for path in paths if path.startswith(f"{rest}/")]
        if entry.suffix == ".txt" and entry.is_file():
            listed = {line: finder.find(line, ("",)) for line in read_lines(entry)}
            if missing := [line for line, file in listed.items() if file is None]:
                raise DataError(f"{entry} lists {missing[0]}, which is not below {root}.")
            return [file.relative_to(root).as_posix() for file in listed.values() if file is not None]
    return None


def _label_file(image: str) -> str:
    """labels/….txt for images/….jpg (the last folder of that name), or else the text file beside the image; below the root."""
    *folders, name = image.split("/")
    for i in range(len(folders) - 1, -1, -1):
        if folders[i].lower() == "images":
            folders[i] = "labels"
            break
    return "/".join([*folders, f"{name.rpartition('.')[0]}.txt"])


def _read_labels(file: Path, config: YoloConfig, errors: ErrorPolicy) -> list[ObjectRecord]:
    objects = []
    for number, line in enumerate(read_lines(file), 1):
        where = f"{file}, line {number}"
        try:
            objects.append(_parse_line(line, where, config))
        except ValueError as error:
            errors.reject(where, str(error))
            objects.append(ObjectRecord(where, None, None))
    return objects


def _parse_line(line: str, where: str, config: YoloConfig) -> ObjectRecord:
    """One object; raises ValueError."""
    words, names = line.split(), config.names
    try:
        label, *values = map(float, words)
    except ValueError:
        label, values = math.inf, []
    if not math.isfinite(label):
        raise ValueError(f"{line[:40]!r} does not consist of numbers")
    if not (label.is_integer() and 0 <= label < len(names)):
        raise ValueError(f"its class is {words[0]}, but there are {format_count(len(names), 'class')}, 0 the first")
    if len(values) == 4 or (config.key_points and len(values) > 4):
        x, y, w, h = values[:4]
        return ObjectRecord(where, names[int(label)], (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    if len(values) < 6 or len(values) % 2:
        raise ValueError(f"it has {len(values)} numbers behind the class; a box has 4, an outline 6, 8, 10 or more")
    return ObjectRecord(where, names[int(label)], None, [values])
