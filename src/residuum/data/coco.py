"""COCO's form: a JSON for each split, with `images`, `annotations` (bbox [x, y, width, height]) and `categories`.

The JSON of a split is `SPLIT.json` or `instances_SPLIT….json`, in the folder or in its annotations/, or else
`SPLIT/_annotations.coco.json`; pictures lie beside it, in the folder, in images/, or in a folder named after the split.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from residuum.data.annotated import Annotated, checked
from residuum.data.parts import Checker
from residuum.errors import DataError

SPLITS = ("train", "val", "test")


class Image(NamedTuple):
    """One of `images`, its file found, with its annotations."""

    name: str
    file: Path
    size: tuple[int, int]
    annotations: list[dict[str, Any]]


def read(root: Path, checker: Checker) -> tuple[tuple[str, ...], dict[str, list[Annotated]]]:
    """Classes, in the order of the categories' ids, and the pictures of each split."""
    found = split_files(root)
    documents = {split: document(file) for split, file in found.items()}
    classes = categories(found, documents)
    parts = {}
    for split, file in found.items():
        listed = images(root, file, documents[split], split, checker)
        parts[split] = [_boxes(image, file, documents[split], classes, checker) for image in listed]
    return classes, parts


def _boxes(
    image: Image, source: Path, content: dict[str, Any], classes: tuple[str, ...], checker: Checker
) -> Annotated:
    named = {c["id"]: c["name"] for c in content["categories"]}
    found = []
    for a in image.annotations:
        if (name := named.get(a.get("category_id"))) not in classes:
            checker.bad(
                f"{source}, annotation {a.get('id')}",
                f"its category {a.get('category_id')!r} is not among the categories",
            )
            continue
        try:
            x, y, w, h = (float(v) for v in a["bbox"])
        except (KeyError, TypeError, ValueError):
            checker.bad(
                f"{source}, annotation {a.get('id')}", f"its bbox is {a.get('bbox')!r}, not [x, y, width, height]"
            )
            continue
        found.append(((x, y, x + w, y + h), classes.index(name), bool(a.get("iscrowd", 0))))
    return checked(checker, image.name, image.file, str(source), image.size, found)


def split_files(root: Path) -> dict[str, Path]:
    """The JSON of each split; "" for one that stands alone. Raises DataError where there is none."""
    found: dict[str, Path] = {}
    for split in SPLITS:
        places = [root / f"{split}.json", root / "annotations" / f"{split}.json"]
        places += sorted((root / "annotations").glob(f"instances_{split}*.json")) + sorted(
            root.glob(f"instances_{split}*.json")
        )
        names = [split, "valid"] if split == "val" else [split]
        places += [root / name / "_annotations.coco.json" for name in names]
        if existing := [place for place in places if place.is_file()]:
            if len(existing) > 1:
                raise DataError(f"{existing[0]} and {existing[1]} both are for the split {split}; leave one.")
            found[split] = existing[0]
    if not found:
        loose = sorted(root.glob("*.json")) + sorted((root / "annotations").glob("*.json"))
        if len(loose) != 1:
            raise DataError(
                f"{root} is neither in Pascal VOC's form (Annotations/, JPEGImages/) nor in COCO's "
                "(train.json, val.json, or annotations/instances_train.json and so on)."
            )
        found[""] = loose[0]
    return found


def document(file: Path) -> dict[str, Any]:
    """The JSON of a split. Raises DataError where it is broken or no such document."""
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is broken JSON ({error}); write it again.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f"{file} is no COCO document: its {key!r} is not a list of objects.")
    for key, fields in (
        ("images", ("id", "file_name")),
        ("categories", ("id", "name")),
        ("annotations", ("image_id",)),
    ):
        for i, entry in enumerate(content[key]):
            if missing := [field for field in fields if field not in entry]:
                raise DataError(f"{file}: entry {i} of {key!r} has no {missing[0]!r}.")
    return dict(content)


def categories(files: dict[str, Path], documents: dict[str, dict[str, Any]]) -> tuple[str, ...]:
    """The class names; raises DataError where two are one, or splits differ."""
    named: dict[str, tuple[str, ...]] = {}
    for split, content in documents.items():
        names = tuple(str(c["name"]) for c in sorted(content["categories"], key=lambda c: int(c["id"])))
        if len(set(names)) != len(names) or len({c["id"] for c in content["categories"]}) != len(names):
            raise DataError(f"{files[split]} has two categories of one name or one id; give each its own.")
        if not names:
            raise DataError(f"{files[split]} has no categories.")
        named[split] = names
    first, *others = named
    for other in others:
        if set(named[first]) != set(named[other]):
            difference = sorted(set(named[first]) ^ set(named[other]))
            raise DataError(f"{files[first]} and {files[other]} have different categories: {', '.join(difference)}.")
    return named[first]


def images(root: Path, source: Path, content: dict[str, Any], split: str, checker: Checker) -> Iterable[Image]:
    """The pictures that are there; one that is missing, and annotations of no picture, are named."""
    of: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        of[annotation["image_id"]].append(annotation)
    seen: dict[Any, str] = {}
    names: set[str] = set()
    folders = [source.parent, root, root / "images", *sorted(root.glob(f"{split}*/" if split else "*/"))]
    for entry in content["images"]:
        name, number = str(entry["file_name"]), entry["id"]
        if number in seen:
            raise DataError(f"{source}: {seen[number]} and {name} both have the id {number!r}; give each its own.")
        if name in names:
            raise DataError(f"{source} lists {name} twice; leave one out.")
        seen[number] = name
        names.add(name)
        file = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if file is None:
            checker.bad(f"{source}, image {number}", f"its picture {name} is not there")
            continue
        size = (int(entry.get("height") or 0), int(entry.get("width") or 0))
        yield Image(name, file, size if all(size) else (0, 0), of[number])
    for number in of:
        if number not in seen:
            checker.bad(
                f"{source}, annotation {of[number][0].get('id')}",
                f"it is for the image {number!r}, which is not among the images",
            )
    _unlisted(source, names, checker)


def _unlisted(source: Path, names: set[str], checker: Checker) -> None:
    """Names the pictures beside a split's own JSON (SPLIT/_annotations.coco.json) that it does not list."""
    from residuum.data.decode import SUFFIXES

    if source.name == "_annotations.coco.json":
        for file in sorted(source.parent.iterdir()):
            if file.suffix.lower() in SUFFIXES and file.name not in names:
                checker.bad(
                    str(file), f"{source} does not list it; a picture without boxes stands among its images too"
                )
