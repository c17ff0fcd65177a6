"""Reads names for class folders, and the classes of a split without class folders (ImageNet's val/), from files beside it.

    LOC_synset_mapping.txt, synset_words.txt, classes.txt   "n01440764 tench, Tinca tinca" per line
    words.txt                                               the same, with a tab, for all of WordNet
    imagenet_class_index.json                               {"0": ["n01440764", "tench"], …}

    val.txt                                                 "ILSVRC2012_val_00000001.JPEG n01751748", or a number for the class
    LOC_val_solution.csv                                    "ILSVRC2012_val_00000001,n01751748 85 1 499 272"
    ILSVRC2012_validation_ground_truth.txt                  one number per line, for the image with the line's number in its
                                                            name; the devkit's meta.mat beside it lists the classes

A number in val.txt is a line, counted from 0, of the file that names the classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from resnetlab.data import imagenet
from resnetlab.data.text_files import read_lines
from resnetlab.errors import DataError
from resnetlab.formatting import format_list, parse_json

CLASS_FILES = (
    "classes.txt", "LOC_synset_mapping.txt", "synset_words.txt", "imagenet_class_index.json", "words.txt")  # fmt: skip
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT = "devkit"  # part of the name of the folder that may contain it


def read_class_names(root: Path, folders: Sequence[str]) -> list[str]:
    """A name for each class folder: its own, or the one in a file beside it.

    ImageNet's folders get its names (data.imagenet) unless there is a classes.txt: the files that come with ImageNet name the
    classes in several ways. Raises DataError if a file leaves a folder out.
    """
    known = imagenet.imagenet_class_names()
    is_imagenet = known.keys() >= set(folders)
    file = _find_file(root, CLASS_FILES[:1] if is_imagenet else CLASS_FILES)
    if file is None:
        return [known[name] for name in folders] if is_imagenet else list(folders)
    name_of = {line: line for line in read_lines(file)}  # a line may be just a folder's name
    name_of |= dict(_read_class_file(file))
    if missing := [folder for folder in folders if folder not in name_of]:
        raise DataError(
            f"{file} does not name the class folders {format_list(missing)}; add a line for each, or remove it."
        )
    names = [name_of[folder] for folder in folders]
    count = Counter(names)  # ImageNet has two cranes
    return [f"{name} ({folder})" if count[name] > 1 else name for name, folder in zip(names, folders, strict=True)]


def read_flat_labels(root: Path, split: str, images: Sequence[str]) -> list[str] | None:
    """The class folder of each image of a split without class folders; None if no file lists them.

    Args:
        images: names of all image files of the split.

    Raises a DataError that names the file if it lists an image that is missing, leaves one out, or cannot be parsed.
    """
    file = _find_file(root, (f"{split}.txt", f"LOC_{split}_solution.csv"))
    if file is not None:
        by_stem = {name.rsplit(".", 1)[0]: name for name in images}  # Kaggle's list omits the suffix
        folder_of = {by_stem.get(name, name): folder for name, folder in _read_image_list(file, root).items()}
    elif split == "val" and (file := _find_ground_truth(root)) is not None:
        folder_of = _read_ground_truth(file, images)
    else:
        return None
    existing = set(images)
    if missing := sorted(set(folder_of) - existing):
        raise DataError(f"{file} names images that are not in {root / split}: {format_list(missing)}; unpack it again.")
    if extra := sorted(existing - set(folder_of)):
        raise DataError(
            f"{file} gives no class for {format_list(extra)} in {root / split}; add a line for each, or remove them."
        )
    return [folder_of[name] for name in images]


def _find_file(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _read_class_file(file: Path) -> list[tuple[str, str]]:
    """(class folder, name), in the order of the file's numbers from 0."""
    if file.suffix == ".json":
        try:
            entries = parse_json("".join(read_lines(file))).items()
            index = {int(number): (str(folder), str(name)) for number, (folder, name) in entries}
        except (ValueError, TypeError, AttributeError) as error:
            form = '{"0": ["n01440764", "tench"], …}'
            raise DataError(f"{file} is not of the form {form}; fix or remove it.") from error
        return [index[number] for number in sorted(index)]
    parts = [line.split("\t", 1) if "\t" in line else line.split(maxsplit=1) for line in read_lines(file)]
    return [(first_and_rest[0], first_and_rest[-1].strip()) for first_and_rest in parts]


def _read_image_list(file: Path, root: Path) -> dict[str, str]:
    """image -> class folder, from lines "image class" or "image,class box, class box …"."""
    folder_of: dict[str, str] = {}
    folder_by_number = _number_folders(root, file)
    for number, line in enumerate(read_lines(file), 1):
        if number == 1 and line.replace(" ", "") == "ImageId,PredictionString":
            continue
        parts = line.split(",", 1) if file.suffix == ".csv" else line.rsplit(maxsplit=1)
        if len(parts) < 2 or not parts[1].split():
            raise DataError(f'{file}, line {number}: {line!r} is not "image class"; fix or remove it.')
        name, label = parts[0].strip().rsplit("/", 1)[-1], parts[1].split()[0]
        if label.isdigit() and not (root / "train" / label).is_dir():
            label = folder_by_number(number, int(label))
        if folder_of.setdefault(name, label) != label:
            raise DataError(f"{file} gives {name} two classes, {folder_of[name]} and {label}; remove one of the lines.")
    return folder_of


def _number_folders(root: Path, image_list: Path) -> Callable[[int, int], str]:
    """A function (line, class number) -> class folder, by the order of the file that names the classes."""
    file = _find_file(root, (name for name in CLASS_FILES if name != "words.txt"))
    folders = [folder for folder, _ in _read_class_file(file)] if file is not None else []

    def folder(line: int, number: int) -> str:
        if file is None:
            raise DataError(
                f"{image_list} has numbers for classes, and no file beside it lists the classes; put {CLASS_FILES[1]} there."
            )
        if number >= len(folders):
            raise DataError(
                f"{image_list}, line {line}: class {number} is out of range; {file} names {len(folders):,}."
            )
        return folders[number]

    return folder


def _find_ground_truth(root: Path) -> Path | None:
    kits = sorted(path for path in root.iterdir() if DEVKIT in path.name.lower() and path.is_dir())
    places = (root, *kits, *(kit / "data" for kit in kits))
    return next((place / GROUND_TRUTH for place in places if (place / GROUND_TRUTH).is_file()), None)


def _read_ground_truth(file: Path, images: Sequence[str]) -> dict[str, str]:
    """image -> class folder, from the devkit's numbers: line 7 is for the image whose name ends in 00000007."""
    synsets, lines = _read_synsets(file.with_name("meta.mat")), read_lines(file)
    by_number: dict[int, str] = {}
    for name in images:
        found = re.search(r"(\d+)\.\w+$", name)
        if found is None or int(found[1]) in by_number:
            raise DataError(f"{file} identifies images by the numbers in their names; {name} has none of its own.")
        by_number[int(found[1])] = name
    folder_of = {}
    for number, line in enumerate(lines, 1):
        if not line.strip().isdigit() or int(line) not in synsets:
            raise DataError(
                f"{file}, line {number}: {line.strip()!r} is not a class of meta.mat; unpack the devkit again."
            )
        folder_of[by_number.get(number, f"number {number}")] = synsets[int(line)]
    return folder_of


def _read_synsets(meta: Path) -> Mapping[int, str]:
    """ILSVRC2012_ID -> synset, from the devkit's meta.mat."""
    from scipy.io import loadmat  # slow to import, so only here

    if not meta.is_file():
        raise DataError(f"{meta} is not there, but it defines the classes of the numbers; unpack the devkit again.")
    try:
        rows = loadmat(meta, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # a damaged file can fail in any way
        raise DataError(f"{meta} cannot be read ({error}); unpack the devkit again.") from error
