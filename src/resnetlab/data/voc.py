"""Pascal VOC's format: Annotations/*.xml, JPEGImages/*, and in ImageSets/Main the image names of each split (train.txt, …).

    <annotation><size><width>640</width><height>480</height></size>
      <object><name>WBC</name><difficult>0</difficult><bndbox><xmin>260</xmin>…</bndbox></object></annotation>

Without lists there is one split "" of all annotated images. An image without an <object> is background. An object may have a
<polygon><x1>…</x1><y1>…</y1>…</polygon> (RectLabel, Labelbox) or <polygon><pt><x>…</x><y>…</y></pt>…</polygon> ("LabelMe 3.0")
beside its <bndbox> or in its place. Images may also be in images/, in data/ with labels/*.xml (FiftyOne), or beside their XML;
all of that in the folder (LabelImg) or in a folder for each split (Roboflow). Annotations and images may be in folders inside,
whose names may be of splits.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from xml.etree import ElementTree

from resnetlab.data.annotations import Annotations, ImageRecord, ObjectRecord
from resnetlab.data.decode import SUFFIXES
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.file_lookup import (
    LABEL_AT_END,
    NameIndex,
    find_entry,
    find_first_split,
    find_split,
    list_subfolders,
)
from resnetlab.data.text_files import peek_lines, read_bytes, read_lines
from resnetlab.errors import DataError, warn
from resnetlab.formatting import format_list

TRUE = ("1", "true", "yes")


def find_voc_folders(root: Path) -> list[tuple[str, Path, Path]]:
    """(split, folder of annotations, folder of images), "" for images of no split. Empty if there is no XML."""
    if (pair := _find_folder_pair(root)) is not None:
        return [("", *pair)]
    found: list[tuple[str, Path, Path]] = []
    for folder in (root, *list_subfolders(root)):
        split = find_split(folder.name) if folder != root else ""
        if list_by_stem(folder, (".xml",)) and (split or not found or list_by_stem(folder, SUFFIXES)):
            found.append((split, folder, folder))
        elif split and (pair := _find_folder_pair(folder)) is not None:
            found.append((split, *pair))
    return found


def _find_folder_pair(folder: Path) -> tuple[Path, Path] | None:
    """(annotations, images), folders beside each other as VOC or FiftyOne calls them; None if there is no XML in the first."""
    for names, beside in (("Annotations",), ("JPEGImages", "images")), (("labels",), ("data", "images")):
        annotations = find_entry(folder, *names)
        if annotations is not None and list_by_stem(annotations, (".xml",), deep=True):
            return annotations, find_entry(folder, *beside) or folder / beside[0]
    return None


def read_voc(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """The images of each split with their objects; the classes are those of the training objects."""
    splits: dict[str, list[ImageRecord]] = {}
    for split, annotation_folder, image_folder in find_voc_folders(root):
        apart = annotation_folder != image_folder
        images = list_voc_images(image_folder, deep=apart or (not split and image_folder != root))
        annotations = list_by_stem(annotation_folder, (".xml",), deep=apart)
        lists = {split: sorted(set(images) | set(annotations))}
        if not split:
            named = read_voc_splits(root / "ImageSets" / "Main", [*images, *annotations])
            lists = named or split_by_folders(lists[split])
        parsed = {}
        for stem in dict.fromkeys(stem for stems in lists.values() for stem in stems):
            expected = annotations.get(stem, annotation_folder / f"{stem}.xml")
            if stem not in images:
                errors.reject(str(expected), f"its image {stem} is not in {image_folder}")
            elif stem not in annotations:
                errors.reject(str(images[stem]), f"it has no annotation {expected}")
            elif (record := read_voc_annotation(root, expected, images[stem], errors, masks)) is not None:
                parsed[stem] = record
        for name, stems in lists.items():
            splits.setdefault(name, []).extend(parsed[stem] for stem in stems if stem in parsed)
    return Annotations("Pascal VOC", None, dict(splits))


def list_voc_images(folder: Path, deep: bool = True) -> dict[str, Path]:
    """The images of a folder by their names without suffix. Raises DataError for two of one name, or no image."""
    if not (images := list_by_stem(folder, SUFFIXES, deep)):
        raise DataError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}).")
    return images


def list_by_stem(folder: Path, suffixes: Container[str], deep: bool = False) -> dict[str, Path]:
    """The files of a folder that have one of some suffixes, by their names without it; raises DataError for two of one name.

    Args:
        deep: also the files of the folders in it, by their paths ("day 1/0001"), as CVAT keeps the folders of a task.
    """
    files: dict[str, Path] = {}
    for file in sorted(folder.rglob("*") if deep else folder.iterdir()) if folder.is_dir() else ():
        inner = file.relative_to(folder)
        if file.suffix.lower() in suffixes and not any(part.startswith(".") for part in inner.parts):
            stem = unicodedata.normalize("NFC", inner.with_suffix("").as_posix())
            if stem in files:
                kind = "annotations" if ".xml" in suffixes else "images"
                raise DataError(f"{files[stem]} and {file.name} have one name for two {kind}; rename one of them.")
            files[stem] = file
    return files


def read_voc_splits(folder: Path, stems: Iterable[str]) -> dict[str, list[str]]:
    """The image names in each list of a folder such as ImageSets/Main.

    Args:
        stems: known names. A line may be one, a file name, a path or two (image and mask), or have VOC's " -1" behind it; a
            line that is none of them is given without a label.

    Raises DataError if a list names an image twice, or train shares an image with val or test. Warns of other lists of images
    than those of a split or of a class in a split (cat_train.txt).
    """
    splits: dict[str, list[str]] = {}
    index, unread = NameIndex(stems), list[str]()
    for file in sorted(folder.glob("*.txt")) if folder.is_dir() else ():
        if split := find_split(file.stem):
            if split in splits:
                raise DataError(f"{folder} has two lists of the {split} split, {file.name} is one; keep one of them.")
            splits[split] = [index.find_list_entry(line) or LABEL_AT_END.sub("", line) for line in read_lines(file)]
            if len(set(splits[split])) < len(splits[split]):
                twice = min(name for name, n in Counter(splits[split]).items() if n > 1)
                raise DataError(f"{file} names {twice} twice; remove one line.")
        elif not find_split(file.stem.rpartition("_")[2]) and any(map(index.find_list_entry, peek_lines(file)[:1])):
            unread.append(file.name)
    if unread:
        warn(f"{folder}: {format_list(unread)} named after no split (train, val, test, …), and left out.")
    if "train" in splits:
        splits.pop("trainval", None)
    for split in ("val", "test"):
        if shared := sorted(set(splits.get("train", [])) & set(splits.get(split, []))):
            raise DataError(
                f"{folder / 'train.txt'} and {split}.txt both name {shared[0]}; do not evaluate on an image trained on."
            )
    return splits


def split_by_folders(stems: Iterable[str]) -> dict[str, list[str]]:
    """Names by the split that a folder in them is for ("train/0001"); "" for those of no split."""
    splits: dict[str, list[str]] = {}
    for stem in stems:
        splits.setdefault(find_first_split(stem.split("/")[:-1]), []).append(stem)
    return splits


def read_voc_annotation(
    root: Path, file: Path, image: Path, errors: ErrorPolicy, masks: bool = False
) -> ImageRecord | None:
    """The objects of an annotation; rejects objects that are broken, or the whole file (None)."""
    try:
        tree = ElementTree.fromstring(read_bytes(file))
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # an unknown encoding is a LookupError
        errors.reject(str(file), f"it is broken XML ({error})")
        return None
    try:
        height = width = 0.0
        if tree.find("size") is not None:
            height, width = (_child_number(tree, f"size/{key}") for key in ("height", "width"))
        if not (height.is_integer() and width.is_integer() and min(height, width) >= 0):
            raise ValueError(f"its size is {width:g}x{height:g}")
    except ValueError as error:
        errors.reject(str(file), f"it is not a Pascal VOC annotation: {error}")
        return None
    objects = []
    for number, item in enumerate(tree.findall("object"), 1):
        where = f"{file}, object {number}"
        if (item.findtext("deleted") or "").strip() in TRUE:  # in LabelMe 3.0
            continue
        try:
            objects.append(_parse_object(item, where, masks))
        except ValueError as error:
            errors.reject(where, str(error))
            objects.append(ObjectRecord(where, None, None))
    known = (int(height), int(width)) if height and width else (0, 0)
    return ImageRecord(image.relative_to(root).as_posix(), image, str(file), known, objects)


def _parse_object(item: ElementTree.Element, where: str, masks: bool) -> ObjectRecord:
    """One <object>; its <polygon> is read for a mask, or where there is no <bndbox>. Raises ValueError."""
    name = _child_text(item, "name")
    ignored = (item.findtext("difficult") or "").strip().lower() in TRUE
    polygon, outline, has_box = item.find("polygon"), None, item.find("bndbox") is not None
    if polygon is not None and (masks or not has_box):
        numbers = [e for e in polygon.iter() if re.fullmatch(r"[xy]\d*", e.tag)]
        if polygon.find("pt") is None:
            numbers.sort(key=lambda e: (int(e.tag[1:] or 0), e.tag))  # x1, y1, x2, …
        outline = [[float(e.text or "nan") for e in numbers]]
        if not has_box:
            return ObjectRecord(where, name, None, outline, ignored)
    x1, y1, x2, y2 = (_child_number(item, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax"))
    return ObjectRecord(where, name, (x1, y1, x2, y2), outline, ignored)


def _child_text(element: ElementTree.Element, path: str) -> str:
    """The text of a child element; raises ValueError if there is none."""
    if not (text := (element.findtext(path) or "").strip()):
        raise ValueError(f"<{path.replace('/', '><')}> is missing or empty")
    return text


def _child_number(element: ElementTree.Element, path: str) -> float:
    text = _child_text(element, path)
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"<{path.replace('/', '><')}> is {text!r}, not a number") from None
