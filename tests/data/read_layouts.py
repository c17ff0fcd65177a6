"""Adds to tool_exports.zip what annotation tools read in the folders of annotated_layouts.py (layouts.json).

Run where the tool is installed; what the others have read stays:

    python read_layouts.py datumaro      # 1.13.12 (CVAT's own library), with pycocotools 2.0.11
    python read_layouts.py supervision   # 0.31.2 (Roboflow's)
    python read_layouts.py ultralytics   # 8.4.190
    python read_layouts.py label-studio  # label-studio-sdk 2.1.2
    python read_layouts.py labelme       # 6.3.1
    python read_layouts.py fiftyone      # 1.22.1
    python read_layouts.py cityscapes    # cityscapesscripts 2.3.0

layouts.json: {tool: {layout: {split: {image's stem: what make_tool_exports.add records}}}}. torchvision and pycocotools are
asked by the tests themselves.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import annotated_layouts as layouts  # noqa: I001
from make_tool_exports import ZIP, Record, add

NAME = "layouts.json"
HEIGHT, WIDTH = layouts.HEIGHT, layouts.WIDTH


def read_with_datumaro(layout: str, root: Path) -> Record:
    import datumaro as dm
    from datumaro.components.annotation import AnnotationType

    forms = {"cvat": "voc", "cvat images": "cvat", "coco": "coco_instances", "cvat coco": "coco_instances"}
    forms |= {"ultralytics": "yolo", "camvid": "camvid"}
    form = forms.get(layout, layout.replace(" ", "_"))
    if layout == "camvid":  # its lists and its file of colours
        for split, seeds in layouts.SPLITS.items():
            (root / f"{split}.txt").write_text("".join(f"/{split}/p{i}.png {split}_labels/p{i}_L.png\n" for i in seeds))
        colours = zip(("background", *layouts.NAMES), layouts.COLOURS.values(), strict=True)
        (root / "label_colors.txt").write_text("".join(f"{r} {g} {b} {name}\n" for name, (r, g, b) in colours))
    seen = dm.Dataset.import_from(str(root), form)
    names = [label.name for label in seen.categories()[AnnotationType.label]]
    record: Record = {}
    for item in seen:
        boxes: list[Any] = []
        masks: dict[str, Any] = {}
        for thing in item.annotations:
            if thing.type == AnnotationType.label:  # of the whole image
                continue
            name, (x, y, w, h) = names[thing.label], thing.get_bbox()
            if form != "voc" or thing.type == AnnotationType.bbox:  # of VOC it gives the masks' parts as well
                boxes.append([name, x, y, x + w, y + h])
            if thing.type == AnnotationType.mask:
                masks[name] = masks.get(name, False) | np.asarray(thing.image, bool)
            elif thing.type == AnnotationType.polygon:
                masks[name] = masks.get(name, False) | fill_polygon(thing.points)
            elif form == "cvat":
                masks[name] = masks.get(name, False) | fill_polygon([x, y, x + w, y, x + w, y + h, x, y + h])
        if "coco" in form:  # it gives an object's outline and its box, one behind the other
            boxes = boxes[::2]
        if form == "camvid":
            boxes = []
        masks.pop("background", None)
        add(record.setdefault(item.subset, {}), Path(item.id).name, boxes, masks)
    return record


def fill_polygon(points: Any) -> np.ndarray[Any, Any]:
    from pycocotools import mask as coco

    runs = coco.frPyObjects([[float(v) for v in points]], HEIGHT, WIDTH)
    return np.asarray(coco.decode(coco.merge(runs)) > 0)


def read_with_supervision(layout: str, root: Path) -> Record:
    """Boxes only: it fills outlines with OpenCV, which fills the border as well (docs/layouts.md)."""
    import supervision as sv

    record: Record = {}
    reader = sv.DetectionDataset
    for split in ("train", "valid" if layout in ("roboflow coco",) else "val"):
        place = root / split
        if layout == "roboflow coco":
            seen = reader.from_coco(str(place), str(place / "_annotations.coco.json"))
        elif layout == "roboflow voc":
            seen = reader.from_pascal_voc(str(place), str(place))
        elif layout == "labelme":
            seen = reader.from_labelme(str(place), str(place))
        else:
            parts = (place / "images", place / "labels")
            if layout != "roboflow yolo":
                parts = (root / "images" / split, root / "labels" / split)
            seen = reader.from_yolo(*map(str, parts), str(root / "data.yaml"))
        images = record[split] = {}
        for path, found in seen.annotations.items():
            names = [seen.classes[int(c)] for c in found.class_id]
            add(images, Path(path).stem, [[n, *box] for n, box in zip(names, found.xyxy, strict=True)], {})
    return record


def read_with_ultralytics(layout: str, root: Path) -> Record:
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset

    config = root / "data.yaml"
    config.write_text(config.read_text().replace("../datasets/shapes", str(root)))  # here it has another name
    data = check_det_dataset(str(config), autodownload=False)
    record: Record = {}
    for split in layouts.SPLITS:
        images = record[split] = {}
        task = "segment" if "outlines" in layout else "detect"
        for label in YOLODataset(img_path=data[split], data=data, task=task, augment=False).labels:
            height, width = label["shape"]
            names = [data["names"][int(k)] for k in label["cls"].ravel()]
            boxes, masks = [], {}
            for name, (x, y, w, h) in zip(names, label["bboxes"], strict=True):
                corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
                boxes.append([name, *corners])
            for name, outline in zip(names, label["segments"], strict=False):  # none where the file has boxes
                masks[name] = masks.get(name, False) | fill_polygon(np.ravel(outline * (width, height)))
            add(images, Path(label["im_file"]).stem, boxes, masks)
    return record


def read_with_label_studio(layout: str, root: Path) -> Record:
    from label_studio_sdk.converter import Converter, brush

    file = next(root.glob("project-*.json"))
    labels = "".join(f'<Label value="{name}"/>' for name in layouts.NAMES)
    parts = "".join(
        f'<{k} name="{k.lower()}" toName="image">{labels}</{k}>' for k in ("RectangleLabels", "PolygonLabels")
    )
    tasks = json.loads(file.read_text())
    images: Record = {}
    if "brushes" in layout:
        for task in tasks:
            masks: dict[str, Any] = {}
            for result in task["annotations"][0]["result"]:
                plane = np.reshape(brush.decode_rle(result["value"]["rle"]), (HEIGHT, WIDTH, 4))[:, :, 3] > 0
                name = result["value"]["brushlabels"][0]
                masks[name] = masks.get(name, False) | plane
            add(images, Path(task["data"]["image"]).stem, [], masks)
        return {"": images}
    for task in tasks:  # without what the project's settings here do not name
        for annotation in task["annotations"]:
            annotation["result"] = [
                result | {"from_name": result["type"], "to_name": "image"}
                for result in annotation["result"]
                if result["type"] != "choices"
            ]
    file.write_text(json.dumps(tasks))
    out = root / "out"
    config = f'<View><Image name="image" value="$image"/>{parts}</View>'
    Converter(config, str(root), upload_dir=str(root)).convert(str(file), str(out), "COCO", is_dir=False)
    content = json.loads((out / "result.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    for image in content["images"]:
        things = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        boxes = [[names[a["category_id"]], *a["bbox"][:2], *np.add(a["bbox"][:2], a["bbox"][2:])] for a in things]
        add(images, Path(image["file_name"]).stem.split("-")[-1], boxes, {})
    return {"": images}


def read_with_labelme(layout: str, root: Path) -> Record:
    from labelme._label_file import read_label_file

    record: Record = {}
    for split in layouts.SPLITS:
        images = record[split] = {}
        for file in sorted((root / split).glob("*.json")):
            document = json.loads(file.read_text())
            document["imagePath"] = document["imagePath"].replace("\\", "/")  # Windows' own separator
            file.write_text(json.dumps(document))
            boxes = []
            for shape in read_label_file(str(file)).shapes:
                corners = np.array(shape["points"])
                boxes.append([shape["label"], *corners.min(0), *corners.max(0)])
            add(images, file.stem, boxes, {})
    return record


def read_with_fiftyone(layout: str, root: Path) -> Record:
    import fiftyone as fo
    from bson import json_util
    from fiftyone.types import dataset_types as types

    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "fiftyone": (types.FiftyOneImageDetectionDataset, {"dataset_dir": "{split}"}),
        "fiftyone coco": (types.COCODetectionDataset, {"dataset_dir": "{split}", "label_types": "segmentations"}),
        "coco": (
            types.COCODetectionDataset,
            {
                "data_path": "images/{split}2017",
                "labels_path": "annotations/instances_{split}2017.json",
                "label_types": "segmentations",
            },
        ),
        "ultralytics": (types.YOLOv5Dataset, {"yaml_path": "data.yaml", "split": "{split}"}),
        "roboflow voc": (types.VOCDetectionDataset, {"data_path": "{split}", "labels_path": "{split}"}),
        "masks of 0 and 255": (
            types.ImageSegmentationDirectory,
            {"data_path": "{split}/data", "labels_path": "{split}/labels", "load_masks": True},
        ),
    }
    record: Record = {}
    for split in layouts.SPLITS:
        found = []
        if layout == "fiftyone samples":
            for entry in json_util.loads((root / "samples.json").read_text())["samples"]:
                word = "validation" if split == "val" else split
                if word in entry["tags"]:
                    found.append((entry["filepath"], fo.Sample.from_dict(entry)["ground_truth"]))
        else:
            kind, options = kinds[layout]
            places = {
                key: value.format(split=split) if isinstance(value, str) else value for key, value in options.items()
            }
            for key in ("dataset_dir", "data_path", "labels_path", "yaml_path"):
                if key in places:
                    places[key] = str(root / places[key])
            if layout == "ultralytics":
                file = root / "data.yaml"
                file.write_text(file.read_text().replace("../datasets/shapes", str(root)))
            if layout == "fiftyone coco" and split == "val":
                places["dataset_dir"] = str(root / "validation")
            importer = kind().get_dataset_importer_cls()(**places)
            importer.setup()
            found = [(path, label) for path, _, label in importer]
        images = record[split] = {}
        for path, label in found:
            if isinstance(label, dict):
                label = label.get("segmentations") or label.get("detections") or next(iter(label.values()))
            if isinstance(label, fo.Segmentation):
                values = np.array(label.get_mask())
                add(images, Path(path).stem, [], {str(v): values == v for v in np.unique(values) if v})
                continue
            boxes, masks = [], {}
            for thing in label.detections:
                x, y, w, h = np.array(thing.bounding_box) * np.tile((WIDTH, HEIGHT), 2)
                boxes.append([thing.label, x, y, x + w, y + h])
                if thing.has_mask:
                    mask = thing.to_segmentation(frame_size=(WIDTH, HEIGHT), target=1).mask > 0
                    masks[thing.label] = masks.get(thing.label, False) | mask
            add(images, Path(path).stem, boxes, masks)
    return record


def read_with_cityscapes(layout: str, root: Path) -> Record:
    from cityscapesscripts.helpers.labels import id2label, trainId2label

    record: Record = {}
    for file in sorted(root.glob("gtFine/*/*/*_gtFine_labelIds.png")):
        with Image.open(file) as opened:
            values = np.array(opened)
        numbers = {id2label[int(v)].trainId for v in np.unique(values)}
        trained = np.vectorize(lambda v: id2label[int(v)].trainId)(values)
        masks = {trainId2label[n].name: trained == n for n in numbers if 0 <= n < 255}
        split = file.parents[1].name
        add(record.setdefault(split, {}), file.name.removesuffix("_gtFine_labelIds.png"), [], masks)
    return record


READERS: dict[str, tuple[Callable[[str, Path], Record], tuple[str, ...]]] = {
    "datumaro": (
        read_with_datumaro,
        ("cvat", "cvat images", "cvat coco", "coco", "roboflow coco", "roboflow voc", "roboflow yolo", "ultralytics", "camvid"),
    ),
    "supervision": (
        read_with_supervision,
        ("roboflow coco", "roboflow voc", "roboflow yolo", "ultralytics", "yolo outlines", "labelme"),
    ),
    "ultralytics": (read_with_ultralytics, ("ultralytics", "yolo outlines", "roboflow yolo", "darknet")),
    "label-studio": (read_with_label_studio, ("label studio", "label studio brushes")),
    "labelme": (read_with_labelme, ("labelme",)),
    "fiftyone": (
        read_with_fiftyone,
        ("fiftyone", "fiftyone samples", "fiftyone coco", "coco", "ultralytics", "roboflow voc", "masks of 0 and 255"),
    ),
    "cityscapes": (read_with_cityscapes, ("cityscapes",)),
}  # fmt: skip


def main(tool: str) -> None:
    read, names = READERS[tool]
    with zipfile.ZipFile(ZIP) as old:
        files = {name: old.read(name) for name in old.namelist()}
    record = json.loads(files.get(NAME, b"{}"))
    record[tool] = {}
    for layout in names:
        with tempfile.TemporaryDirectory() as folder:
            layouts.EVERY[layout](Path(folder))
            record[tool][layout] = read(layout, Path(folder))
    files[NAME] = json.dumps(record, ensure_ascii=False, indent=1, sort_keys=True).encode()
    with zipfile.ZipFile(ZIP, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in sorted(files.items()):
            new.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # without the time


if __name__ == "__main__":
    main(sys.argv[1])
