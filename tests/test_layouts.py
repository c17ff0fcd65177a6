"""Every layout that is recognised gives the same boxes and masks; any other is refused with what was looked for."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import annotated_layouts as layouts
import cells
from resnetlab.data import box_dataset, mask_dataset, sources
from resnetlab.data.mask_files import read_codes
from resnetlab.errors import DataError

BOXES = layouts.BOXES | layouts.OUTLINES


def load(function: Any, root: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Roboflow's root category, cancelled tasks, images without masks
        return function(root)


@pytest.mark.parametrize("layout", BOXES)
def test_boxes_of_every_layout(layout: str, tmp_path: Path) -> None:
    BOXES[layout](tmp_path)
    data = load(box_dataset.load_boxes, tmp_path)
    assert data.classes == ("round", "square") and data.evaluated_split == "val"
    assert data.layout.endswith(", 2 splits, 9 images, 2 classes")
    images = sorted((*data.train, *data.test), key=lambda image: image.file.name)
    assert [image.file.stem for image in images] == [f"p{i}" for i in range(9)] and len(data.train) == 6
    for i, image in enumerate(images):
        names, boxes = zip(*cells.scene(i)[2], strict=True)
        assert [data.classes[label] for label in image.labels] == list(names)
        torch.testing.assert_close(image.boxes, torch.tensor(boxes).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("layout", layouts.OUTLINES)
def test_outlines_of_every_layout(layout: str, tmp_path: Path) -> None:
    layouts.OUTLINES[layout](tmp_path)
    data = load(mask_dataset.load_masks, tmp_path)
    assert data.classes == ("background", "round", "square")
    for image in (*data.train, *data.test):
        i = int(image.file.stem[1:])
        expected = torch.zeros(cells.SIZE, dtype=torch.uint8)
        for name, (x1, y1, x2, y2) in cells.scene(i)[2]:
            expected[y1:y2, x1:x2] = data.classes.index(name)
        assert torch.equal(image.read()[1], expected), image.name


@pytest.mark.parametrize("layout", layouts.MASKS)
def test_masks_of_every_layout(layout: str, tmp_path: Path) -> None:
    layouts.MASKS[layout](tmp_path)
    data = load(mask_dataset.load_masks, tmp_path)
    assert set(data.classes) == {"background", "round", "square"} and data.classes[0] == "background"
    assert len(data.train) == 6 and len(data.test) == 3 and data.evaluated_split == "val"
    index = torch.tensor([data.classes.index(name) for name in ("background", "round", "square")], dtype=torch.uint8)
    for image in (*data.train, *data.test):
        mask = torch.from_numpy(np.array(cells.scene(int(image.file.stem[1:]))[1]).astype(np.int64))
        assert torch.equal(image.read()[1], index[mask])


@pytest.mark.parametrize("layout", [*layouts.EVERY])
def test_a_folder_in_folders_is_read_as_alone(layout: str, tmp_path: Path) -> None:
    """VOC's masks in VOCdevkit/VOC2012 lost their lists, splits and classes, and YOLO's its data.yaml."""
    inner = tmp_path / "download" / "cells 3" / "export"
    layouts.EVERY[layout](inner)
    (tmp_path / "download" / "cells 3.zip").touch()
    readers = [box_dataset.load_boxes] * (layout in BOXES)
    readers += [mask_dataset.load_masks] * (
        layout in layouts.OUTLINES or layout in layouts.MASKS or layout not in BOXES
    )
    for read in readers:
        alone, outer = load(read, inner), load(read, tmp_path / "download")
        assert (outer.fingerprint, outer.classes, [*outer.splits]) == (
            alone.fingerprint,
            alone.classes,
            [*alone.splits],
        )


def test_cityscapes_has_its_19_classes(tmp_path: Path) -> None:
    layouts.cityscapes(tmp_path)
    with pytest.warns(UserWarning, match="no mask to train on has a pixel of sidewalk, building, .* and 8 more"):
        data = mask_dataset.load_masks(tmp_path)
    assert len(data.classes) == 19 and len(data.train) == 6 and len(data.test) == 3
    known = {data.classes[value] for image in data.train for value in image.read()[1].unique().tolist()}
    assert known == {"road", "person", "car"}


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    layouts.roboflow_coco(tmp_path / "coco")
    with pytest.warns(
        UserWarning, match="'shapes' is only the supercategory of others and has no object; it is left out"
    ):
        box_dataset.load_boxes(tmp_path / "coco")
    layouts.segnet(tmp_path / "masks")
    with pytest.warns(UserWarning, match="the test images have no masks and are left out"):
        mask_dataset.load_masks(tmp_path / "masks")
    layouts.ultralytics(tmp_path / "yolo")
    (tmp_path / "yolo" / "labels" / "train" / "p1.txt").unlink()
    with pytest.warns(UserWarning, match="1 of 9 images have no label file and count as background"):
        assert len(box_dataset.load_boxes(tmp_path / "yolo").train[1].boxes) == 0


def test_what_is_of_no_split_is_said(tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path / "yolo")
    shutil.copytree(tmp_path / "yolo" / "images" / "val", tmp_path / "yolo" / "images" / "holdback")
    with pytest.warns(
        UserWarning, match=r"3 images outside the splits of data\.yaml are left out, such as images/holdback/p6"
    ):
        assert len(box_dataset.load_boxes(tmp_path / "yolo").test) == 3
    cells.make_voc_folder(tmp_path / "voc", train=4, val=2)
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    (lists / "round_train.txt").write_text("p0  1\n")  # VOC's own, of a class
    (lists / "val.txt").rename(lists / "Validation.txt")
    (lists / "holdback.txt").write_text("p1.png\n")
    with pytest.warns(UserWarning, match=r"Main: holdback\.txt named after no split") as said:
        data = box_dataset.load_boxes(tmp_path / "voc")
    assert (len(data.train), len(data.test), data.evaluated_split, len(said)) == (4, 2, "val", 1)


YOLO_FAULTS = {
    "class": ("2 0.5 0.5 0.1 0.1", r"p1\.txt, line 1: its class is 2, but there are 2 classes"),
    "half": ("0.5 0.5 0.5 0.1 0.1", r"p1\.txt, line 1: its class is 0.5, but there are 2 classes, 0 the first"),
    "infinity": ("inf 0.5 0.5 0.1 0.1", r"p1\.txt, line 1: 'inf 0.5 0.5 0.1 0.1' does not consist of numbers"),
    "words": ("0 a 0.5 0.1 0.1", r"p1\.txt, line 1: '0 a 0.5 0.1 0.1' does not consist of numbers"),
    "numbers": ("0 0.5 0.5 0.1 0.1 0.9", r"p1\.txt, line 1: it has 5 numbers behind the class"),
    "pixels": ("0 40 30 10 10", r"p1\.txt, box 1 of images/train/p1\.png: .* reaches outside the image of 80x64"),
}


@pytest.mark.parametrize(("line", "message"), YOLO_FAULTS.values(), ids=YOLO_FAULTS)
def test_bad_lines_stop_or_are_skipped(line: str, message: str, tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path)
    (tmp_path / "labels" / "train" / "p1.txt").write_text(f"{line}\n1 0.5 0.5 0.25 0.25\n")
    with pytest.raises(DataError, match=message):
        box_dataset.load_boxes(tmp_path)
    data = box_dataset.load_boxes(tmp_path, "skip")
    assert len(data.errors.skipped) == 1 and data.train[1].boxes.tolist() == [[30, 24, 50, 40]]


def _change_json(file: Path, change: Any) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


LABELME_FAULTS = {
    "group": (lambda content: content["shapes"][0].update(group_id={}), "p0.json, shape 1: its shape cannot be used"),
    "size": (lambda content: content.update(imageHeight="tall"), "p0.json: it is not a LabelMe file"),
}


@pytest.mark.parametrize(("change", "message"), LABELME_FAULTS.values(), ids=LABELME_FAULTS)
def test_impossible_values_of_labelme_are_named(change: Any, message: str, tmp_path: Path) -> None:
    layouts.labelme(tmp_path)
    file = min(tmp_path.rglob("p0.json"))
    _change_json(file, change)
    with pytest.raises(DataError, match=message):
        load(box_dataset.load_boxes, tmp_path)


@pytest.mark.parametrize("change", [{"labels": 5}, {"classes": 5}, {"labels": {"p2": 5}}])
def test_a_file_of_another_form_is_refused_in_a_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    layouts.fiftyone(tmp_path)
    _change_json(min(tmp_path.rglob("labels.json")), lambda content: content.update(change))
    with pytest.raises(DataError, match=r"looks like FiftyOne's .* another form"):
        load(box_dataset.load_boxes, tmp_path)


def test_classes_of_yolo_need_numbers(tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nnames:\n  round: 0\n  square: 1\n")
    with pytest.raises(DataError, match=r"data.yaml: 'round' in `names` is no number; write the classes as 0: NAME"):
        box_dataset.load_boxes(tmp_path)


@pytest.mark.parametrize("point", ["0.1 0.1", "0.1 0.1 2.0"])
def test_key_points_of_yolo_are_no_outline(point: str, tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path)
    expected = load(box_dataset.load_boxes, tmp_path)
    for file in (tmp_path / "labels").rglob("*.txt"):
        file.write_text("".join(f"{line} {point} {point}\n" for line in file.read_text().split("\n") if line))
    with open(tmp_path / "data.yaml", "a") as config:
        config.write(f"kpt_shape: [2, {len(point.split())}]\n")
    with pytest.warns(UserWarning, match=r"the key points behind the boxes \(kpt_shape\) are left out"):
        assert box_dataset.load_boxes(tmp_path).fingerprint == expected.fingerprint


def test_a_note_in_latin_1_does_not_hide_the_masks(tmp_path: Path) -> None:
    layouts.images_and_masks(tmp_path)
    (tmp_path / "note.txt").write_bytes("gr\xfcn".encode("latin-1"))
    assert load(mask_dataset.load_masks, tmp_path).layout.startswith("masks in folders")


def test_classes_of_a_label_map_may_begin_with_a_digit(tmp_path: Path) -> None:
    layouts.cvat_masks(tmp_path)
    file = tmp_path / "labelmap.txt"
    file.write_text(file.read_text().replace("round", "2round"))
    assert "2round" in load(mask_dataset.load_masks, tmp_path).classes


def test_a_name_that_is_too_long_is_of_no_image(tmp_path: Path) -> None:
    layouts.official_coco(tmp_path)
    file = next(iter(tmp_path.rglob("instances_train*.json")))
    _change_json(file, lambda content: content["images"][0].update(file_name="9" * 400 + ".png"))
    with pytest.raises(DataError, match=r"its image 9+\.png does not exist"):
        load(box_dataset.load_boxes, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"), [(np.full((9, 9), -1, np.int32), "from -1 to -1"), (np.zeros((64, 64), np.uint8), "limit")]
)
def test_masks_that_no_one_drew_are_refused(
    values: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    file = tmp_path / "mask.tif"
    Image.fromarray(values).save(file)
    with pytest.raises(DataError, match=f"cannot be read as a mask .*{message}"):
        read_codes(file, colours=False)


def test_images_in_two_splits_are_refused(tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images\nval: images/val\nnames: [round, square]\n")
    with pytest.raises(
        DataError, match=r"the training and val splits share images/val/p6\.png, .*do not evaluate on training"
    ):
        box_dataset.load_boxes(tmp_path)


def test_images_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    layouts.roboflow_coco(tmp_path)
    file = tmp_path / "valid" / "_annotations.coco.json"
    file.write_text(file.read_text().replace("p6.png", "p0.png"))
    (tmp_path / "valid" / "p6.png").rename(tmp_path / "valid" / "p0.png")
    data = load(box_dataset.load_boxes, tmp_path)
    assert data.train[0].name == data.test[0].name == "p0.png" and data.train[0].file != data.test[0].file


@pytest.mark.parametrize("layout", ["ultralytics", "voc", "images and masks"])
def test_files_of_one_name_in_two_unicode_forms_belong_together(layout: str, tmp_path: Path) -> None:
    """An archive from macOS has é in two characters in one folder, and in one in the other."""
    (BOXES | layouts.MASKS)[layout](tmp_path)
    for file in [*tmp_path.rglob("p0.*"), *tmp_path.rglob("p0_mask.*")]:
        image = file.parent.name in ("JPEGImages", "images") or "images" in file.parts
        file.rename(file.with_name(file.name.replace("p0", "\u00e9" if image else "e\u0301")))
    for file in tmp_path.rglob("train.txt"):
        file.write_text(file.read_text().replace("p0", "\u00e9"))
    data = load(mask_dataset.load_masks if "masks" in layout else box_dataset.load_boxes, tmp_path)
    first = next(image for image in data.train if image.file.stem == "\u00e9")
    assert len(data.train) == 6 and (first.read()[1].any() if "masks" in layout else len(first.boxes) == 2)


def test_images_beside_a_split_s_own_json_are_listed_by_any_spelling(tmp_path: Path) -> None:
    layouts.roboflow_coco(tmp_path)
    file = tmp_path / "train" / "p0.png"
    file.rename(file.with_name("\u00c9 0.PNG"))
    document = tmp_path / "train" / "_annotations.coco.json"
    document.write_text(document.read_text().replace("p0.png", "e\u0301 0.png"))
    data = load(box_dataset.load_boxes, tmp_path)
    assert "\u00c9 0.PNG" in {image.file.name for image in data.train} and len(data.train) == 6


def test_yolo_places_that_do_not_exist_are_named(tmp_path: Path) -> None:
    layouts.ultralytics(tmp_path)
    (tmp_path / "data.yaml").write_text("train: images/training\nnames: [round, square]\n")
    with pytest.raises(DataError, match=r"data\.yaml names images/training, which is not below"):
        box_dataset.load_boxes(tmp_path)
    places = (
        "train: ../images/train\nval: ../images/val\ntest: ../images/test\n"  # Roboflow names a test split in any case
    )
    (tmp_path / "data.yaml").write_text(f"{places}names: [round, square]\n")
    with pytest.warns(
        UserWarning, match=r"names \.\./images/test for the test split, which is not there, so that split is"
    ):
        assert len(box_dataset.load_boxes(tmp_path).train) == 6
    (tmp_path / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"no data\.yaml with `names` and no classes\.txt"):
        box_dataset.load_boxes(tmp_path)
    (tmp_path / "images" / "empty").mkdir()
    (tmp_path / "data.yaml").write_text("train: images/empty\nval: images/val\nnames: [round, square]\n")
    with pytest.raises(
        DataError, match=r"names images/empty for the train split, which holds no image; put some there"
    ):
        box_dataset.load_boxes(tmp_path)
    shutil.rmtree(tmp_path / "images" / "val")
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/empty\nnames: [round, square]\n")
    with pytest.warns(UserWarning, match=r"names images/empty for the val split, which holds no image, so that split"):
        data = box_dataset.load_boxes(tmp_path)
    assert (len(data.train), len(data.test), data.evaluated_split) == (5, 1, "held-out")


def test_a_split_without_images_is_said(tmp_path: Path) -> None:
    cells.make_voc_folder(tmp_path)
    (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("")
    with pytest.warns(UserWarning, match="the test split has no image that can be used, and is left out"):
        assert box_dataset.load_boxes(tmp_path).evaluated_split == "val"


@pytest.mark.parametrize("layout", ["voc in splits", "fiftyone", "ultralytics"])
def test_boxes_are_no_masks(layout: str, tmp_path: Path) -> None:
    BOXES[layout](tmp_path)
    with pytest.raises(
        DataError, match="holds boxes without outlines or masks, for a detector: resnetlab detect train"
    ):
        mask_dataset.load_masks(tmp_path, "skip")


def test_splits_with_other_classes_are_refused(tmp_path: Path) -> None:
    layouts.roboflow_darknet(tmp_path / "boxes")
    (tmp_path / "boxes" / "val" / "_darknet.labels").write_text("square\nround\n")
    with pytest.raises(DataError, match=r"val/_darknet\.labels name different classes, or in another order"):
        box_dataset.load_boxes(tmp_path / "boxes")
    layouts.roboflow_masks(tmp_path / "masks")
    file = tmp_path / "masks" / "val" / "_classes.csv"
    file.write_text("Pixel Value, Class\n0, background\n1, square\n2, round\n")
    with pytest.raises(DataError, match=r"val/_classes\.csv name different classes"):
        mask_dataset.load_masks(tmp_path / "masks")
    file.write_text("Pixel Value, Class\n0, background\n2, square\n")
    with pytest.raises(DataError, match=r"must name two or more classes with the values 0, 1, 2"):
        mask_dataset.load_masks(tmp_path / "masks")


def test_documents_of_no_split_are_named(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / f"{name}.json").write_text(json.dumps(cells.coco_document(range(1))))
    with pytest.raises(DataError, match=r"no document is named after a split \(first\.json, second\.json\)"):
        box_dataset.load_boxes(tmp_path)


def test_a_document_beside_those_of_the_splits_is_said(tmp_path: Path) -> None:
    layouts.official_coco(tmp_path)
    (tmp_path / "annotations" / "instances_mini.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"annotations/instances_mini\.json: named after no split, and left out"):
        assert len(box_dataset.load_boxes(tmp_path).train) == 6


def test_rotated_and_round_regions(tmp_path: Path) -> None:
    """A Label Studio rectangle turned by 90 degrees about its corner; a LabelMe circle."""
    value = {"x": 50, "y": 25, "width": 25, "height": 25, "rotation": 90, "rectanglelabels": ["square"]}
    result = [{"original_width": 80, "original_height": 64, "value": value}]
    (tmp_path / "a").mkdir()
    for i in range(2):
        cells.scene(i)[0].save(tmp_path / "a" / f"p{i}.png")
    tasks = [{"data": {"image": f"p{i}.png"}, "annotations": [{"result": result}]} for i in range(2)]
    (tmp_path / "a" / "tasks.json").write_text(json.dumps(tasks))
    box = box_dataset.load_boxes(tmp_path / "a").train[0].boxes[0]
    torch.testing.assert_close(box, torch.tensor([24.0, 16, 40, 36]))  # 20x16 pixels, now 16x20, left of the corner
    layouts.labelme(tmp_path / "b")
    file = tmp_path / "b" / "train" / "p0.json"
    content = json.loads(file.read_text())
    content["shapes"] = [{"label": "round", "points": [[40, 32], [40, 42]], "shape_type": "circle"}]
    file.write_text(json.dumps(content))
    mask = mask_dataset.load_masks(tmp_path / "b").train[0].read()[1]
    assert int(mask.sum()) == pytest.approx(np.pi * 100, rel=0.03)
    points = [[10, 20], [20, 10], [30, 20], [20, 30]]
    content["shapes"] = [{"label": "round", "points": points, "shape_type": "oriented_rectangle"}]
    file.write_text(json.dumps(content))
    assert box_dataset.load_boxes(tmp_path / "b").train[0].boxes.tolist() == [[10, 10, 30, 30]]
    content["shapes"] = [{"label": "round", "points": points[:2], "shape_type": "line"}]
    file.write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"p0\.json, shape 1: its shape cannot be used: a line of 2 points encloses no area"
    ):
        box_dataset.load_boxes(tmp_path / "b")


@pytest.mark.parametrize("layout", BOXES | layouts.MASKS)
def test_no_layout_trains_as_classes(layout: str, tmp_path: Path) -> None:
    """Roboflow's train and valid, CamVid's train and train_labels would be two classes."""
    (BOXES | layouts.MASKS)[layout](tmp_path)
    with pytest.raises(DataError, match=r"looks like|holds"):
        load(lambda root: sources.load_dataset(str(root), root), tmp_path)


def test_cvats_shapes(tmp_path: Path) -> None:
    """A box turned about its centre, an ellipse, a mask row by row; lines enclose nothing; bad shapes are named."""
    layouts.cvat_images(tmp_path)
    file = tmp_path / "annotations.xml"
    text, (first, *_) = file.read_text(), re.findall(r'<image id="0".*?</image>', file.read_text(), re.S)

    def put(*shapes: str) -> None:
        image = re.sub(r">.*<", ">" + "".join(shapes) + "<", first, count=1, flags=re.S)
        file.write_text(text.replace(first, image))

    box = '<box label="square" xtl="30" ytl="20" xbr="50" ybr="30" rotation="90"/>'
    put(box, '<polyline label="round" points="1,1;5,5"/>', '<ellipse label="round" cx="40" cy="40" rx="12" ry="6"/>')
    with pytest.warns(UserWarning, match="1 polyline enclosing no area left out") as _:
        data = box_dataset.load_boxes(tmp_path)
    expected = torch.tensor([[35.0, 15, 45, 35], [28, 34, 52, 46]])
    torch.testing.assert_close(data.train[0].boxes, expected, rtol=0, atol=0.2)
    put('<mask label="square" rle="1, 2, 2, 1" left="10" top="5" width="3" height="2"/>')
    mask = load(mask_dataset.load_masks, tmp_path).train[0].read()[1]
    assert mask.nonzero().tolist() == [[5, 11], [5, 12], [6, 12]]
    for shape, message in {
        '<mask label="round" rle="1, 2" left="0" top="0" width="3" height="2"/>': "are for 3 pixels, its box has 3x2",
        '<mask label="round" rle="0, 9000000000" left="0" top="0" width="90000" height="100000"/>': "larger than the image",
        '<mask label="round" rle="0, 6" left="79" top="0" width="3" height="2"/>': "its mask is larger than the image",
        '<box label="round" xtl="1" ytl="2" xbr="9"/>': "it has no ybr",
        '<polygon label="round" points="1,1;2,x;3,3"/>': "could not convert string to float",
    }.items():
        put(shape)
        with pytest.raises(DataError, match=rf"annotations\.xml, image p0\.png, \w+ 1: .*{message}"):
            load(box_dataset.load_boxes, tmp_path)
    file.write_text("<annotations><track/></annotations>")
    with pytest.raises(DataError, match="is CVAT's XML for video; export"):
        box_dataset.load_boxes(tmp_path)


def test_broken_brushes_are_named(tmp_path: Path) -> None:
    layouts.label_studio_brushes(tmp_path)
    file = tmp_path / "project-2.json"
    tasks = json.loads(file.read_text())
    region = tasks[0]["annotations"][0]["result"][0]
    whole = region["value"]["rle"]
    for rle, message in (
        (whole[:9], "cut short"),
        ([0, 0, 0, 1, *whole[4:]], "are for 1 values, an image of 80x64 has 20,480"),
    ):
        region["value"]["rle"] = rle
        file.write_text(json.dumps(tasks))
        with pytest.raises(
            DataError, match=rf"task 0, result 1: its region cannot be read \(its run lengths .*{message}"
        ):
            load(box_dataset.load_boxes, tmp_path)


def test_documents_that_are_not_cocos_do_not_hide_others(tmp_path: Path) -> None:
    """Label Studio writes notes.json with categories beside YOLO's files."""
    layouts.ultralytics(tmp_path)
    notes = {"categories": [{"id": 0, "name": "round"}], "info": {"contributor": "Label Studio"}}
    (tmp_path / "notes.json").write_text(json.dumps(notes))
    assert load(box_dataset.load_boxes, tmp_path).layout.startswith("YOLO")
    coco = tmp_path / "coco"
    layouts.coco(coco, "images", "{split}.json")
    (coco / "val.json").rename(coco / "kept")
    (coco / "train.json").rename(coco / "result.json")
    (coco / "notes.json").write_text(json.dumps(notes))
    assert len(load(box_dataset.load_boxes, coco).train) == 5
    (coco / "kept").rename(coco / "val.json")
    (coco / "train.json").write_text("")
    with pytest.raises(DataError, match=r"train\.json is broken JSON"):
        load(box_dataset.load_boxes, coco)


def test_where_all_are_crowds_they_are_objects(tmp_path: Path) -> None:
    layouts.official_coco(tmp_path)
    for file in tmp_path.rglob("instances_*.json"):
        _change_json(file, lambda content: [entry.update(iscrowd=1) for entry in content["annotations"]])
    with pytest.warns(UserWarning, match="every object is marked iscrowd, .* they are read as objects"):
        data = box_dataset.load_boxes(tmp_path)
    assert not any(image.ignored.any() for image in data.train)


def test_voc_polygons_beside_boxes_are_masks(tmp_path: Path) -> None:
    cells.make_voc_folder(tmp_path)
    shutil.rmtree(tmp_path / "SegmentationClass")
    for file in (tmp_path / "Annotations").iterdir():
        outline = (
            "<polygon><x1>4</x1><y1>4</y1><x2>14</x2><y2>4</y2><x3>14</x3><y3>9</y3><x4>4</x4><y4>9</y4></polygon>"
        )
        file.write_text(file.read_text().replace("</bndbox>", f"</bndbox>{outline}"))
    for image in load(mask_dataset.load_masks, tmp_path).train:
        mask = image.read()[1]
        assert mask[4:9, 4:14].all() and mask.count_nonzero() == 50


def test_voc_folders_inside_are_splits(tmp_path: Path) -> None:
    """As CVAT keeps the folders of a task, and LabelMe 3.0 those of subsets."""
    for split, seed in (("train", 0), ("train", 1), ("val", 2)):
        image, _, objects = cells.scene(seed)
        place = tmp_path / "Images" / split / "day 1" / f"p{seed}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
        shapes = []
        for name, (x1, y1, x2, y2) in objects:
            points = "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in ((x1, y1), (x2, y1), (x2, y2), (x1, y2)))
            shapes.append(f"<object><name>{name}</name><deleted>0</deleted><polygon>{points}</polygon></object>")
        shapes.append(shapes[0].replace("<deleted>0", "<deleted>1"))
        annotation = tmp_path / "Annotations" / split / "day 1" / f"p{seed}.xml"
        annotation.parent.mkdir(parents=True, exist_ok=True)
        annotation.write_text(f"<annotation>{''.join(shapes)}</annotation>")
    data = load(box_dataset.load_boxes, tmp_path)
    assert (len(data.train), len(data.test), data.evaluated_split) == (2, 1, "val")
    assert data.test[0].boxes.tolist() == [list(box) for _, box in cells.scene(2)[2]]


def test_yaml_as_its_library_writes_it(tmp_path: Path) -> None:
    """PyYAML escapes letters beyond ASCII and breaks long lists."""
    layouts.ultralytics(tmp_path)
    names = """names: [round, "gr\\xF6\\xDFer, \\u4E2D", 'driver''s cab', 'a, b',\n  "say \\"no\\"", it's]"""
    (tmp_path / "data.yaml").write_text(f"train: images/train\nval: images/val\n{names}\n")
    classes = load(box_dataset.load_boxes, tmp_path).classes
    assert classes == ("round", "größer, 中", "driver's cab", "a, b", 'say "no"', "it's")
    (tmp_path / "data.yaml").write_text(f"{names[:-1]}\n")
    with pytest.raises(DataError, match="is not closed; write one name a line"):
        load(box_dataset.load_boxes, tmp_path)
