"""Boxes and masks in both formats give the same data, and everything invalid is named with its file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import cells
from resnetlab.data import box_dataset, mask_dataset
from resnetlab.errors import DataError


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    return cells.make_voc_folder(tmp_path / "voc")


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    return cells.make_coco_folder(tmp_path / "coco")


def test_both_formats_give_the_same_boxes(voc: Path, coco: Path) -> None:
    a, b = box_dataset.load_boxes(voc), box_dataset.load_boxes(coco)
    assert a.classes == b.classes == ("round", "square")
    assert a.evaluated_split == b.evaluated_split == "val" and len(a.train) == 6 and len(a.test) == 3
    for one, other in zip(a.train + a.test, b.train + b.test, strict=True):
        assert torch.equal(one.boxes, other.boxes) and torch.equal(one.labels, other.labels)
        assert torch.equal(one.read_pixels(), other.read_pixels())
    assert a.errors.skipped == b.errors.skipped == {}


def test_both_formats_give_the_same_masks(voc: Path, coco: Path) -> None:
    a, b = mask_dataset.load_masks(voc), mask_dataset.load_masks(coco)
    assert a.classes == b.classes == ("background", "round", "square")
    for i, (one, other) in enumerate(zip(a.train, b.train, strict=True)):
        drawn, filled = one.read()[1], other.read()[1]
        for name, (x1, y1, x2, y2) in cells.scene(i)[2]:
            value = a.classes.index(name)
            assert (filled[y1:y2, x1:x2] == value).all()  # the polygon is the box
            assert (drawn[y1:y2, x1:x2] == value).float().mean() > 0.7
        assert (filled > 0).sum() == sum((x2 - x1) * (y2 - y1) for _, (x1, y1, x2, y2) in cells.scene(i)[2])


def test_an_image_without_a_box_is_background(voc: Path, coco: Path) -> None:
    (voc / "Annotations" / "p0.xml").write_text(cells.voc_annotation([]))
    document = cells.coco_document(range(6))
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != 0]
    (coco / "train.json").write_text(json.dumps(document))
    for root in (voc, coco):
        data = box_dataset.load_boxes(root)
        assert len(data.train) == 6 and data.train[0].boxes.shape == (0, 4) and data.errors.skipped == {}


def test_a_fifth_of_data_without_lists_is_held_out(voc: Path) -> None:
    for name in ("train.txt", "val.txt"):
        (voc / "ImageSets" / "Main" / name).unlink()
    data = box_dataset.load_boxes(voc)
    assert data.evaluated_split == "held-out" and len(data.train) == 7 and len(data.test) == 2
    assert not {p.name for p in data.train} & {p.name for p in data.test}


def _edit(place: str, text: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        (root / place).write_text(text)

    return edit


def _remove(place: str) -> Callable[[Path], None]:
    return lambda root: (root / place).unlink()


def _box(*corners: int, name: str = "round") -> Callable[[Path], None]:
    return _edit("Annotations/p1.xml", cells.voc_annotation([("square", (1, 1, 9, 9)), (name, corners)]))


FAULTS = {  # the change to the VOC folder, the message, and the number of training images left under "skip"
    "missing image": (_remove("JPEGImages/p1.png"), r"Annotations/p1\.xml: its image p1 is not in .*JPEGImages", 5),
    "missing annotation": (_remove("Annotations/p1.xml"), r"JPEGImages/p1\.png: it has no annotation .*p1\.xml", 5),
    "outside": (
        _box(10, 10, 81, 20),
        r"p1\.xml, box 2 of .*: \(10, 10, 81, 20\) reaches outside the image of 80x64",
        6,
    ),
    "below zero": (_box(-1, 10, 20, 20), r"p1\.xml, box 2 .*reaches outside", 6),
    "zero area": (_box(10, 10, 10, 20), r"p1\.xml, box 2 of .*: \(10, 10, 10, 20\) is empty", 6),
    "flipped": (_box(30, 10, 20, 20), r"p1\.xml, box 2 of .*is flipped", 6),
}


@pytest.mark.parametrize(("damage", "message", "left"), FAULTS.values(), ids=FAULTS)
def test_invalid_boxes_stop_or_are_skipped(damage: Callable[[Path], None], message: str, left: int, voc: Path) -> None:
    damage(voc)
    with pytest.raises(DataError, match=message + r".*--on-bad-box skip"):
        box_dataset.load_boxes(voc)
    data = box_dataset.load_boxes(voc, "skip")
    assert len(data.train) == left and len(data.errors.skipped) == 1
    assert left == 5 or len(data.train[1].boxes) == 1  # the other box is kept


def test_a_class_without_training_boxes_is_rejected(voc: Path) -> None:
    (voc / "Annotations" / "p7.xml").write_text(cells.voc_annotation([("hexagon", (1, 1, 9, 9))]))
    with pytest.raises(
        DataError, match=r"p7\.xml, box 1 .*'hexagon' is none of the training classes \(round, square\)"
    ):
        box_dataset.load_boxes(voc)
    data = box_dataset.load_boxes(voc, "skip")
    assert len(data.test[1].boxes) == 0 and len(data.errors.skipped) == 1


BROKEN = {  # these stop under either policy
    "XML": (_edit("Annotations/p2.xml", "<annotation><size>"), r"p2\.xml is broken XML"),
    "no number": (
        _edit("Annotations/p2.xml", cells.voc_annotation([("round", ("a", 1, 2, 3))])),
        r"p2\.xml is not a Pascal VOC",
    ),
    "no name": (
        _edit("Annotations/p2.xml", cells.voc_annotation([("", (1, 1, 5, 5))])),
        r"p2\.xml .*<name> is missing or empty",
    ),
    "named twice": (_edit("ImageSets/Main/train.txt", "p1\np2\np1\n"), r"train\.txt names p1 twice"),
    "in two splits": (_edit("ImageSets/Main/val.txt", "p1\np7\n"), r"val\.txt both name p1"),
    "two images of one name": (
        lambda root: cells.scene(9)[0].save(root / "JPEGImages/p2.jpg"),
        r"p2\..* have one name",
    ),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_broken_files_stop(damage: Callable[[Path], None], message: str, policy: str, voc: Path) -> None:
    damage(voc)
    with pytest.raises(DataError, match=message):
        box_dataset.load_boxes(voc, policy)


def _json(change: Callable[[dict[str, list[dict[str, object]]]], object]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        document = json.loads((root / "train.json").read_text())
        change(document)
        (root / "train.json").write_text(json.dumps(document))

    return edit


JSON_BROKEN = {
    "JSON": (_edit("train.json", '{"images": ['), r"train\.json is broken JSON"),
    "no list": (_edit("train.json", '{"images": 3}'), r"train\.json is not a COCO document: its 'images'"),
    "two of one id": (_json(lambda d: d["images"][1].update(id=0)), r"p0\.png and p1\.png both have the id 0"),
    "listed twice": (_json(lambda d: d["images"][1].update(file_name="p0.png")), r"lists p0\.png twice"),
    "other categories": (_json(lambda d: d["categories"][0].update(name="disc")), r"different categories: disc, round"),
    "no id": (_json(lambda d: d["images"][1].pop("id")), r"entry 1 of 'images' has no 'id'"),
}


@pytest.mark.parametrize(("damage", "message"), JSON_BROKEN.values(), ids=JSON_BROKEN)
def test_broken_json_stops(damage: Callable[[Path], None], message: str, coco: Path) -> None:
    damage(coco)
    with pytest.raises(DataError, match=message):
        box_dataset.load_boxes(coco, "skip")


JSON_FAULTS = {
    "missing image": (_remove("images/p2.png"), r"train\.json, image 2: its image p2\.png does not exist"),
    "no such image": (
        _json(lambda d: d["annotations"][3].update(image_id=77)),
        r"annotation 3: it is for the image 77",
    ),
    "no such class": (
        _json(lambda d: d["annotations"][3].update(category_id=1)),
        r"annotation 3: its category 1 is not",
    ),
    "no box": (_json(lambda d: d["annotations"][3].update(bbox=[1, 2])), r"annotation 3: its bbox is \[1, 2\]"),
    "empty box": (_json(lambda d: d["annotations"][3].update(bbox=[1, 2, 0, 4])), r"box 2 of p1\.png: .* is empty"),
    "flipped box": (
        _json(lambda d: d["annotations"][3].update(bbox=[9, 2, -3, 4])),
        r"box 2 of p1\.png: .* is flipped",
    ),
}


@pytest.mark.parametrize(("damage", "message"), JSON_FAULTS.values(), ids=JSON_FAULTS)
def test_invalid_json_annotations_stop_or_are_skipped(damage: Callable[[Path], None], message: str, coco: Path) -> None:
    damage(coco)
    with pytest.raises(DataError, match=message):
        box_dataset.load_boxes(coco)
    assert len(box_dataset.load_boxes(coco, "skip").errors.skipped) == 1


def test_an_image_that_is_not_of_its_annotations_size_stops(voc: Path) -> None:
    Image.new("RGB", (40, 40)).save(voc / "JPEGImages" / "p1.png")
    with pytest.raises(DataError, match=r"p1\.png has 40x40 pixels, its annotation says 80x64"):
        box_dataset.load_boxes(voc).train[1].read_pixels()


MASK_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another size": (
        lambda root: Image.new("L", (80, 63)).save(root / "SegmentationClass/p1.png"),
        r"p1\.png: has 80x63 pixels, its image 80x64",
    ),
    "unknown class": (
        lambda root: Image.new("L", (80, 64), 3).save(root / "SegmentationClass/p1.png"),
        r"p1\.png: has the value 3, but there are 3 classes",
    ),
    "colours": (
        lambda root: Image.new("RGB", (80, 64)).save(root / "SegmentationClass/p1.png"),
        r"p1\.png: has the mode RGB",
    ),
    "no image": (lambda root: Path(root / "SegmentationClass/p1.png").write_bytes(b"x"), r"p1\.png: cannot be read"),
    "missing": (_remove("SegmentationClass/p1.png"), r"JPEGImages/p1\.png: it has no mask"),
}


@pytest.mark.parametrize(("damage", "message"), MASK_FAULTS.values(), ids=MASK_FAULTS)
def test_invalid_masks_stop_or_are_skipped(damage: Callable[[Path], object], message: str, voc: Path) -> None:
    damage(voc)
    with pytest.raises(DataError, match=message + r".*--on-bad-mask skip"):
        mask_dataset.load_masks(voc)
    data = mask_dataset.load_masks(voc, "skip")
    assert len(data.train) == 5 and len(data.errors.skipped) == 1


def test_a_folder_of_neither_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither in Pascal VOC's format .* nor in COCO's"):
        box_dataset.load_boxes(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        box_dataset.load_boxes(tmp_path / "nowhere")
