"""COCO's format: a JSON for each split, with `images`, `annotations` (bbox [x, y, width, height]) and `categories`.

The JSON of a split is `SPLIT.json` or `instances_SPLIT….json`, in the folder or in its annotations/, or else
`SPLIT/_annotations.coco.json`. Images are beside it, in the folder, in images/, or in a folder named after the split.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from resnetlab.data.annotations import AnnotatedImage, make_annotated_image
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.errors import DataError

SPLITS = ("train", "val", "test")


class CocoImage(NamedTuple):
    """One of `images` with its file and its annotations."""

    name: str
    file: Path
    size: tuple[int, int]
    annotations: list[dict[str, Any]]


def read_coco_boxes(root: Path, errors: ErrorPolicy) -> tuple[tuple[str, ...], dict[str, list[AnnotatedImage]]]:
    """Classes, in the order of the categories' ids, and the images of each split."""
    files = find_coco_files(root)
    documents = {split: read_coco_document(file) for split, file in files.items()}
    classes = read_coco_classes(files, documents)
    splits = {}
    for split, file in files.items():
        images = list_coco_images(root, file, documents[split], split, errors)
        splits[split] = [_read_boxes(image, file, documents[split], classes, errors) for image in images]
    return classes, splits


def _read_boxes(
    image: CocoImage, source: Path, content: dict[str, Any], classes: tuple[str, ...], errors: ErrorPolicy
) -> AnnotatedImage:
    names = {c["id"]: c["name"] for c in content["categories"]}
    boxes = []
    for a in image.annotations:
        where = f"{source}, annotation {a.get('id')}"
        if (name := names.get(a.get("category_id"))) not in classes:
            errors.reject(where, f"its category {a.get('category_id')!r} is not among the categories")
            continue
        try:
            x, y, w, h = (float(v) for v in a["bbox"])
        except (KeyError, TypeError, ValueError):
            errors.reject(where, f"its bbox is {a.get('bbox')!r}, not [x, y, width, height]")
            continue
        boxes.append(((x, y, x + w, y + h), classes.index(name), bool(a.get("iscrowd", 0))))
    return make_annotated_image(errors, image.name, image.file, str(source), image.size, boxes)


def find_coco_files(root: Path) -> dict[str, Path]:
    """The JSON of each split; "" for a single file that is of no split. Raises DataError if there is none."""
    found: dict[str, Path] = {}
    for split in SPLITS:
        folders = [root, root / "annotations"]
        candidates = [folder / f"{split}.json" for folder in folders]
        candidates += [file for folder in reversed(folders) for file in sorted(folder.glob(f"instances_{split}*.json"))]
        names = [split, "valid"] if split == "val" else [split]
        candidates += [root / name / "_annotations.coco.json" for name in names]
        if existing := [file for file in candidates if file.is_file()]:
            if len(existing) > 1:
                raise DataError(f"{existing[0]} and {existing[1]} are both for the split {split}; keep one of them.")
            found[split] = existing[0]
    if not found:
        other = sorted(root.glob("*.json")) + sorted((root / "annotations").glob("*.json"))
        if len(other) != 1:
            raise DataError(
                f"{root} is neither in Pascal VOC's format (Annotations/, JPEGImages/) nor in COCO's "
                "(train.json, val.json, or annotations/instances_train.json and so on)."
            )
        found[""] = other[0]
    return found


def read_coco_document(file: Path) -> dict[str, Any]:
    """The JSON of a split. Raises DataError if it is broken or not a COCO document."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is broken JSON ({error}); write it again.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{file} is not a COCO document: its {key!r} is not a list of objects.")
    required = {"images": ("id", "file_name"), "categories": ("id", "name"), "annotations": ("image_id",)}
    for key, fields in required.items():
        for i, entry in enumerate(content[key]):
            if missing := [field for field in fields if field not in entry]:
                raise DataError(f"{file}: entry {i} of {key!r} has no {missing[0]!r}.")
    return dict(content)


def read_coco_classes(files: dict[str, Path], documents: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """The class names; raises DataError if two categories are not distinct, or splits differ."""
    classes: dict[str, tuple[str, ...]] = {}
    for split, content in documents.items():
        names = tuple(str(c["name"]) for c in sorted(content["categories"], key=lambda c: int(c["id"])))
        if len(set(names)) != len(names) or len({c["id"] for c in content["categories"]}) != len(names):
            raise DataError(f"{files[split]} has two categories of one name or one id; give each its own.")
        if not names:
            raise DataError(f"{files[split]} has no categories.")
        classes[split] = names
    first, *others = classes
    for other in others:
        if difference := sorted(set(classes[first]) ^ set(classes[other])):
            raise DataError(f"{files[first]} and {files[other]} have different categories: {', '.join(difference)}.")
    return classes[first]


def list_coco_images(
    root: Path, source: Path, content: dict[str, Any], split: str, errors: ErrorPolicy
) -> Iterable[CocoImage]:
    """The images whose files exist; rejects missing files, and annotations of no image."""
    annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    name_by_id: dict[Any, str] = {}
    names: set[str] = set()
    folders = [source.parent, root, root / "images", *sorted(root.glob(f"{split}*/" if split else "*/"))]
    for entry in content["images"]:
        name, key = str(entry["file_name"]), entry["id"]
        if key in name_by_id:
            raise DataError(f"{source}: {name_by_id[key]} and {name} both have the id {key!r}; give each its own.")
        if name in names:
            raise DataError(f"{source} lists {name} twice; remove one entry.")
        name_by_id[key] = name
        names.add(name)
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is None:
            errors.reject(f"{source}, image {key}", f"its image {name} does not exist")
            continue
        size = (int(entry.get("height") or 0), int(entry.get("width") or 0))
        yield CocoImage(name, file, size if all(size) else (0, 0), annotations[key])
    for key in annotations:
        if key not in name_by_id:
            where = f"{source}, annotation {annotations[key][0].get('id')}"
            errors.reject(where, f"it is for the image {key!r}, which is not among the images")
    _reject_unlisted_images(source, names, errors)


def _reject_unlisted_images(source: Path, names: set[str], errors: ErrorPolicy) -> None:
    """Rejects images beside a split's own JSON (SPLIT/_annotations.coco.json) that it does not list."""
    from resnetlab.data.decode import SUFFIXES

    if source.name == "_annotations.coco.json":
        for file in sorted(source.parent.iterdir()):
            if file.suffix.lower() in SUFFIXES and file.name not in names:
                errors.reject(str(file), f"{source} does not list it; list images without boxes too")
