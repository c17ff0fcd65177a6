"""What annotation tools write is read as their own readers read it, object by object (data/make_tool_exports.py)."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import VOCDetection, VOCSegmentation

import annotated_layouts as layouts
import cells
from resnetlab.data import box_dataset, cvat_xml, mask_dataset, sources
from resnetlab.data.dataset import Dataset
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.layouts import read_annotations
from resnetlab.data.object_masks import ObjectMask
from resnetlab.errors import DataError, UsageError

TOOL_EXPORTS = Path(__file__).parent / "data" / "tool_exports.zip"  # made by make_tool_exports.py beside it
with zipfile.ZipFile(TOOL_EXPORTS) as opened:
    TOOL_RECORD = json.loads(opened.read("record.json"))  # what the tools' own readers see
    LAYOUT_RECORD = json.loads(opened.read("layouts.json"))  # and in the folders of annotated_layouts (read_layouts.py)
OF_CLASSES = [layout for layout, images in TOOL_RECORD.items() if any("classes" in image for image in images.values())]


def unpack(layout: str, folder: Path) -> Path:
    with zipfile.ZipFile(TOOL_EXPORTS) as content:
        content.extractall(folder, [name for name in content.namelist() if name.startswith(f"{layout}/")])
    return folder / layout


def load(function: Any, root: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # classes that no mask has
        return function(root)


def load_classes(root: Path, **options: Any) -> Dataset:
    return sources.load_dataset(str(root), root, ReadOptions(**options))


@pytest.mark.parametrize("layout", [layout for layout in TOOL_RECORD if layout not in OF_CLASSES])
def test_what_tools_wrote_is_read_as_they_read_it(layout: str, tmp_path: Path) -> None:
    root = unpack(layout, tmp_path)
    recorded = TOOL_RECORD[layout]
    has_masks = any(image["masks"] for image in recorded.values())
    if any(image["boxes"] for image in recorded.values()):
        data = load(box_dataset.load_boxes, root)
        images = [*data.train, *data.val, *data.test]
        assert {image.file.stem for image in images} == set(recorded)
        for image in images:
            seen = sorted([data.classes[k], *box] for k, box in zip(image.labels, image.boxes.tolist(), strict=True))
            expected = recorded[image.file.stem]["boxes"]
            if (
                layout == "supervision pascal_voc"
            ):  # it adds 1 to the upper left corner in the file; docs/differences.md
                expected = [[name, x1 + 1, y1 + 1, x2, y2] for name, x1, y1, x2, y2 in expected]
            assert [name for name, *_ in seen] == [name for name, *_ in expected]
            np.testing.assert_allclose([box for _, *box in seen], [box for _, *box in expected], atol=2e-3)
    if has_masks:
        data = load(mask_dataset.load_masks, root)
        for masked in (*data.train, *data.val, *data.test):
            mask = masked.read()[1].numpy()
            for name, (pixels, checksum) in recorded[masked.file.stem.removesuffix("_leftImg8bit")]["masks"].items():
                inside = mask == data.classes.index(name)
                assert (int(inside.sum()), zlib.crc32(np.packbits(inside).tobytes())) == (pixels, checksum)
    if not layout.startswith("label studio"):
        assert len(data.train) == 2 and data.evaluated_split == "val"


SPLIT_WORDS = {"train2017": "train", "val2017": "val", "valid": "val", "validation": "val"}


@pytest.mark.parametrize(
    ("tool", "layout"), [(tool, layout) for tool in LAYOUT_RECORD for layout in LAYOUT_RECORD[tool]]
)
def test_layouts_are_read_as_their_tools_read_them(tool: str, layout: str, tmp_path: Path) -> None:
    layouts.EVERY[layout](tmp_path)
    seen = {}
    for split, images in LAYOUT_RECORD[tool][layout].items():
        for stem, image in images.items():
            seen[stem] = (SPLIT_WORDS.get(split.lower(), split.lower()), image)
    assert len(seen) == 9
    if any(image["boxes"] for _, image in seen.values()):
        data = load(box_dataset.load_boxes, tmp_path)
        for split, stem, ours in ((split, image.file.stem, image) for split, of in data.splits.items() for image in of):
            assert seen[stem][0] in (split, "")  # some tools know no splits
            expected = seen[stem][1]["boxes"]
            if tool == "supervision" and "voc" in layout:  # it takes them as counting from 1; docs/layouts.md
                expected = [[name, x1 + 1, y1 + 1, x2, y2] for name, x1, y1, x2, y2 in expected]
            boxes = sorted([data.classes[k], *box] for k, box in zip(ours.labels, ours.boxes.tolist(), strict=True))
            assert [name for name, *_ in boxes] == [name for name, *_ in expected]
            np.testing.assert_allclose([box for _, *box in boxes], [box for _, *box in expected], atol=2e-3)
        assert sum(map(len, data.splits.values())) == 9
    if any(image["masks"] for _, image in seen.values()):
        data = load(mask_dataset.load_masks, tmp_path)
        for split, masked in ((split, image) for split, of in data.splits.items() for image in of):
            where, recorded = seen[masked.file.stem.removesuffix("_leftImg8bit")]
            assert where in (split, "")
            mask, ours = masked.read()[1].numpy(), {}
            for k in np.unique(mask):
                inside = mask == k
                ours[data.classes[k]] = [int(inside.sum()), zlib.crc32(np.packbits(inside).tobytes())]
            ours.pop("background", None)
            assert ours == {"foreground" if name == "255" else name: mask for name, mask in recorded["masks"].items()}


def test_vocs_own_archive_is_read_as_torchvision_reads_it(tmp_path: Path) -> None:
    layouts.official_voc(tmp_path)
    boxes, masks = load(box_dataset.load_boxes, tmp_path), load(mask_dataset.load_masks, tmp_path)
    for split in ("train", "val"):
        theirs = VOCDetection(tmp_path, image_set=split)
        assert len(theirs) == len(boxes.splits[split])
        for (_, target), ours in zip(theirs, boxes.splits[split], strict=True):
            found = target["annotation"]["object"]
            corners = [[float(thing["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for thing in found]
            assert [boxes.classes[k] for k in ours.labels] == [thing["name"] for thing in found]
            assert ours.boxes.tolist() == corners
        theirs = VOCSegmentation(tmp_path, image_set=split)
        for (_, mask), ours in zip(theirs, masks.splits[split], strict=True):
            assert np.array_equal(np.array(mask), ours.read()[1])


@pytest.mark.parametrize("layout", OF_CLASSES)
def test_classes_that_tools_wrote_are_read_as_they_read_them(layout: str, tmp_path: Path) -> None:
    root, recorded = unpack(layout, tmp_path), TOOL_RECORD[layout]
    if layout == "fiftyone class folders":  # FiftyOne makes no folder for a class that a split lacks
        shutil.copytree(root / "train" / "traffic_light", root / "val" / "traffic_light")
        recorded |= {"bild é train1": {"classes": ["traffic_light"]}}
    data = load_classes(root, multi_label=True)
    assert data.evaluated_split == "val" and len(data.train) == 2
    several = layout == "fiftyone several classes"
    assert (data.label_sets is not None) == several
    for split in (data.train, data.test):
        for name, label in zip(split.names, split.labels.tolist(), strict=True):
            numbers = data.label_sets[label].nonzero().flatten().tolist() if data.label_sets is not None else [label]
            assert [data.classes[number] for number in numbers] == recorded[Path(name).stem]["classes"]
    if several:
        with pytest.raises(UsageError, match="gives several classes per image, which this does not take"):
            load_classes(root)


@pytest.mark.parametrize(
    ("folders", "counts", "left_out"),
    [
        (["day 1", "day 2"], {"train": 3, "held-out": 1}, ""),
        (["train", "val", "validation"], {"train": 2, "val": 4}, ""),
        (["train", "val", "more"], {"train": 2, "val": 2}, "2 images left out, of no split .*, such as more/4.png"),
    ],
)
def test_no_folder_of_voc_is_lost_unsaid(
    folders: list[str], counts: dict[str, int], left_out: str, tmp_path: Path
) -> None:
    """Of folders with XML beside images one was read, and images of no split were left out without a word."""
    for i in range(6):
        if i < 2 * len(folders):
            image, _, boxes = cells.scene(i)
            place = tmp_path / folders[i // 2]
            place.mkdir(exist_ok=True)
            image.save(place / f"{i}.png")
            (place / f"{i}.xml").write_text(cells.voc_annotation(boxes))
    with pytest.warns(UserWarning, match=left_out) if left_out else contextlib.nullcontext():
        data = box_dataset.load_boxes(tmp_path)
    assert {split: len(images) for split, images in data.splits.items()} == counts


def write_samples(root: Path, *values: dict[str, Any], targets: dict[str, Any] | None = None) -> None:
    """FiftyOne's samples.json with one image and a field `labels` for each value, the last of them to evaluate on."""
    samples = []
    for i, value in enumerate(values):
        (root / "data").mkdir(parents=True, exist_ok=True)
        cells.scene(i)[0].save(root / "data" / f"p{i}.png")
        tags = ["val" if i == len(values) - 1 else "train"]
        samples.append({"filepath": f"/elsewhere/data/p{i}.png", "tags": tags, "labels": value})
    (root / "samples.json").write_text(json.dumps({"samples": samples}))
    if targets is not None:
        (root / "metadata.json").write_text(json.dumps({"mask_targets": {"labels": targets}}))


def pack_bytes(content: bytes) -> dict[str, Any]:
    return {"$binary": {"base64": base64.b64encode(zlib.compress(content)).decode(), "subType": "00"}}


def pack_array(mask: Any, claimed: str = "") -> dict[str, Any]:
    """As FiftyOne packs a mask; `claimed` is a shape for its header in place of its own."""
    content = io.BytesIO()
    np.save(content, mask)
    own = f"{mask.shape}, }}".ljust(len(claimed))
    return pack_bytes(content.getvalue().replace(own.encode(), (claimed or own).encode(), 1))


def test_fiftyones_masks_in_files_and_of_whole_images(tmp_path: Path) -> None:
    masks = [np.array(cells.scene(i)[1]) for i in range(2)]
    targets = {"1": "round", "2": "square"}
    whole = [{"_cls": "Segmentation", "mask": pack_array(mask)} for mask in masks]
    write_samples(tmp_path, *whole, targets=targets)
    data = load(mask_dataset.load_masks, tmp_path)
    assert data.classes == ("background", "round", "square") and (len(data.train), len(data.test)) == (1, 1)
    assert np.array_equal(data.train[0].read()[1], masks[0])
    (tmp_path / "fields").mkdir()
    for i, mask in enumerate(masks):
        Image.fromarray(mask).save(tmp_path / "fields" / f"{i}.png")
    write_samples(tmp_path, *({"_cls": "Segmentation", "mask_path": f"fields/{i}.png"} for i in range(2)))
    assert np.array_equal(load(mask_dataset.load_masks, tmp_path).train[0].read()[1], masks[0])
    with pytest.raises(DataError, match="has no field with detections or polylines"):
        box_dataset.load_boxes(tmp_path)
    name, (x1, y1, x2, y2) = cells.scene(0)[2][0]
    box = [x1 / 80, y1 / 64, (x2 - x1) / 80, (y2 - y1) / 64]
    coarse = np.zeros((2, 2), bool)
    coarse[0] = True  # the upper half of the box
    thing = {"label": name, "bounding_box": box, "mask": pack_array(coarse)}
    write_samples(tmp_path, *({"_cls": "Detections", "detections": [thing]} for _ in range(2)))
    seen = load(mask_dataset.load_masks, tmp_path).train[0].read()[1].numpy()
    assert seen[y1 : (y1 + y2) // 2, x1:x2].all() and seen.sum() == ((y1 + y2) // 2 - y1) * (x2 - x1)
    beyond = thing | {"bounding_box": [0, -0.5, 0.5, 1.5]}  # 40 x 96 pixels, of which the first 32 rows are not there
    write_samples(tmp_path, *({"_cls": "Detections", "detections": [beyond]} for _ in range(2)))
    seen = load(mask_dataset.load_masks, tmp_path).train[0].read()[1].numpy()
    assert seen[:16, :40].all() and seen.sum() == 16 * 40


def test_masks_of_fiftyone_are_kept_as_run_lengths(tmp_path: Path) -> None:
    """Of a data set of thousands of images arrays would take gigabytes before the first is looked at."""
    write_samples(tmp_path, *[{"_cls": "Segmentation", "mask": pack_array(np.eye(400, dtype=np.uint8))}] * 2)
    (record, *_), *_ = read_annotations(tmp_path, ErrorPolicy(), masks=True).splits.values()
    assert isinstance(mask := record.objects[0].segmentation, ObjectMask) and mask.runs is not None
    assert mask.runs.nbytes == 4 * (2 * 400 + 1 - 1) and mask.area() == 400


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"$binary": "bm9uZQ=="}, "incorrect header"),
        ({"$binary": {"base64": 5}}, "neither a path nor a text in base64"),
        (pack_array(np.zeros(3, bool)), "no array of whole numbers with rows and columns"),
        (pack_array(np.zeros((2, 2))), "no array of whole numbers"),
        (pack_array(np.zeros((2, 2), bool), "(2000000, 2000000), }"), "Unable to allocate"),
        (pack_bytes(b""), "EOF"),
        (pack_bytes(b"PK\x03\x04, as a zip file begins"), "magic string is not correct"),
    ],
)
def test_broken_masks_of_fiftyone_are_named(mask: Any, message: str, tmp_path: Path) -> None:
    good = {"label": "round", "bounding_box": [0.1, 0.1, 0.5, 0.5], "mask": pack_array(np.ones((2, 2), bool))}
    values = [{"detections": [good | {"mask": mask}, good]}, {"detections": [good]}]
    write_samples(tmp_path, *values)
    with pytest.raises(DataError, match=rf"samples\.json, p0\.png, labels 1: its mask cannot be read \(.*{message}"):
        mask_dataset.load_masks(tmp_path)
    data = load(lambda root: mask_dataset.load_masks(root, "skip"), tmp_path)
    assert len(data.errors.skipped) == 1 and len(data.train) == 1
    assert len(load(box_dataset.load_boxes, tmp_path).train[0].boxes) == 2  # boxes need no mask


def test_a_mask_of_fiftyone_is_not_unpacked_beyond_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thing = {"label": "round", "bounding_box": [0, 0, 1, 1], "mask": pack_array(np.ones((400, 400), bool))}
    write_samples(tmp_path, *({"detections": [thing]} for _ in range(2)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8000)
    with pytest.raises(DataError, match="it is larger than any image"):
        mask_dataset.load_masks(tmp_path)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_number_that_is_no_class_is_refused(label: int, tmp_path: Path) -> None:
    """-1 was taken for the last class."""
    (tmp_path / "data").mkdir()
    for i in range(3):
        cells.scene(i)[0].save(tmp_path / "data" / f"{i}.png")
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({"classes": ["a", "b"], "labels": {"0": label, "1": 0, "2": 1}}))
    with pytest.raises(DataError, match=r"labels\.json looks like FiftyOne's labels\.json, but has another form"):
        load_classes(tmp_path)
    box = {"label": label, "bounding_box": [0.1, 0.1, 0.3, 0.3]}
    file.write_text(json.dumps({"classes": ["a", "b"], "labels": {str(i): [box] for i in range(3)}}))
    with pytest.raises(DataError, match=r"labels\.json, 0, detection 1: it has no label"):
        box_dataset.load_boxes(tmp_path)


def test_images_without_a_tag_beside_a_split_are_said_to_be_left_out(tmp_path: Path) -> None:
    write_samples(tmp_path, *({"_cls": "Classification", "label": name} for name in "abcab"))
    file = tmp_path / "samples.json"
    content = json.loads(file.read_text())
    content["samples"][2]["tags"] = ["sunny"]
    file.write_text(json.dumps(content))
    with pytest.warns(
        UserWarning, match=r"\(FiftyOne's samples\.json\): 1 image without a split left out, such as data/p2"
    ):
        data = load_classes(tmp_path)
    assert data.classes == ("a", "b") and {*data.train.names} == {"p0.png", "p1.png", "p3.png"}


def test_classes_of_objects_are_not_those_of_images(tmp_path: Path) -> None:
    thing = {"label": "round", "bounding_box": [0.1, 0.1, 0.5, 0.5]}
    thing["of"] = {"_cls": "Classification", "label": "red"}
    write_samples(tmp_path, *[{"_cls": "Detections", "detections": [thing]}] * 2)
    with pytest.raises(DataError, match=r"FiftyOne's data sets .*, data of boxes or masks: resnetlab detect train"):
        load_classes(tmp_path)


def test_what_a_file_is_does_not_depend_on_its_first_images(tmp_path: Path) -> None:
    """The first 2,000 have no object, or no class, so nothing in the first 64 KiB shows which they have."""
    many, box = 2000, {"label": 0, "bounding_box": [0.1, 0.1, 0.5, 0.5]}
    (tmp_path / "data").mkdir()
    cells.scene(0)[0].save(tmp_path / "data" / "last.png")
    names = [*(f"image number {i:,} of the background" for i in range(many)), "last"]
    first_boxes = {"classes": ["round"], "labels": {name: [] for name in names} | {"last": [box]}}
    coordinates = {"label": "round", "coordinates": {"x": 9, "y": 9, "width": 4, "height": 4}}
    createml = [{"image": f"{name}.png", "annotations": [coordinates] * (name == "last")} for name in names]
    for layout, content in (("FiftyOne", first_boxes), ("CreateML", createml)):
        file = tmp_path / "labels.json"
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match="data of boxes or masks: resnetlab detect train"):
            load_classes(tmp_path)
        found = read_annotations(tmp_path, ErrorPolicy("skip"), masks=False)
        assert found.layout == layout and [image.name for image in found.splits[""]] == ["data/last.png"]
        file.unlink()
    tasks = [{"id": i, "data": {"image": f"/data/upload/1/{i}.png"}, "annotations": []} for i in range(many)]
    tasks += [{"data": {"image": "last.png"}, "annotations": [{"result": [{"value": {"choices": ["cat"]}}]}]}]
    (tmp_path / "project.json").write_text(json.dumps(tasks))
    with pytest.raises(DataError, match=r"project\.json, task 0: its image does not exist"):
        load_classes(tmp_path)


def test_background_images_come_first_in_yolo_and_both_words_for_a_split_count(tmp_path: Path) -> None:
    for folder in ("train", "val", "valid"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        (tmp_path / "labels" / folder).mkdir(parents=True)
        for i in range(21):
            Image.new("RGB", (8, 8), (i, len(folder), 0)).save(tmp_path / "images" / folder / f"{folder}{i:02}.png")
            text = "0 0.5 0.5 0.5 0.5\n" if i == 20 else ""
            (tmp_path / "labels" / folder / f"{folder}{i:02}.txt").write_text(text)
    (tmp_path / "data.yaml").write_text("train: images/train\nval: images/val\nvalid: images/valid\nnames: [round]\n")
    found = read_annotations(tmp_path, ErrorPolicy(), masks=False)
    assert found.layout == "YOLO" and {name: len(list(s)) for name, s in found.splits.items()} == {
        "train": 21,
        "val": 42,
    }


def test_not_every_annotation_of_voc_is_asked_whether_it_is_cvats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train").mkdir()
    for i in range(60):
        (tmp_path / "train" / f"{i}.xml").write_text("<annotation></annotation>")
    asked: list[Path] = []
    monkeypatch.setattr(cvat_xml, "peek_text", lambda file: asked.append(file) or "<annotation>")
    assert cvat_xml.find_cvat_files(tmp_path) == [] and len(asked) == 50


def write_tasks(root: Path, choices: list[list[str] | None]) -> None:
    """Label Studio's export of a project that asks for a class."""
    tasks = []
    for i, chosen in enumerate(choices):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(root / f"p{i}.png")
        result = [{"from_name": "kind", "type": "choices", "value": {"choices": chosen}}] if chosen else []
        result += [{"from_name": "quality", "type": "choices", "value": {"choices": ["sharp"]}}]
        image = f"/data/upload/1/0a1b2c3d-p{i}.png"
        tasks.append({"id": 7 + i, "data": {"image": image}, "annotations": [{"result": result}]})
    (root / "project-1.json").write_text(json.dumps(tasks))


def test_choices_of_label_studio_are_classes(tmp_path: Path) -> None:
    write_tasks(tmp_path, [["cat"], ["dog"], None] * 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        data = load_classes(tmp_path)
    assert data.classes == ("cat", "dog") and len(data.train) + len(data.test) == 8
    assert [str(warning.message).removeprefix(str(tmp_path)) for warning in said] == [
        "/project-1.json: the classes of kind are read, not those of quality.",
        " (Label Studio's tasks): 4 images without a class left out, such as p2.png.",
    ]
    for kind in ({"choices": ["cat", "dog"]}, "cat"):
        minimal = [{"image": "p0.png", "id": 7, "kind": kind, "annotator": 1, "annotation_id": 3}]
        (tmp_path / "project-1.json").write_text(json.dumps(minimal))
        with pytest.raises(DataError, match=r"project-1\.json is Label Studio's JSON-MIN; export JSON"):
            load_classes(tmp_path)
    write_tasks(tmp_path, [["cat"], ["dog", "cat"], ["dog"]] * 4)
    assert load(lambda root: load_classes(root, multi_label=True), tmp_path).label_sets is not None
    (tmp_path / "p3.png").unlink()
    with pytest.raises(DataError, match=r"project-1\.json, task 10: its image does not exist below"):
        load(load_classes, tmp_path)


def test_roboflows_classes_are_read_in_each_split(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("valid", 3)):
        (tmp_path / split).mkdir()
        lines = ["filename, cat, dog"]
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / split / f"{split}{i}.jpg")
            lines.append(f"{split}{i}.jpg, {i % 2}, {(i + 1) % 3 % 2}")
        (tmp_path / split / "_classes.csv").write_text("\n".join(lines))
    data = load_classes(tmp_path, multi_label=True)
    assert data.classes == ("cat", "dog") and data.evaluated_split == "val" and data.label_sets is not None
    sets = [data.label_sets[label].tolist() for label in data.train.labels.tolist()]
    expected = {f"train/train{i}.jpg": [i % 2, (i + 1) % 3 % 2] for i in range(6)}
    assert dict(zip(data.train.names, sets, strict=True)) == expected
    (tmp_path / "train" / "_classes.csv").write_text("filename,cat,dog\ntrain0.jpg,1,maybe\n")
    with pytest.raises(
        DataError, match=r"train/_classes\.csv looks like Roboflow's _classes\.csv, but has another form"
    ):
        load_classes(tmp_path, multi_label=True)
