"""COCO's format: a JSON for each split, with `images`, `annotations` (bbox [x, y, width, height]) and `categories`.

The JSON of a split is named after it (`train.json`, `instances_val2017.json`, `instances_Train.json`), or is alone in its
folder (`train/_annotations.coco.json`, `train/labels.json`), in the data's folder or one below. Images are beside it, in the
folder, in images/, or in a folder named after the split.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from resnetlab.data.annotations import Annotations, Box, ImageRecord, ObjectRecord
from resnetlab.data.coco_document import CocoAnnotation, CocoDocument, read_coco_document
from resnetlab.data.decode import SUFFIXES
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.file_lookup import ImageFinder, find_split, list_json_files
from resnetlab.data.folder import SPLITS
from resnetlab.data.text_files import PEEK, peek_text
from resnetlab.errors import DataError
from resnetlab.formatting import format_count, format_list

# of official COCO's other documents, and of what data sets keep beside
OTHER_DOCUMENTS = re.compile(r"(captions|person_keypoints|panoptic|stuff|image_info)_.*")
# documents whose folder is named after their split
OWN_FOLDERS = re.compile(r"_annotations\.coco|labels|annotations|instances|coco|result|data")


def read_coco(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """The images of each split with their objects; classes in the order of the categories' ids."""
    files = find_coco_files(root)
    documents = {split: read_coco_document(file, masks) for split, file in files.items()}
    notes = (*_drop_root_category(documents), *_read_crowds_as_objects(documents))
    if unused := [file.relative_to(root).as_posix() for file in _list_documents(root) if file not in files.values()]:
        notes += (f"{format_list(unused)}: named after no split, and left out",)
    categories = {split: _read_categories(files[split], content) for split, content in documents.items()}
    classes = _compare_categories(files, categories)
    finder = ImageFinder(root)
    splits: dict[str, Iterable[ImageRecord]] = {}
    for split, file in files.items():
        read_object = partial(_read_object, categories=categories[split], masks=masks, errors=errors)
        splits[split] = list(_read_images(finder, file, documents.pop(split), split, read_object, errors))
    return Annotations("COCO", classes, splits, notes)


def find_coco_files(root: Path) -> dict[str, Path]:
    """The JSON of each split; "" for a single file of no split. Raises DataError if it is not clear which is which."""
    found: dict[str, Path] = {}
    other = []
    for file in _list_documents(root):
        split = _find_split(file, root)
        if not split:
            other.append(file)
        elif split in found:
            raise DataError(f"{found[split]} and {file} are both for the split {split}; keep one of them.")
        else:
            found[split] = file
    if not found and len(other) > 1:
        names = format_list([file.relative_to(root).as_posix() for file in other])
        raise DataError(
            f"{root}: no document is named after a split ({names}); call them train.json, val.json, test.json."
        )
    if not found and other:
        found[""] = other[0]
    return dict(sorted(found.items(), key=lambda item: (*SPLITS, "trainval", "").index(item[0])))


def _find_split(file: Path, root: Path) -> str:
    own_folder = OWN_FOLDERS.fullmatch(file.stem.lower()) and file.parent != root
    return find_split(file.parent.name if own_folder else file.stem)


def _list_documents(root: Path) -> list[Path]:
    """The JSON files in a folder and the folders in it; of official COCO's those with boxes and masks."""
    files = [file for file in list_json_files(root) if not OTHER_DOCUMENTS.fullmatch(file.stem.lower())]
    instances = [file for file in files if file.stem.lower().startswith("instances")]
    return instances or [file for file in files if _find_split(file, root) or _may_be_coco(file)]


def _may_be_coco(file: Path) -> bool:
    """Whether the begin of a JSON file has a key of COCO's; categories and info alone are Label Studio's notes.json."""
    keys = "images|annotations" if file.stat().st_size < PEEK else "images|annotations|categories"
    return re.search(rf'"({keys})"\s*:', peek_text(file)) is not None


def _identify(value: Any) -> int | str | None:
    """An id, a number or a word; None for any other value. Numbers in quotes are numbers."""
    if isinstance(value, bool) or not isinstance(value, int | str | float):
        return None
    if isinstance(value, str):
        return int(value) if re.fullmatch(r"-?\d{1,18}", value) else value
    return int(value) if float(value).is_integer() else None


def _drop_root_category(documents: Mapping[str, CocoDocument]) -> tuple[str, ...]:
    """Leaves out Roboflow's root: a category that others name as their supercategory and that no object in any split has."""
    roots = set.intersection(*map(_find_unused_parents, documents.values()))
    for content in documents.values():
        content.categories = [c for c in content.categories if (_identify(c["id"]), str(c["name"])) not in roots]
    return tuple(
        f"the category {name!r} is only the supercategory of others and has no object; it is left out"
        for _, name in sorted(roots, key=str)
    )


def _read_crowds_as_objects(documents: Mapping[str, CocoDocument]) -> tuple[str, ...]:
    """Reads crowds as objects where there is nothing else: CVAT and Datumaro mark all masks in run lengths so."""
    annotations = [annotation for content in documents.values() for annotation in content.annotations]
    if not annotations or not all(annotation.crowd for annotation in annotations):
        return ()
    for content in documents.values():
        content.annotations = [annotation._replace(crowd=False) for annotation in content.annotations]
    return ("every object is marked iscrowd, as some tools mark all masks; they are read as objects",)


def _find_unused_parents(content: CocoDocument) -> set[tuple[int | str | None, str]]:
    used = {_identify(a.category_id) for a in content.annotations}
    parents = {c.get("supercategory") for c in content.categories if c.get("supercategory") != c["name"]}
    found = {(_identify(c["id"]), str(c["name"])) for c in content.categories if c["name"] in parents}
    return {(key, name) for key, name in found if key not in used}


def _read_categories(file: Path, content: CocoDocument) -> dict[int | str, str]:
    """id -> name, in the order of the ids, or as listed if one of them is a word.

    Raises DataError if two categories are not distinct, or an id is neither a number nor a word.
    """
    names: dict[int | str, str] = {}
    for i, category in enumerate(content.categories):
        if (key := _identify(category["id"])) is None:
            raise DataError(f"{file}: entry {i} of 'categories' has the id {category['id']!r}; give it a number.")
        names[key] = str(category["name"])
    if len(set(names.values())) < len(content.categories):
        raise DataError(f"{file} has two categories of one name or one id; give each its own.")
    if not names:
        raise DataError(f"{file} has no categories.")
    if all(isinstance(key, int) for key in names):
        return dict(sorted(names.items()))
    return names


def _compare_categories(files: Mapping[str, Path], categories: Mapping[str, dict[int | str, str]]) -> tuple[str, ...]:
    """The class names; raises DataError if splits differ."""
    first, *others = categories
    expected = tuple(categories[first].values())
    for other in others:
        if difference := sorted(set(expected) ^ set(categories[other].values())):
            raise DataError(f"{files[first]} and {files[other]} have different categories: {', '.join(difference)}.")
    return expected


def _read_images(
    finder: ImageFinder,
    source: Path,
    content: CocoDocument,
    split: str,
    read_object: Callable[[CocoAnnotation, str], ObjectRecord],
    errors: ErrorPolicy,
) -> Iterator[ImageRecord]:
    """The images whose files exist; rejects missing files, and annotations of no image."""
    objects = _group_annotations(source, content.annotations, errors)
    folders = _list_image_folders(finder, source, split)
    places = format_list([folder or "." for folder in folders])
    name_by_id: dict[int | str, str] = {}
    names: set[str] = set()
    found: set[str] = set()  # the files' own names
    usable = 0
    for i, entry in enumerate(content.images):
        name, key = str(entry["file_name"]), _identify(entry["id"])
        if key is None:
            raise DataError(f"{source}: entry {i} of 'images' has the id {entry['id']!r}; give it a number.")
        if key in name_by_id:
            raise DataError(f"{source}: {name_by_id[key]} and {name} both have the id {key!r}; give each its own.")
        if name in names:
            raise DataError(f"{source} lists {name} twice; remove one entry.")
        name_by_id[key] = name
        names.add(name)
        own = objects.pop(key, [])
        if (file := finder.find(name, folders)) is None:
            several = f", and {n} other files have that name" if (n := finder.count_named(name)) > 1 else ""
            errors.reject(f"{source}, image {key}", f"its image {name} does not exist in {places}{several}")
            continue
        found.add(file.name)
        if (size := _read_size(entry)) is None:
            given = f"{entry.get('width')!r} x {entry.get('height')!r}"
            errors.reject(f"{source}, image {key}", f"its width and height are {given}, not numbers of pixels")
        else:
            usable += 1
            things = [read_object(a, a.describe(source)) for a in own]
            yield ImageRecord(name, file, str(source), size, things)
    if names and not usable:
        raise DataError(
            f"{source}: none of its {format_count(len(names), 'image')} can be used, such as {min(names)}; looked in {places}."
        )
    for key, entries in objects.items():
        errors.reject(entries[0].describe(source), f"it is for the image {key!r}, which is not among the images")
    _reject_unlisted_images(source, found, errors)


def _group_annotations(
    source: Path, annotations: list[CocoAnnotation], errors: ErrorPolicy
) -> dict[int | str, list[CocoAnnotation]]:
    """The annotations of each image by its id; rejects those whose image_id is neither a number nor a word."""
    groups: dict[int | str, list[CocoAnnotation]] = defaultdict(list)
    for annotation in annotations:
        if (key := _identify(annotation.image_id)) is None:
            errors.reject(annotation.describe(source), f"its image_id is {annotation.image_id!r}, not a number")
        else:
            groups[key].append(annotation)
    return groups


def _list_image_folders(finder: ImageFinder, source: Path, split: str) -> list[str]:
    """Where a document's images may be, paths below the root: beside it, in the root, in images/, in the split's folders."""
    beside = finder.folder_of(source)
    word = source.stem.lower().removeprefix("instances_")  # "default", "train2017"
    named = [
        folder
        for folder in finder.folders
        if any(part.lower() == word or (split and find_split(part) == split) for part in folder.split("/"))
    ]
    return list(dict.fromkeys((beside, f"{beside}/data".strip("/"), "", "images", *named)))


def _read_size(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    """(height, width) of an image, (0, 0) if one is missing or zero; None if one is no number of pixels."""
    size = []
    for key in ("height", "width"):
        try:
            number = float(entry.get(key) or 0)
        except (TypeError, ValueError):
            return None
        if not (number.is_integer() and number >= 0):  # not NaN or infinity either
            return None
        size.append(int(number))
    return (size[0], size[1]) if all(size) else (0, 0)


def _read_object(
    annotation: CocoAnnotation, where: str, categories: Mapping[int | str, str], masks: bool, errors: ErrorPolicy
) -> ObjectRecord:
    """One annotation; without a label if it has been rejected."""
    key = _identify(annotation.category_id)
    label, bbox = categories.get(key) if key is not None else None, annotation.bbox
    if label is None:
        errors.reject(where, f"its category {annotation.category_id!r} is not among the categories")
    box = _read_box(bbox)
    if box is None and not masks and label is not None and (bbox or not annotation.segmentation):
        given = [int(v) if v.is_integer() else v for v in bbox] if isinstance(bbox, array) else bbox
        errors.reject(where, f"its bbox is {given!r}, not [x, y, width, height]")
        label = None
    return ObjectRecord(where, label, box, annotation.segmentation, annotation.crowd)


def _read_box(bbox: Any) -> Box | None:
    """The box of [x, y, width, height]; None if that is no list of four numbers."""
    try:
        x, y, w, h = (float(v) for v in bbox)
    except (TypeError, ValueError):
        return None
    return x, y, x + w, y + h


def _reject_unlisted_images(source: Path, names: set[str], errors: ErrorPolicy) -> None:
    """Rejects images beside a split's own JSON (SPLIT/_annotations.coco.json) that are none of those found for its entries."""
    if source.name == "_annotations.coco.json":
        for file in sorted(source.parent.iterdir()):
            if file.suffix.lower() in SUFFIXES and file.name not in names:
                errors.reject(str(file), f"{source} does not list it; list images without boxes too")
