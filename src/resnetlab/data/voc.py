"""Pascal VOC's format: Annotations/*.xml, JPEGImages/*, and in ImageSets/Main the image names of each split (train.txt, …).

    <annotation><size><width>640</width><height>480</height></size>
      <object><name>WBC</name><difficult>0</difficult><bndbox><xmin>260</xmin>…</bndbox></object></annotation>

Without lists there is one split "" of all annotated images. An image without an <object> is background.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from resnetlab.data.annotations import AnnotatedImage, make_annotated_image
from resnetlab.data.decode import SUFFIXES
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.errors import DataError

SPLIT_NAMES = ("train", "trainval", "val", "test")
VocObject = tuple[tuple[float, float, float, float], str, bool]  # box, class, difficult


def read_voc_boxes(root: Path, errors: ErrorPolicy) -> tuple[tuple[str, ...], dict[str, list[AnnotatedImage]]]:
    """Classes, in the order of their names, and the images of each split."""
    images = list_voc_images(root / "JPEGImages")
    annotations = {file.stem: file for file in sorted((root / "Annotations").glob("*.xml"))}
    lists = read_voc_splits(root / "ImageSets" / "Main") or {"": sorted(set(images) | set(annotations))}
    parsed = {}
    for stem in dict.fromkeys(stem for stems in lists.values() for stem in stems):
        expected = annotations.get(stem, root / "Annotations" / f"{stem}.xml")
        if stem not in images:
            errors.reject(str(expected), f"its image {stem} is not in {root / 'JPEGImages'}")
        elif stem not in annotations:
            errors.reject(str(images[stem]), f"it has no annotation {expected}")
        else:
            parsed[stem] = parse_voc_annotation(annotations[stem])
    training = lists.get("train") or lists.get("trainval") or next(iter(lists.values()))
    classes = tuple(sorted({name for stem in training if stem in parsed for _, name, _ in parsed[stem][1]}))
    if not classes:
        raise DataError(f"{root} has no box to train on; each <object> needs a <name> and a <bndbox>.")
    splits = {
        split: [_make_image(images[s], annotations[s], *parsed[s], classes, errors) for s in stems if s in parsed]
        for split, stems in lists.items()
    }
    return classes, splits


def _make_image(
    file: Path,
    source: Path,
    size: tuple[int, int],
    objects: list[VocObject],
    classes: tuple[str, ...],
    errors: ErrorPolicy,
) -> AnnotatedImage:
    boxes = []
    for i, (box, name, difficult) in enumerate(objects):
        if name in classes:
            boxes.append((box, classes.index(name), difficult))
        else:
            where = f"{source}, box {i + 1} of {file.name}"
            errors.reject(where, f"its class {name!r} is none of the training classes ({', '.join(classes)})")
    return make_annotated_image(errors, f"JPEGImages/{file.name}", file, str(source), size, boxes)


def list_voc_images(folder: Path) -> dict[str, Path]:
    """The images of a folder by their names without suffix. Raises DataError for two of one name, or no image."""
    images: dict[str, Path] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix.lower() in SUFFIXES and not file.name.startswith("."):
            if file.stem in images:
                raise DataError(
                    f"{images[file.stem]} and {file.name} have one name for two images; rename one of them."
                )
            images[file.stem] = file
    if not images:
        raise DataError(f"{folder} holds no image ({', '.join(sorted(SUFFIXES))}).")
    return images


def read_voc_splits(folder: Path) -> dict[str, list[str]]:
    """The image names in each list of a folder such as ImageSets/Main: the first word of each line.

    Raises DataError if a list names an image twice, or train shares an image with val or test.
    """
    splits: dict[str, list[str]] = {}
    for split in SPLIT_NAMES:
        file = folder / f"{split}.txt"
        if file.is_file():
            splits[split] = [line.split()[0] for line in file.read_text("utf-8").splitlines() if line.strip()]
            if twice := sorted({name for name in splits[split] if splits[split].count(name) > 1}):
                raise DataError(f"{file} names {twice[0]} twice; remove one line.")
    if "train" in splits:
        splits.pop("trainval", None)
    for split in ("val", "test"):
        if shared := sorted(set(splits.get("train", [])) & set(splits.get(split, []))):
            raise DataError(
                f"{folder / 'train.txt'} and {split}.txt both name {shared[0]}; do not evaluate on an image trained on."
            )
    return splits


def parse_voc_annotation(file: Path) -> tuple[tuple[int, int], list[VocObject]]:
    """(height, width), (0, 0) if it gives none, and the objects of an annotation. Raises DataError if it is broken."""
    try:
        tree = ElementTree.parse(file).getroot()
        size = tree.find("size")
        height, width = (int(_child_text(size, key)) for key in ("height", "width")) if size is not None else (0, 0)
        objects = []
        for item in tree.findall("object"):
            x1, y1, x2, y2 = (float(_child_text(item, f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax"))
            difficult = (item.findtext("difficult") or "0").strip() == "1"
            objects.append(((x1, y1, x2, y2), _child_text(item, "name"), difficult))
    except (ElementTree.ParseError, UnicodeDecodeError) as error:
        raise DataError(f"{file} is broken XML ({error}); write it again.") from error
    except (KeyError, ValueError) as error:
        raise DataError(f"{file} is not a Pascal VOC annotation: {error}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}).") from error
    return (height, width), objects


def _child_text(element: ElementTree.Element | None, path: str) -> str:
    """The text of a child element; raises ValueError if there is none."""
    text = (element.findtext(path) or "").strip() if element is not None else ""
    if not text:
        raise ValueError(f"<{path.replace('/', '><')}> is missing or empty")
    return text
