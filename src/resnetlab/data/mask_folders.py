"""Images and masks in folders beside each other: Pascal VOC's, CamVid's, Cityscapes', and images/ with masks/ in any order.

JPEGImages/1.jpg        SegmentationClass/1.png                 lists in ImageSets/Segmentation/
images/1.jpg            masks/1.png (labels/1_P.png, …)         lists train.txt, val.txt
images/train/1.jpg      annotations/train/1.png
train/images/1.jpg      train/masks/1_mask.png
train/1.png             trainannot/1.png, train_labels/1_L.png  (CamVid)
train/1.jpg             train/1_mask.png                        (Roboflow)
leftImg8bit/train/aachen/1_leftImg8bit.png    gtFine/train/aachen/1_gtFine_labelIds.png   (Cityscapes)
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from resnetlab.data.annotations import Annotations, ImageRecord
from resnetlab.data.decode import is_image_name
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.file_lookup import ImageFinder, find_first_split, list_subfolders, name_key
from resnetlab.data.mask_files import VOID, MaskClasses
from resnetlab.data.voc import list_by_stem, list_voc_images, read_voc_splits, split_by_folders
from resnetlab.errors import DataError

MASK_FOLDER = re.compile(
    r"(?P<split>train|training|val|valid|validation|test|testing)?[ _-]?"
    r"(masks?|labels?|annot|annotations?|segmentation|segmentations|segmentationclass|gt|gtfine|gtcoarse|ground_?truth)"
)
IMAGE_ENDING = re.compile(r"_leftImg8bit$")
MASK_ENDING = re.compile(
    r"(_gt(Fine|Coarse)_label(Train)?Ids|[_-](L|P|masks?|labels?|seg|gt|segmentation))$", re.IGNORECASE
)
OTHER_MASKS = re.compile(r"_gt(Fine|Coarse)_(color|instanceIds|instanceTrainIds)$")  # of Cityscapes
CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of labelIds


def read_voc_masks(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """Pascal VOC's SegmentationClass/, JPEGImages/ and lists."""
    folder = root / "SegmentationClass"
    files, images = list_by_stem(folder, (".png",), deep=True), list_voc_images(root / "JPEGImages")
    lists = read_voc_splits(root / "ImageSets" / "Segmentation", [*images, *files])
    lists = lists or split_by_folders(sorted(set(images) | set(files)))
    records = {}
    for stem in dict.fromkeys(stem for stems in lists.values() for stem in stems):
        expected = folder / f"{stem}.png"
        if stem not in images:
            errors.reject(str(files.get(stem, expected)), f"its image {stem} is not in {root / 'JPEGImages'}")
        elif stem not in files:
            errors.reject(str(images[stem]), f"it has no mask {expected}")
        else:
            name = images[stem].relative_to(root).as_posix()
            records[stem] = ImageRecord(name, images[stem], str(files[stem]), (0, 0), [], mask=files[stem])
    splits = {split: [records[stem] for stem in stems if stem in records] for split, stems in lists.items()}
    return Annotations("Pascal VOC masks", None, dict(splits))


def has_mask_folders(root: Path) -> bool:
    """Whether a folder of masks holds an image, up to three folders deep, or masks are beside their images."""
    if any(_find_masks_beside(os.listdir(folder)) for folder in (root, *list_subfolders(root))):
        return True
    folders = [root]
    for _ in range(3):
        folders = [path for folder in folders for path in sorted(folder.iterdir()) if path.is_dir()]
        if any(MASK_FOLDER.fullmatch(folder.name.lower()) and ImageFinder(folder).paths for folder in folders):
            return True
    return False


def _find_masks_beside(names: Iterable[str]) -> set[str]:
    """Of the files of one folder, or of paths, those that are masks of others by their names: 1_mask.png beside 1.jpg."""
    stems = {os.path.splitext(name)[0] for name in names if is_image_name(name)}
    masks = {stem for stem in stems if stem.endswith("_mask") and stem.removesuffix("_mask") in stems}
    return {name for name in names if os.path.splitext(name)[0] in masks}


def read_mask_folders(root: Path, errors: ErrorPolicy, masks: bool) -> Annotations:
    """Images and masks of one name (but for endings such as _mask) and one split."""
    images: dict[tuple[str, str], str] = {}
    files: dict[tuple[str, str], str] = {}
    paths = ImageFinder(root).paths
    beside = _find_masks_beside(paths)
    for path in paths:
        *folders, name = path.split("/")
        stem = os.path.splitext(name)[0]
        matches = [match for folder in folders if (match := MASK_FOLDER.fullmatch(folder.lower()))]
        words = [*(match["split"] for match in matches if match["split"]), *folders]
        split = find_first_split(words)
        if (matches or path in beside) and not OTHER_MASKS.search(stem):
            _add_file(files, (split, name_key(MASK_ENDING.sub("", stem))), path, root)
        elif not matches:
            _add_file(images, (split, name_key(IMAGE_ENDING.sub("", stem))), path, root)
    with_masks = {split for split, _ in files}
    left_out = sorted({split or "unsplit" for split, _ in images if split not in with_masks})
    splits: dict[str, list[ImageRecord]] = {}
    for (split, stem), path in sorted(images.items(), key=lambda item: item[1]):
        if split not in with_masks:
            continue
        if (mask := files.get((split, stem))) is None:
            errors.reject(str(root / path), "it has no mask of its name")
        else:
            record = ImageRecord(path, root / path, str(root / mask), (0, 0), [], mask=root / mask)
            splits.setdefault(split, []).append(record)
    for key in sorted(set(files) - set(images)):
        errors.reject(str(root / files[key]), "it has no image of its name")
    if set(splits) == {""}:
        splits = _split_by_lists(root, splits[""])
    notes = tuple(f"the {split} images have no masks and are left out" for split in left_out)
    return Annotations("masks in folders", None, dict(splits), notes)


def _add_file(found: dict[tuple[str, str], str], key: tuple[str, str], path: str, root: Path) -> None:
    """Adds a file under its split and name; of Cityscapes' two masks labelTrainIds; raises DataError for two of one name."""
    if key in found and "labelTrainIds" in found[key] and "labelIds" in path:
        return
    if key in found and not ("labelIds" in found[key] and "labelTrainIds" in path):
        raise DataError(f"{root / found[key]} and {path} have one name in one split; rename one of them.")
    found[key] = path


def _split_by_lists(root: Path, records: list[ImageRecord]) -> dict[str, list[ImageRecord]]:
    """Images by lists in the folder (train.txt, valid.txt, …); those that no list names are training images."""
    by_stem = {record.file.stem: record for record in records}
    lists = read_voc_splits(root, by_stem)
    if not lists:
        return {"": records}
    if missing := [name for names in lists.values() for name in names if name not in by_stem]:
        raise DataError(f"a list in {root} names {missing[0]}, which has no image and mask; remove the line.")
    listed = {name for names in lists.values() for name in names}
    lists.setdefault("train", [stem for stem in by_stem if stem not in listed])
    return {split: [by_stem[name] for name in names] for split, names in lists.items() if names}


def cityscapes_classes(masks: list[Path]) -> MaskClasses | None:
    """The 19 classes of Cityscapes if its masks are given, by training numbers or by ids; None for other masks."""
    if not masks or not re.search(r"_gt(Fine|Coarse)_label(Train)?Ids$", masks[0].stem):
        return None
    numbers = range(len(CITYSCAPES)) if masks[0].stem.endswith("TrainIds") else CITYSCAPES_IDS
    return MaskClasses(CITYSCAPES, dict.fromkeys(range(256), VOID) | {value: i for i, value in enumerate(numbers)})
