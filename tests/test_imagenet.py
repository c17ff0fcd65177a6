"""ImageNet's usual layout: train/ of synsets, a flat val/ with a list of labels beside it, names from a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from images import photo
from resnetlab.cli.main import run_command
from resnetlab.data import sources
from resnetlab.data.dataset import Dataset
from resnetlab.errors import DataError

# not among the 1,000 classes, whose names are known without a file
SYNSETS = ("n91440764", "n91443537", "n92012849", "n93126707")
NAMES = ("tench, Tinca tinca", "goldfish", "crane", "crane")
CLASSES = ("crane (n92012849)", "crane (n93126707)", "goldfish", "tench, Tinca tinca")
TRUTH = (3, 0, 0, 2, 1, 3, 1, 2)  # the class of each image of val/, by the order of SYNSETS
IDS = (7, 2, 9, 4)  # the devkit's numbers of SYNSETS: in arbitrary order


def imagenet(root: Path) -> Path:
    for i, synset in enumerate(SYNSETS):
        (root / "train" / synset).mkdir(parents=True)
        for k in range(3):
            photo(10 * i + k).save(root / "train" / synset / f"{synset}_{k}.JPEG")
    (root / "val").mkdir()
    for i in range(len(TRUTH)):
        photo(100 + i).save(root / "val" / name(i))
    return root


def name(i: int) -> str:
    return f"ILSVRC2012_val_{i + 1:08d}.JPEG"


def lines(form: Callable[[int, int], str]) -> str:
    return "".join(
        form(i, label) + "\n" for i, label in reversed(list(enumerate(TRUTH)))
    )  # in another order than the files


def devkit(place: Path) -> None:
    from scipy.io import savemat

    place.mkdir(parents=True)
    rows = np.zeros(5, dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    for k, (number, synset) in enumerate([*zip(IDS, SYNSETS, strict=True), (1, "n00000000")]):
        rows[k] = (number, synset, "words")
    savemat(place / "meta.mat", {"synsets": rows})
    (place / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{IDS[label]}\n" for label in TRUTH))


MAPPING = "".join(f"{s} {n}\n" for s, n in zip(SYNSETS, NAMES, strict=True))
LISTS: dict[str, Callable[[Path], object]] = {
    "val.txt of synsets": lambda d: (d / "val.txt").write_text(lines(lambda i, c: f"{name(i)} {SYNSETS[c]}")),
    "val.txt as some editors save it": lambda d: (d / "val.txt").write_bytes(
        b"\xef\xbb\xbf" + lines(lambda i, c: f"{name(i)} {SYNSETS[c]}").replace("\n", "\r\n").encode()
    ),
    "val.txt of numbers": lambda d: (
        (d / "val.txt").write_text(lines(lambda i, c: f"val/{name(i)}\t{c}")),
        (d / "synset_words.txt").write_text(MAPPING),
    ),
    "kaggle": lambda d: (d / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        + lines(lambda i, c: f"{name(i)[:-5]},{SYNSETS[c]} 85 1 499 272 {SYNSETS[c]} 1 2 3 4 ")
    ),
    "devkit": lambda d: devkit(d / "ILSVRC2012_devkit_t12" / "data"),
}


def load(root: Path) -> Dataset:
    return sources.load_dataset(str(root), Path("data"))


@pytest.mark.parametrize("form", LISTS)
def test_a_flat_val_by_its_list(tmp_path: Path, form: str) -> None:
    root = imagenet(tmp_path / "imagenet")
    LISTS[form](root)
    (root / "LOC_synset_mapping.txt").write_text(MAPPING)
    data = load(root)
    assert data.classes == CLASSES and data.evaluated_split == "val" and len(data.train) == 12
    assert list(data.test.names) == [f"val/{name(i)}" for i in range(len(TRUTH))]
    expected = [{"n91440764": 3, "n91443537": 2, "n92012849": 0, "n93126707": 1}[SYNSETS[c]] for c in TRUTH]
    assert data.test.labels.tolist() == expected
    assert data.test.read_image(2).shape == (45, 60, 3)
    assert run_command(["data", "check", str(root), "--no-timing", "--workers", "0"]) == 0  # none of them is a stray


CLASS_FILES: dict[str, str] = {
    "LOC_synset_mapping.txt": MAPPING,
    "synset_words.txt": MAPPING,
    "classes.txt": MAPPING,
    "words.txt": "n00001740\tentity\n" + "".join(f"{s}\t{n}\n" for s, n in zip(SYNSETS, NAMES, strict=True)),
    "imagenet_class_index.json": json.dumps({str(i): pair for i, pair in enumerate(zip(SYNSETS, NAMES, strict=True))}),
}  # fmt: skip


@pytest.mark.parametrize("file", CLASS_FILES)
def test_class_names_beside(tmp_path: Path, file: str) -> None:
    root = imagenet(tmp_path / "imagenet")
    LISTS["val.txt of synsets"](root)
    assert load(root).classes == SYNSETS
    (root / file).write_text(CLASS_FILES[file])
    assert load(root).classes == CLASSES
    (root / file).write_text(CLASS_FILES[file].replace("n91443537", "n99999999"))
    with pytest.raises(DataError, match=rf"{file} does not name the class folders n91443537; add a line"):
        load(root)
    (root / file).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=rf"{file} is not valid UTF-8"):
        load(root)


def changed(file: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda d: (d / file).write_text((d / file).read_text().replace(old, new, 1))


KIT = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "an image gone": (
        "val.txt of synsets", lambda d: (d / "val" / name(3)).unlink(),
        r"val.txt names images that are not in .*val: ILSVRC2012_val_00000004.JPEG; unpack it again"),
    "an image more": (
        "val.txt of synsets", lambda d: photo(1).save(d / "val" / "new.JPEG"),
        r"val.txt gives no class for new.JPEG in .*val; add a line for each"),
    "a line that is none": (
        "val.txt of synsets", changed("val.txt", ".JPEG n91440764", ".JPEG"), r'val.txt, line 6: .* is not "image class"'),
    "two classes": (
        "val.txt of synsets", changed("val.txt", name(3), name(4)),
        r"val.txt gives ILSVRC2012_val_00000005.JPEG two classes, n91443537 and n92012849; remove"),
    "a class that is not trained on": (
        "val.txt of synsets", changed("val.txt", f"{name(3)} n92012849", f"{name(3)} n99999999"),
        r"hold different classes: only in train none, only in val n99999999"),
    "numbers without names": (
        "val.txt of numbers", lambda d: (d / "synset_words.txt").unlink(),
        r"val.txt has numbers for classes, and no file beside it lists the classes; put LOC_synset_mapping.txt there"),
    "a number out of range": (
        "val.txt of numbers", changed("val.txt", "\t3", "\t44"),
        r"val.txt, line \d: class 44 is out of range; .*synset_words.txt names 4"),
    "kaggle's gone": (
        "kaggle", lambda d: (d / "val" / name(3)).unlink(),
        r"LOC_val_solution.csv names images that are not in .*val: ILSVRC2012_val_00000004; unpack"),
    "a devkit too short": (
        "devkit", lambda d: photo(1).save(d / "val" / name(8)),
        r"ground_truth.txt gives no class for ILSVRC2012_val_00000009.JPEG"),
    "a devkit too long": (
        "devkit", lambda d: (d / "val" / name(3)).unlink(),
        r"ground_truth.txt names images that are not in .*val: number 4; unpack"),
    "a number of no class": ("devkit", changed(KIT, "7\n", "5\n"), r"ground_truth.txt, line 2: '5' is not a class of meta.mat"),
    "no meta.mat": (
        "devkit", lambda d: (d / KIT).with_name("meta.mat").unlink(), r"meta.mat is not there, but it defines the classes"),
    "a damaged meta.mat": (
        "devkit", lambda d: (d / KIT).with_name("meta.mat").write_bytes(b"x" * 200), r"meta.mat cannot be read \("),
    "a name without a number": (
        "devkit", lambda d: photo(1).save(d / "val" / "dog.JPEG"), r"by the numbers in their names; dog.JPEG has none"),
    "no list at all": (
        "val.txt of synsets", lambda d: (d / "val.txt").unlink(),
        r"val holds no class folders with images: it holds 8 images in no class folder; .*val.txt"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path: Path, fault: str) -> None:
    form, break_it, sentence = FAULTS[fault]
    root = imagenet(tmp_path / "imagenet")
    LISTS[form](root)
    break_it(root)
    with pytest.raises(DataError, match=sentence):
        load(root)
