"""What files beside the pictures say: names for class folders, and the classes of a split that lies flat (ImageNet's val/).

    LOC_synset_mapping.txt, synset_words.txt, classes.txt   "n01440764 tench, Tinca tinca" a line
    words.txt                                               the same, with a tab, for all of WordNet
    imagenet_class_index.json                               {"0": ["n01440764", "tench"], …}

    val.txt                                                 "ILSVRC2012_val_00000001.JPEG n01751748", or a number for the class
    LOC_val_solution.csv                                    "ILSVRC2012_val_00000001,n01751748 85 1 499 272"
    ILSVRC2012_validation_ground_truth.txt                  a number a line, for the picture that has the line's number in its
                                                            name; the devkit's meta.mat beside it says which class that is

A number in val.txt is a line, from 0, of the file that names the classes. Nothing is told by a folder's or a picture's place.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from residuum.data import imagenet
from residuum.errors import DataError

CLASS_FILES = (
    "classes.txt", "LOC_synset_mapping.txt", "synset_words.txt", "imagenet_class_index.json", "words.txt")  # fmt: skip
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT = "devkit"  # in the name of the folder that may hold it


def class_names(root: Path, folders: Sequence[str]) -> list[str]:
    """A name for each class folder: its own, or the one that a file beside says.

    ImageNet's own folders have its names (data.imagenet) unless a person's classes.txt says otherwise: the files that come with
    it name them in several ways. Raises DataError where a file leaves a folder out.
    """
    known = imagenet.names()
    inside = known.keys() >= set(folders)
    file = _first(root, CLASS_FILES[:1] if inside else CLASS_FILES)
    if file is None:
        return [known[name] for name in folders] if inside else list(folders)
    pairs = {line.strip(): line.strip() for line in _lines(file)} | dict(
        _named(file)
    )  # a line may be a folder's own name
    if missing := [name for name in folders if name not in pairs]:
        raise DataError(f"{file} does not name the class folders {some(missing)}; add a line for each, or remove it.")
    names = [pairs[name] for name in folders]
    twice = {name for name in names if names.count(name) > 1}  # ImageNet has two cranes
    return [f"{name} ({folder})" if name in twice else name for name, folder in zip(names, folders, strict=True)]


def flat(root: Path, split: str, pictures: Sequence[str]) -> list[str] | None:
    """The class folder that each picture of a flat split belongs to; None where no file says.

    Args:
        pictures: names of all files of the split that are pictures.

    Raises DataError, naming the file, where it names a picture that is not there, leaves one out, or cannot be understood.
    """
    file = _first(root, (f"{split}.txt", f"LOC_{split}_solution.csv"))
    if file is not None:
        by_stem = {name.rsplit(".", 1)[0]: name for name in pictures}  # Kaggle's list leaves the suffix out
        said = {by_stem.get(name, name): label for name, label in _listed(file, root)}
    elif split == "val" and (file := _ground_truth(root)) is not None:
        said = _numbered(file, pictures)
    else:
        return None
    there = set(pictures)
    if missing := sorted(set(said) - there):
        raise DataError(f"{file} names pictures that are not in {root / split}: {some(missing)}; unpack it again.")
    if extra := sorted(there - set(said)):
        raise DataError(
            f"{file} gives no class for {some(extra)} in {root / split}; add a line for each, or remove them."
        )
    return [said[name] for name in pictures]


def some(names: Sequence[str]) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8:,} more" if len(names) > 8 else "")


def _first(root: Path, names: Iterable[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_file()), None)


def _lines(file: Path) -> list[str]:
    try:
        return [line for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror}); mend or remove it.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is no text in UTF-8; mend or remove it.") from error


def _named(file: Path) -> list[tuple[str, str]]:
    """(class folder, name), in the order of the file's numbers from 0."""
    if file.suffix == ".json":
        try:
            index = {
                int(number): (str(folder), str(name))
                for number, (folder, name) in json.loads("".join(_lines(file))).items()
            }
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f'{file} is not of the form {{"0": ["n01440764", "tench"], …}}; mend or remove it.'
            ) from error
        return [index[number] for number in sorted(index)]
    lines = [line.strip() for line in _lines(file)]
    spaced = [line.split("\t", 1) if "\t" in line else line.split(maxsplit=1) for line in lines]
    return [(parts[0], parts[-1].strip()) for parts in spaced]


def _listed(file: Path, root: Path) -> list[tuple[str, str]]:
    """(picture, class folder), of lines "picture class" or "picture,class box, class box …"."""
    said: dict[str, str] = {}
    order = _order(root, file)
    for number, line in enumerate(_lines(file), 1):
        if number == 1 and line.replace(" ", "") == "ImageId,PredictionString":
            continue
        parts = line.split(",", 1) if file.suffix == ".csv" else line.rsplit(maxsplit=1)
        if len(parts) < 2 or not parts[1].split():
            raise DataError(f'{file}, line {number}: {line!r} is not "picture class"; mend or remove it.')
        name, label = parts[0].strip().rsplit("/", 1)[-1], parts[1].split()[0]
        if label.isdigit() and not (root / "train" / label).is_dir():
            label = order(number, int(label))
        if said.setdefault(name, label) != label:
            raise DataError(f"{file} gives {name} two classes, {said[name]} and {label}; remove one of the lines.")
    return list(said.items())


def _order(root: Path, asked: Path) -> Callable[[int, int], str]:
    """A function from (line, number) to a class folder, by the order of the file that names the classes."""
    file = _first(root, (name for name in CLASS_FILES if name != "words.txt"))
    folders = [folder for folder, _ in _named(file)] if file is not None else []

    def folder(line: int, number: int) -> str:
        if file is None:
            raise DataError(
                f"{asked} has numbers for classes, and no file beside it says which they are; put {CLASS_FILES[1]} there."
            )
        if number >= len(folders):
            raise DataError(f"{asked}, line {line}: class {number} is out of range; {file} names {len(folders):,}.")
        return folders[number]

    return folder


def _ground_truth(root: Path) -> Path | None:
    kits = sorted(path for path in root.iterdir() if DEVKIT in path.name.lower() and path.is_dir())
    return next((place / GROUND_TRUTH for place in (root, *kits, *(kit / "data" for kit in kits))
                 if (place / GROUND_TRUTH).is_file()), None)  # fmt: skip


def _numbered(file: Path, pictures: Sequence[str]) -> dict[str, str]:
    """picture -> class folder, from the devkit's numbers: line 7 is of the picture whose name ends in 00000007."""
    synsets, lines = _synsets(file.with_name("meta.mat")), _lines(file)
    by_number: dict[int, str] = {}
    for name in pictures:
        found = re.search(r"(\d+)\.\w+$", name)
        if found is None or int(found[1]) in by_number:
            raise DataError(f"{file} tells pictures by the numbers in their names; {name} has none of its own.")
        by_number[int(found[1])] = name
    said = {}
    for number, line in enumerate(lines, 1):
        if not line.strip().isdigit() or int(line) not in synsets:
            raise DataError(
                f"{file}, line {number}: {line.strip()!r} is no class of meta.mat; unpack the devkit again."
            )
        said[by_number.get(number, f"number {number}")] = synsets[int(line)]
    return said


def _synsets(meta: Path) -> Mapping[int, str]:
    """ILSVRC2012_ID -> synset, from the devkit's meta.mat."""
    from scipy.io import loadmat  # slow to import, so only here

    if not meta.is_file():
        raise DataError(f"{meta} is not there, and says which classes the numbers are; unpack the devkit again.")
    try:
        rows = loadmat(meta, squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows}
    except Exception as error:  # a damaged file can fail in any way
        raise DataError(f"{meta} cannot be read ({error}); unpack the devkit again.") from error
