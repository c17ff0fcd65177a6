"""The table of the layouts of annotated data that are recognised by themselves, and the one function that does it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from resnetlab.data.annotations import Annotations
from resnetlab.data.coco import find_coco_files, read_coco
from resnetlab.data.cvat_xml import find_cvat_files, read_cvat
from resnetlab.data.decode import is_image_name
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.fiftyone import read_fiftyone, read_fiftyone_samples
from resnetlab.data.file_lookup import list_json_files, list_subfolders
from resnetlab.data.folder import guess_split
from resnetlab.data.json_exports import read_createml, read_label_studio, read_labelme
from resnetlab.data.mask_folders import has_mask_folders, read_mask_folders, read_voc_masks
from resnetlab.data.text_files import PEEKED_FILES, has_patterns
from resnetlab.data.voc import find_voc_folders, read_voc
from resnetlab.data.yolo import find_yolo_labels, read_yolo
from resnetlab.errors import DataError, suggest_path

NO_CLASS = re.compile("image|img|mask|label|annot|segment|^gt")  # in a folder's name
BESIDE = re.compile(
    r"\.|readme|licen[cs]e|.*\.(zip|tar|gz|tgz|bz2|xz|md|pdf)$", re.IGNORECASE
)  # beside an unpacked folder


class Layout(NamedTuple):
    """A layout of annotated data.

    Attributes:
        expected: what is looked for, for messages.
        matches: whether a folder has it.
        read: reads it; the last argument is whether masks are wanted, or boxes.
        gives: "boxes", "masks", or "both".
    """

    expected: str
    matches: Callable[[Path], bool]
    read: Callable[[Path, ErrorPolicy, bool], Annotations]
    gives: str = "both"


def _has_json(root: Path, start: str, first: str = "", *others: str) -> bool:
    """Whether a JSON file begins with a character, has a key (or one of several, "a|b") in its begin, and others anywhere."""
    begin = rf"^\s*{re.escape(start)}" + (rf'.*?"({first})"\s*:' if first else "")
    files = list_json_files(root)[:PEEKED_FILES]
    return any(has_patterns(file, begin, *(rf'"{key}"\s*:' for key in others)) for file in files)


def _has_coco(root: Path) -> bool:
    return _has_json(root, "{", "images|annotations|categories|licenses|info") and bool(find_coco_files(root))


LAYOUTS = (  # the first that matches is read
    Layout(
        "Pascal VOC's masks (SegmentationClass/, JPEGImages/)",
        lambda root: (root / "SegmentationClass").is_dir(),
        read_voc_masks,
        "masks",
    ),
    Layout("CVAT's XML for images (annotations.xml)", lambda root: bool(find_cvat_files(root)), read_cvat),
    Layout("Pascal VOC's format (Annotations/*.xml with JPEGImages/, or XML beside images)",
           lambda root: bool(find_voc_folders(root)), read_voc),
    Layout("FiftyOne's (labels.json, data/)",
           lambda root: _has_json(root, "{", "classes", "labels", "bounding_box"), read_fiftyone),
    Layout("FiftyOne's data sets (samples.json, data/)", lambda root: _has_json(root, "{", "samples"), read_fiftyone_samples),
    Layout("LabelMe's (JSON beside images)",
           lambda root: _has_json(root, "{", "shapes|imageData|imagePath", "shapes"), read_labelme),
    Layout("COCO's (train.json, annotations/instances_train2017.json, train/_annotations.coco.json, result.json and so on)",
           _has_coco, read_coco),
    Layout("CreateML's (_annotations.createml.json)",
           lambda root: _has_json(root, "[", "annotations", "coordinates"), read_createml),
    Layout("Label Studio's (a JSON list of tasks)", lambda root: _has_json(root, "["), read_label_studio),
    Layout("YOLO's (data.yaml or classes.txt, with labels/*.txt)", find_yolo_labels, read_yolo),
    Layout("images and masks in folders (images/ and masks/, train/ and trainannot/, leftImg8bit/ and gtFine/, "
           "1.jpg and 1_mask.png)",
           has_mask_folders, read_mask_folders, "masks"),
)  # fmt: skip


def read_annotations(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """The images of a folder with their boxes or masks, in whatever layout of the table it has, or the only folder in it has.

    Raises DataError if it has none: with the list of what was looked for.
    """
    if not root.is_dir():
        if root.exists():
            raise DataError(
                f"{root} is a file; give the folder that holds images and annotations, such as {root.parent}."
            )
        hint = suggest_path(root) or "; give a folder as your tool wrote it (VOC, COCO, YOLO and others)."
        raise DataError(f"{root} is not there{hint}")
    unwanted = "boxes" if masks else "masks"
    layouts = [layout for layout in LAYOUTS if layout.gives != unwanted]
    for folder in _unpacked_folders(root):
        for layout in layouts:
            if layout.matches(folder):
                try:
                    found = layout.read(folder, errors, masks)
                except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
                    kinds = f"{type(error).__name__}: {error}"
                    raise DataError(
                        f"{folder} looks like {layout.expected}, but a file in it has another form ({kinds}); export it again."
                    ) from error
                inside = "" if folder == root else f" in {folder.relative_to(root).as_posix()}"
                return found._replace(layout=f"{found.layout}{inside}", folder=folder)
    if any(map(_has_class_folders, (root, root / "train"))):
        what = "masks" if masks else "boxes"
        raise DataError(
            f"{root} is a folder of class folders, without {what}; a classifier learns from it: resnetlab train {root}."
        )
    raise DataError(f"{root} is neither in {' nor in '.join(layout.expected for layout in layouts)}.")


def _has_class_folders(root: Path) -> bool:
    """Whether a folder holds nothing but folders with images, two or more, and none of a name that splits or masks have."""
    folders = list_subfolders(root) if root.is_dir() else []
    if any(guess_split(each.name) or NO_CLASS.search(each.name.lower()) for each in folders):
        return False
    return len(folders) > 1 and all(any(is_image_name(file.name) for file in each.iterdir()) for each in folders)


def find_layout(root: Path) -> Layout | None:
    """The layout of a folder of boxes or masks, or of the only folder in it, with boxes first; None for any other folder."""
    layouts, folders = sorted(LAYOUTS, key=lambda layout: layout.gives == "masks"), _unpacked_folders(root)
    return next((layout for layout in layouts for folder in folders if layout.matches(folder)), None)


def describe_annotations(root: Path) -> str | None:
    """A sentence on a folder of boxes or masks, for those who take it for class folders; None for any other folder."""
    if (found := find_layout(root)) is None:
        return None
    tasks = ["segment"] if found.gives == "masks" else ["detect", "segment"]
    commands = " or ".join(f"resnetlab {task} train {root}" for task in tasks)
    return f"{root} looks like {found.expected}, data of boxes or masks: {commands}."


def _unpacked_folders(root: Path) -> list[Path]:
    """A folder, and the folders in it while each is alone: an archive often unpacks into one (VOCdevkit/VOC2012).

    One that holds nothing else is left out, unless the inner one's name means something in a layout.
    """
    folders = [root]
    for _ in range(4):
        if len(inner := list_subfolders(outer := folders[-1])) != 1:
            break
        named = guess_split(inner[0].name) or NO_CLASS.search(inner[0].name.lower())
        if not named and all(path == inner[0] or BESIDE.match(path.name) for path in outer.iterdir()):
            folders.pop()
        folders.append(inner[0])
    return folders
