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


def _box(*corners: float | str, name: str = "round") -> Callable[[Path], None]:
    return _edit("Annotations/p1.xml", cells.voc_annotation([("square", (1, 1, 9, 9)), (name, corners)]))


def _voc_polygon(*corners: float) -> Callable[[Path], None]:
    """Replaces the second object's box by a polygon, as RectLabel and Labelbox write it."""
    tags = [(f"{axis}{i // 2 + 1}", v) for i, (axis, v) in enumerate(zip("xy" * len(corners), corners, strict=False))]
    polygon = "".join(f"<{tag}>{v}</{tag}>" for tag, v in tags)

    def edit(root: Path) -> None:
        text = cells.voc_annotation([("square", (1, 1, 9, 9)), ("round", (0, 0, 1, 1))])
        head, _, _ = text.rpartition("<bndbox>")
        (root / "Annotations/p1.xml").write_text(f"{head}<polygon>{polygon}</polygon></object></annotation>")

    return edit


def _voc_text(old: str, new: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        file = root / "Annotations/p1.xml"
        file.write_text(file.read_text().replace(old, new))

    return edit


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
    "null id": (_json(lambda d: d["categories"][0].update(id=None)), r"entry 0 of 'categories' has the id None"),
    "no id": (_json(lambda d: d["images"][1].pop("id")), r"entry 1 of 'images' has no 'id'"),
}


@pytest.mark.parametrize(("damage", "message"), JSON_BROKEN.values(), ids=JSON_BROKEN)
def test_broken_json_stops(damage: Callable[[Path], None], message: str, coco: Path) -> None:
    damage(coco)
    with pytest.raises(DataError, match=message):
        box_dataset.load_boxes(coco, "skip")


JSON_FAULTS = {
    "image id": (_json(lambda d: d["annotations"][3].update(image_id=[1])), r"annotation 3: its image_id is \[1\]"),
    "category": (
        _json(lambda d: d["annotations"][3].update(category_id={"id": 1})),
        r"annotation 3: its category \{'id'",
    ),
    "height": (_json(lambda d: d["images"][1].update(height="48px")), r"image 1: its width and height are 80 x '48px'"),
    "width": (_json(lambda d: d["images"][1].update(width=float("inf"))), r"image 1: its width and height are inf x"),
    "narrow box": (
        _json(lambda d: d["annotations"][3].update(bbox=[40, 2, 1e-6, 4])),
        r"box 2 of p1\.png: .* is empty",
    ),
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
        lambda root: Image.new("RGB", (80, 64), "red").save(root / "SegmentationClass/p1.png"),
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


def test_voc_annotations_as_tools_write_them(voc: Path) -> None:
    """Sizes in decimals, "True", a polygon in the place of a box."""
    _voc_polygon(10, 12, 30, 12, 20, 40)(voc)
    _voc_text("<width>80<", "<width>80.0<")(voc)
    _voc_text("<difficult>0<", "<difficult>True<")(voc)
    with pytest.warns(UserWarning, match="2 of 18 objects are marked difficult or iscrowd: not trained on"):
        image = box_dataset.load_boxes(voc).train[1]
    assert image.size == (64, 80) and image.ignored.all()
    assert image.boxes.tolist() == [[1, 1, 9, 9], [10, 12, 30, 40]]


LISTS = {
    "byte order mark and CRLF": "\ufeffp0\r\np1\r\np2\r\n",
    "file names": "p0.png\np1.png\np2.png\n",
    "pairs of paths": "".join(f"/JPEGImages/p{i}.png /SegmentationClass/p{i}.png\n" for i in range(3)),
    "labels": "p0 -1\np1  1\np2  0\n",
    "paths from Windows": "".join(f"data\\JPEGImages\\P{i}.PNG\n" for i in range(3)),
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_lists_as_tools_write_them(text: str, voc: Path) -> None:
    for kind in ("Main", "Segmentation"):
        (voc / "ImageSets" / kind / "train.txt").write_text(text, "utf-8")
    expected = [f"JPEGImages/p{i}.png" for i in range(3)]
    assert [image.name for image in box_dataset.load_boxes(voc).train] == expected
    assert [image.name for image in mask_dataset.load_masks(voc).train] == expected


def test_names_with_spaces_and_accents(voc: Path) -> None:
    """A list holds "é" as one character, the file's name as two."""
    for folder, suffix in (("JPEGImages", "png"), ("Annotations", "xml"), ("SegmentationClass", "png")):
        for i, name in enumerate(("my photo 0", "my photo 1", "cafe\u0301")):
            (voc / folder / f"p{i}.{suffix}").rename(voc / folder / f"{name}.{suffix}")
    for kind in ("Main", "Segmentation"):
        (voc / "ImageSets" / kind / "train.txt").write_text("my photo 0\nmy photo 1\ncaf\u00e9 1\n", "utf-8")
    assert len(box_dataset.load_boxes(voc).train) == len(mask_dataset.load_masks(voc).train) == 3


def _write_masks(voc: Path, *, zeros: int = 0, others: int = 255) -> None:
    for file in (voc / "SegmentationClass").iterdir():
        with Image.open(file) as mask:
            mask.point(lambda value: others if value else zeros).save(file)


def test_masks_of_0_and_255_have_a_class(voc: Path) -> None:
    _write_masks(voc)
    with pytest.raises(DataError, match=r"no value but 0 and 255, .*--set class_255=round"):
        mask_dataset.load_masks(voc)  # three classes: which of them is it?
    with pytest.warns(UserWarning, match="no mask to train on has a pixel of round"):
        square = mask_dataset.load_masks(voc, class_255="square")
    assert square.train[0].read()[1].unique().tolist() == [0, 2]
    (voc / "classes.txt").write_text("\ufeffbackground\r\nthing\r\n")
    with pytest.warns(UserWarning, match="the masks hold only 0 and 255: 255 is read as thing"):
        data = mask_dataset.load_masks(voc)
    assert data.classes == ("background", "thing") and data.train[0].read()[1].unique().tolist() == [0, 1]
    (voc / "classes.txt").unlink()
    with pytest.warns(UserWarning, match="255 is read as foreground"):
        assert mask_dataset.load_masks(voc).classes == ("background", "foreground")
    with pytest.raises(DataError, match="no value but 0 and 255"):
        mask_dataset.load_masks(voc, class_255="ignore")


def test_255_beside_classes_is_not_evaluated(voc: Path) -> None:
    file = voc / "SegmentationClass" / "p0.png"
    with Image.open(file) as mask:
        mask.point(lambda value: {2: 255}.get(value, value)).save(file)
    assert 255 in mask_dataset.load_masks(voc).train[0].read()[1]


def test_a_split_of_background_alone_is_no_evaluation(voc: Path) -> None:
    for i in range(6, 9):
        Image.new("L", (80, 64)).save(voc / "SegmentationClass" / f"p{i}.png")
    with pytest.raises(DataError, match="no mask of the val split has another class than background"):
        mask_dataset.load_masks(voc)


def test_masks_of_turned_images_are_upright(voc: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(voc / "JPEGImages" / "p0.png") as image:
        image.transpose(Image.Transpose.ROTATE_90).save(voc / "JPEGImages" / "p0.png", exif=exif)
    pixels, mask = mask_dataset.load_masks(voc).train[0].read()
    assert pixels.shape[:2] == mask.shape == (64, 80)
    with Image.open(voc / "SegmentationClass" / "p0.png") as drawn:
        drawn.transpose(Image.Transpose.ROTATE_90).save(voc / "SegmentationClass" / "p0.png")
    with pytest.raises(DataError, match="has 64x80 pixels, its image 80x64"):
        mask_dataset.load_masks(voc)


@pytest.mark.parametrize("load", [box_dataset.load_boxes, mask_dataset.load_masks])
def test_json_of_another_size_stops_both_tasks(load: Callable[[Path], object], coco: Path) -> None:
    _json(lambda d: d["images"][1].update(width=64, height=80))(coco)
    with pytest.raises(DataError, match=r"p1\.png has 80x64 pixels, its annotation says 64x80"):
        load(coco)


POLYGON_FAULTS: dict[str, tuple[object, str]] = {
    "not nested": ([1, 2, 3], "a polygon of fewer than three corners"),
    "null": ([None], "a polygon that is no list of numbers"),
    "nan": ([[float("nan"), 1, 2, 3, 4, 5]], "does not consist of pixel coordinates"),
    "far away": ([[-2000, 1, 2, 3, 4, 5]], "is outside the image of 80x64 pixels"),
    "only a box": ([], "no polygon and no run lengths"),
}


@pytest.mark.parametrize(("segmentation", "message"), POLYGON_FAULTS.values(), ids=POLYGON_FAULTS)
def test_a_bad_polygon_is_left_out_and_not_background(segmentation: object, message: str, coco: Path) -> None:
    _json(lambda d: d["annotations"][2].update(segmentation=segmentation, category_id=7))(coco)
    with pytest.raises(DataError, match=rf"train\.json, annotation 2: its segmentation has .*{message}.*--on-bad-mask"):
        mask_dataset.load_masks(coco)
    data = mask_dataset.load_masks(coco, "skip")
    (_, (x1, y1, x2, y2)), (_, other) = cells.scene(1)[2]
    mask = data.train[1].read()[1]
    assert len(data.errors.skipped) == 1 and len(data.train) == 6
    assert (mask[y1:y2, x1:x2] == 255).all() and (mask == 255).sum() == (y2 - y1) * (x2 - x1)
    assert (mask[other[1] : other[3], other[0] : other[2]] > 0).all()


def test_crowds_in_run_lengths_are_not_evaluated(coco: Path) -> None:
    counts = [0, 10, 54, 10, 64 * 80 - 74]
    crowd = {"id": 99, "image_id": 1, "category_id": 7, "iscrowd": 1, "bbox": [0, 0, 2, 10]}
    crowd |= {"segmentation": {"counts": counts, "size": [64, 80]}}
    _json(lambda d: d["annotations"].append(crowd))(coco)
    with pytest.warns(UserWarning, match="1 of 19 objects are marked difficult or iscrowd"):
        mask = mask_dataset.load_masks(coco).train[1].read()[1]
    assert (mask[:10, :2] == 255).all() and (mask == 255).sum() == 20


@pytest.mark.parametrize("name", ["\ud800", " "])
def test_classes_that_no_model_file_could_name_are_refused(name: str, coco: Path) -> None:
    for split in ("train", "val"):
        document = json.loads((coco / f"{split}.json").read_text())
        document["categories"][0]["name"] = name
        (coco / f"{split}.json").write_text(json.dumps(document))
    for read in (box_dataset.load_boxes, mask_dataset.load_masks):
        with pytest.raises(DataError, match=r"is no class name|cannot be encoded as UTF-8"):
            read(coco)


def test_more_classes_than_masks_hold_are_refused(coco: Path, voc: Path) -> None:
    for split in ("train", "val"):
        document = json.loads((coco / f"{split}.json").read_text())
        document["categories"] += [{"id": i, "name": f"c{i}"} for i in range(10, 263)]
        (coco / f"{split}.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="has 255 classes; masks hold 254 beside the background"):
        mask_dataset.load_masks(coco)
    assert len(box_dataset.load_boxes(coco).classes) == 255
    (voc / "classes.txt").write_text("\n".join(f"c{i}" for i in range(256)))
    with pytest.raises(DataError, match=r"classes\.txt names 256 classes; masks hold 255"):
        mask_dataset.load_masks(voc)


def test_a_folder_of_neither_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither in CVAT's XML .* nor in Pascal VOC's format .* nor in COCO's"):
        box_dataset.load_boxes(tmp_path)
    for name in ("photos/a/1.png", "photos/b/2.png", "split/train/a/1.png", "split/train/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for name in ("photos", "split"):
        with pytest.raises(DataError, match=rf"{name} is a folder of class folders, .*: resnetlab train .*{name}\.$"):
            box_dataset.load_boxes(tmp_path / name)
    (tmp_path / "photos" / "a").rename(tmp_path / "photos" / "masks")
    with pytest.raises(DataError, match="is neither in"):  # of images and masks, say
        box_dataset.load_boxes(tmp_path / "photos")
    with pytest.raises(DataError, match="nowhere is not there; give a folder"):
        box_dataset.load_boxes(tmp_path / "nowhere")
