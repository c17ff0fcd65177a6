"""Makes tool_exports.zip: one small scene as other tools write it, and what these tools themselves read in it (record.json).

Run once where datumaro and supervision are installed, and once for each of the others (they want different NumPy):

    python make_tool_exports.py tools          # writes the zip (datumaro 1.13.12, supervision 0.31.2)
    python make_tool_exports.py label-studio   # adds to it (label-studio-sdk 2.1.2)
    python make_tool_exports.py labelme        # adds to it (labelme 6.3.1)
    python make_tool_exports.py cityscapes     # adds to it (cityscapesscripts 2.3.0)
    python make_tool_exports.py fiftyone       # adds to it (fiftyone 1.22.1; its exporters and importers need no database)

record.json: {layout: {image's stem: {"boxes": [[class, x1, y1, x2, y2]], "masks": {class: [pixels, CRC-32 of the mask]}}}},
or {"classes": […]} of each image where images have classes.
"""

from __future__ import annotations

import base64
import io
import json
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ZIP = Path(__file__).with_name("tool_exports.zip")
CLASSES = ("cat", "traffic_light", "größe")
SIZES = {"train": [(64, 48), (47, 81)], "val": [(90, 40)]}  # width, height
Record = dict[str, Any]


def scene(size: tuple[int, int]) -> list[tuple[str, str, Any]]:
    """Objects that do not touch: a polygon, a mask of two parts of which one has a hole, a box."""
    width, height = size
    x, y = width / 20 + 0.37, height / 16 + 0.81
    corners = [
        x,
        y,
        x + width / 3,
        y + 1.3,
        x + width / 5,
        y + height / 5,
        x + width / 3,
        y + height / 3,
        x + 0.7,
        y + height / 3.3,
    ]
    inside = np.zeros((height, width), bool)
    inside[height // 2 : height // 2 + 12, width // 2 : width // 2 + 14] = True
    inside[height // 2 + 4 : height // 2 + 8, width // 2 + 5 : width // 2 + 9] = False
    inside[2:6, width - 9 : width - 3] = True
    polygon = [round(value, 2) for value in corners]
    return [
        ("cat", "polygon", polygon),
        ("traffic_light", "mask", inside),
        ("größe", "box", [2.25, height - 14.5, 17.5, 11.25]),
    ]


def bounds(kind: str, value: Any) -> list[float]:
    """(x, y, width, height) of an object."""
    if kind == "box":
        return list(value)
    if kind == "polygon":
        (left, top), (right, bottom) = np.reshape(value, (-1, 2)).min(0), np.reshape(value, (-1, 2)).max(0)
    else:
        rows, columns = np.nonzero(value)
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    return [float(left), float(top), float(right - left), float(bottom - top)]


def image_of(size: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.full((size[1], size[0], 3), (90, 120, 60), np.uint8)


def summarize(mask: np.ndarray[Any, Any]) -> list[int]:
    return [int(mask.sum()), zlib.crc32(np.packbits(mask.astype(bool)).tobytes())]


def add(record: Record, stem: str, boxes: list[Any], masks: dict[str, np.ndarray[Any, Any]]) -> None:
    rounded = sorted([name, *(round(float(v), 3) for v in box)] for name, *box in boxes)
    record[stem] = {"boxes": rounded, "masks": {name: summarize(mask) for name, mask in sorted(masks.items())}}


def write_datumaro(root: Path) -> Record:
    import datumaro as dm
    from datumaro.components.annotation import AnnotationType, LabelCategories, MaskCategories

    def make(kinds: str) -> Any:
        items = []
        for split, sizes in SIZES.items():
            for i, size in enumerate(sizes):
                things: list[Any] = []
                for n, (name, kind, value) in enumerate(scene(size)):
                    same = {"label": CLASSES.index(name) + (kinds == "masks"), "id": n + 1, "group": n + 1}
                    if kinds == "boxes":
                        things.append(dm.Bbox(*bounds(kind, value), **same))
                    elif kind == "mask":
                        things.append(dm.Mask(value, **same))
                    elif kinds == "masks":
                        x, y, w, h = (int(v) for v in bounds(kind, value))
                        filled = np.zeros((size[1], size[0]), bool)
                        filled[y : y + h, x : x + w] = True
                        things.append(dm.Mask(filled, **same))
                    else:
                        things.append(dm.Polygon(value, **same) if kind == "polygon" else dm.Bbox(*value, **same))
                media = dm.Image.from_numpy(data=image_of(size), ext=".png")
                items.append(
                    dm.DatasetItem(id=f"day 1/bild é{split}{i}", subset=split, media=media, annotations=things)
                )
        if kinds != "masks":
            return dm.Dataset.from_iterable(items, categories=list(CLASSES))
        labels = LabelCategories.from_iterable(["background", *CLASSES])
        categories = {AnnotationType.label: labels, AnnotationType.mask: MaskCategories.generate(4)}
        return dm.Dataset.from_iterable(items, categories=categories)

    record: Record = {}
    for name, layout, kinds, options in (
        ("coco boxes", "coco_instances", "boxes", {}),
        ("coco masks", "coco_instances", "masks", {}),
        ("voc boxes", "voc_detection", "boxes", {}),
        ("voc masks", "voc_segmentation", "masks", {}),
        ("voc indices", "voc_segmentation", "masks", {"apply_colormap": False}),
        ("yolo", "yolo", "boxes", {}),
        ("cvat", "cvat", "all", {}),
        ("camvid", "camvid", "masks", {}),
        ("cityscapes", "cityscapes", "masks", {}),
    ):
        folder = root / f"datumaro {name}"
        make(kinds).export(str(folder), layout, save_media=True, **options)
        seen = dm.Dataset.import_from(str(folder), layout)
        names = [label.name for label in seen.categories()[AnnotationType.label]]
        images = record[folder.name] = {}
        for item in seen:
            boxes, masks = [], {}
            for thing in item.annotations:
                x, y, w, h = thing.get_bbox()
                if thing.type == AnnotationType.mask:
                    mask = np.asarray(thing.image, bool)
                    masks[names[thing.label]] = masks.get(names[thing.label], False) | mask
                if (
                    layout != "coco_instances" or thing.type == AnnotationType.bbox
                ):  # it gives the mask of an object as well
                    boxes.append([names[thing.label], x, y, x + w, y + h])
            masks.pop("background", None)
            add(images, Path(item.id).name, [] if kinds == "masks" else boxes, {} if kinds == "boxes" else masks)
    return record


def write_supervision(root: Path) -> Record:
    import supervision as sv

    def save(detections: Any, layout: str, folder: Path, split: str) -> Any:
        if layout == "coco":
            detections.as_coco(str(folder / split), str(folder / split / "_annotations.coco.json"))
            return sv.DetectionDataset.from_coco(str(folder / split), str(folder / split / "_annotations.coco.json"))
        if layout == "yolo":
            places = [str(folder / part) for part in (f"images/{split}", f"labels/{split}", "data.yaml")]
            detections.as_yolo(*places)
            return sv.DetectionDataset.from_yolo(*places)
        if layout == "createml":
            detections.as_createml(str(folder / split), str(folder / split / "_annotations.createml.json"))
            return sv.DetectionDataset.from_createml(
                str(folder / split), str(folder / split / "_annotations.createml.json")
            )
        getattr(detections, f"as_{layout}")(str(folder / split), str(folder / split))
        return getattr(sv.DetectionDataset, f"from_{layout}")(str(folder / split), str(folder / split))

    record: Record = {}
    for layout in ("coco", "yolo", "pascal_voc", "labelme", "createml"):
        folder = root / f"supervision {layout}"
        record[folder.name] = {}
        for split, sizes in SIZES.items():
            paths, things = [], {}
            for i, size in enumerate(sizes):
                file = root / "images" / f"bild é {split}{i}.png"
                file.parent.mkdir(exist_ok=True)
                Image.fromarray(image_of(size)).save(file)
                boxes = np.array([bounds(kind, value) for _, kind, value in scene(size)])
                boxes[:, 2:] += boxes[:, :2]
                numbers = np.array([CLASSES.index(name) for name, _, _ in scene(size)])
                paths.append(str(file))
                things[str(file)] = sv.Detections(xyxy=boxes, class_id=numbers)
            seen = save(sv.DetectionDataset(list(CLASSES), paths, things), layout, folder, split)
            for path, found in seen.annotations.items():
                boxes = [[seen.classes[int(c)], *box] for c, box in zip(found.class_id, found.xyxy, strict=True)]
                add(record[folder.name], Path(path).stem, boxes, {})
    return record


def write_label_studio(root: Path) -> Record:
    from label_studio_sdk.converter import Converter, brush

    tasks: list[Any] = []
    native: Record = {}
    for split, sizes in SIZES.items():
        for i, (width, height) in enumerate(sizes):
            stem = f"0a1b2c3d-bild_é_{split}{i}"
            file = root / "upload" / "3" / f"{stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_of((width, height))).save(file)
            results, boxes, masks = [], [], {}
            for name, kind, value in scene((width, height)):
                x, y, w, h = bounds(kind, value)
                boxes.append([name, x, y, x + w, y + h])
                percent = np.array([100 / width, 100 / height])
                if kind == "box":
                    parts = dict(
                        zip(
                            ("x", "y", "width", "height"),
                            (np.reshape(value, (2, 2)) * percent).ravel().tolist(),
                            strict=True,
                        )
                    )
                    result = ("rectanglelabels", {**parts, "rotation": 0})
                elif kind == "polygon":
                    result = ("polygonlabels", {"points": (np.reshape(value, (-1, 2)) * percent).tolist()})
                else:
                    runs = [int(v) for v in brush.mask2rle(np.uint8(255) * value)]
                    decoded = np.reshape(brush.decode_rle(runs), (height, width, 4))[:, :, 3] > 0
                    masks[name] = decoded
                    result = ("brushlabels", {"format": "rle", "rle": runs})
                size = {"original_width": width, "original_height": height, "image_rotation": 0}
                names = {"type": result[0], "from_name": "label", "to_name": "image"}
                results.append({**names, **size, "value": {**result[1], result[0]: [name]}})
            annotation = {"id": len(tasks), "completed_by": 1, "was_cancelled": False, "result": results}
            address = f"/data/upload/3/{stem}.png"
            tasks.append({"id": len(tasks), "data": {"image": address}, "annotations": [annotation], "predictions": []})
            add(native, stem, boxes, masks)
    record: Record = {"label studio json": native}
    labels = "".join(f'<Label value="{name}"/>' for name in CLASSES)
    config = (
        f'<View><Image name="image" value="$image"/><RectangleLabels name="label" toName="image">{labels}'
        "</RectangleLabels></View>"
    )
    for layout in ("COCO", "YOLO", "VOC"):
        folder = root / f"label studio {layout.lower()}"
        kept = [
            {
                **task,
                "annotations": [
                    {
                        **task["annotations"][0],
                        "result": [r for r in task["annotations"][0]["result"] if r["type"] == "rectanglelabels"],
                    }
                ],
            }
            for task in tasks
        ]
        source = root / "tasks.json"
        source.write_text(json.dumps(kept))
        Converter(config, str(root), upload_dir=str(root / "upload")).convert(
            str(source), str(folder), layout, is_dir=False
        )
        source.unlink()
        for file in (root / "upload" / "3").iterdir():  # the converter leaves them where they are if they are there
            (folder / "images" / file.name).write_bytes(file.read_bytes())
        if layout == "COCO":
            text = (folder / "result.json").read_text()
            (folder / "result.json").write_text(text.replace("../upload/3/", "images/"))
        boxes = {stem: [box for box in image["boxes"] if box[0] == "größe"] for stem, image in native.items()}
        if layout == "VOC":  # whole pixels: the corner and the size are cut off
            boxes = {s: [[n, int(x1), int(y1), int(x1) + 17, int(y1) + 11]] for s, [(n, x1, y1, *_)] in boxes.items()}
        record[folder.name] = {stem: {"boxes": b, "masks": {}} for stem, b in boxes.items()}
    folder = root / "label studio json"
    (root / "upload" / "3").rename(folder)
    (root / "upload").rmdir()
    (folder / "project-3-at-2026-11-27.json").write_text(json.dumps(tasks))
    return record


def write_fiftyone(root: Path) -> Record:
    import fiftyone as fo
    import fiftyone.core.odm as odm
    from bson import json_util
    from fiftyone.types import dataset_types as types

    def region(name: str, kind: str, value: Any, size: tuple[int, int], masks: bool) -> Any:
        (x, y, w, h), (width, height) = bounds(kind, value), size
        if not masks:
            return fo.Detection(label=name, bounding_box=[x / width, y / height, w / width, h / height])
        inside = value
        if kind != "mask":
            inside = np.zeros((height, width), bool)
            inside[int(y) : int(y + h), int(x) : int(x + w)] = True
        return fo.Detection.from_mask(inside, label=name)

    def describe(label: Any, size: tuple[int, int]) -> dict[str, Any]:
        """The boxes and masks of what an importer gives."""
        if isinstance(label, dict):
            label = next(value for key, value in label.items() if key in ("segmentations", "detections"))
        names: dict[str, Any] = {}
        boxes = []
        if isinstance(label, fo.Segmentation):
            return {
                "boxes": [],
                "masks": {f"class {n}": label.get_mask() == n for n in np.unique(label.get_mask()) if n},
            }
        for thing in label.detections:
            x, y, w, h = np.array(thing.bounding_box) * np.tile(size, 2)
            boxes.append([thing.label, x, y, x + w, y + h])
            if thing.has_mask:
                names[thing.label] = thing.to_segmentation(frame_size=size, target=1).mask > 0
        return {"boxes": [] if names else boxes, "masks": names}

    targets = dict(enumerate(CLASSES, 1))
    record: Record = {}
    for name, layout, masks, write, read in (
        ("detections", types.FiftyOneImageDetectionDataset, False, {"classes": list(CLASSES)}, {}),
        ("names", types.FiftyOneImageDetectionDataset, False, {}, {}),
        ("coco", types.COCODetectionDataset, False, {"info": {}}, {}),
        ("coco masks", types.COCODetectionDataset, True, {"info": {}}, {"label_types": "segmentations"}),
        ("voc", types.VOCDetectionDataset, False, {}, {}),
        ("yolov4", types.YOLOv4Dataset, False, {"classes": list(CLASSES)}, {}),
        ("yolov5", types.YOLOv5Dataset, False, {"classes": list(CLASSES), "include_path": False}, {}),
        ("cvat", types.CVATImageDataset, False, {}, {}),
        ("masks", types.ImageSegmentationDirectory, True, {"mask_targets": targets}, {}),
        ("samples", None, True, {}, {}),
        ("classes", types.FiftyOneImageClassificationDataset, False, {}, {}),
        ("class numbers", types.FiftyOneImageClassificationDataset, False, {"classes": list(CLASSES)}, {}),
        ("several classes", types.FiftyOneImageClassificationDataset, False, {"include_confidence": True}, {}),
        ("class folders", types.ImageClassificationDirectoryTree, False, {}, {}),
    ):
        folder = root / f"fiftyone {name}"
        images, samples = record.setdefault(folder.name, {}), []
        for split, sizes in SIZES.items():
            place = folder if layout is types.YOLOv5Dataset else folder / split
            options = {"split": split} if layout is types.YOLOv5Dataset else {}
            exporter = None
            if layout is not None:
                source = {} if "class" in name else {"rel_dir": str(root / "images")}
                exporter = layout().get_dataset_exporter_cls()(export_dir=str(place), **options, **source, **write)
                exporter._name, exporter._task_labels = folder.name, None  # what CVAT's takes from the database
                exporter.setup()
            for i, size in enumerate(sizes):
                file = root / "images" / "day 1" / f"bild é {split}{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image_of(size)).save(file)
                things = [region(*thing, size, masks) for thing in scene(size)]
                label = fo.Detections(detections=things)
                if "class" in name:
                    labels = [fo.Classification(label=c, confidence=1.0) for c in CLASSES[i : i + 1]]
                    more = [fo.Classification(label=c, confidence=0.5) for c in CLASSES[: i + 2]]
                    label = fo.Classifications(classifications=more) if name.startswith("several") else labels[0]
                if exporter is not None:
                    exporter.export_sample(str(file), label)
                    continue
                sample = fo.Sample(filepath=f"data/{file.name}", tags=["batch 3", split])
                sample["things"] = label
                sample["a_model"] = fo.Detections(detections=[region(*scene(size)[0], size, False)])
                samples.append(sample.to_mongo_dict(include_id=True))
                (folder / "data").mkdir(parents=True, exist_ok=True)
                (folder / "data" / file.name).write_bytes(file.read_bytes())
                images[file.stem] = (label, size)
            if exporter is not None:
                exporter.close()
                importer = layout().get_dataset_importer_cls()(dataset_dir=str(place), **options, **read)
                importer.setup()
                for path, _, label in importer:
                    with Image.open(path) as opened:
                        images[Path(path).stem] = (label, opened.size)
        if samples:
            odm.export_collection(samples, str(folder / "samples.json"), key="samples", progress=False)
            for sample in json_util.loads((folder / "samples.json").read_text())["samples"]:
                stem = Path(sample["filepath"]).stem
                images[stem] = (fo.Sample.from_dict(sample)["things"], images[stem][1])
        for stem, (label, size) in list(images.items()):
            if isinstance(label, fo.Classification | fo.Classifications):
                parts = label.classifications if isinstance(label, fo.Classifications) else [label]
                images[stem] = {"classes": sorted(part.label for part in parts)}
            else:
                found = describe(label, size)
                add(images, stem, found["boxes"], found["masks"])
    return record


def write_labelme(root: Path) -> Record:
    from labelme._label_file import read_label_file, write_label_file
    from labelme.utils.shape import masks_to_bboxes, shapes_to_label

    images: Record = {}
    for split, sizes in SIZES.items():
        for i, size in enumerate(sizes):
            file = root / "labelme" / split / f"bild é {split}{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image_of(size)).save(file)
            shapes: list[Any] = []
            for name, kind, value in scene(size):
                x, y, w, h = bounds(kind, value)
                shape = {"label": name, "group_id": None, "description": "", "flags": {}, "mask": None, "points": []}
                if kind == "polygon":
                    shape |= {"shape_type": "polygon", "points": np.reshape(value, (-1, 2)).tolist()}
                elif kind == "box":
                    shape |= {"shape_type": "rectangle", "points": [[x + w, y + h], [x, y]]}
                else:
                    x1, y1, x2, y2 = int(x), int(y), int(x + w), int(y + h)
                    png = io.BytesIO()
                    Image.fromarray(value[y1:y2, x1:x2]).save(png, format="PNG")
                    text = base64.b64encode(png.getvalue()).decode()
                    shape |= {"shape_type": "mask", "points": [[x1, y1], [x2 - 1, y2 - 1]], "mask": text}
                shapes.append(shape)
            document = str(file.with_suffix(".json"))
            write_label_file(
                filename=document, shapes=shapes, image_path=file.name, image_data=file.read_bytes(), image_height=size[1],
                image_width=size[0], other_data={}, flags={},
            )  # fmt: skip
            boxes, masks = [], {}
            for shape in read_label_file(document).shapes:
                corners = np.array(shape["points"])
                box = [*corners.min(0), *corners.max(0)]
                if shape["shape_type"] == "mask":  # of others it also fills the border; docs/layouts.md
                    masks[shape["label"]] = shapes_to_label(size[::-1], [shape], {shape["label"]: 1})[0] > 0
                    y1, x1, y2, x2 = masks_to_bboxes(masks[shape["label"]][None])[0]
                    box = [x1, y1, x2, y2]
                boxes.append([shape["label"], *box])
            add(images, file.stem, boxes, masks)
    return {"labelme": images}


def write_cityscapes(root: Path) -> Record:
    from cityscapesscripts.helpers.labels import trainId2label
    from cityscapesscripts.preparation.json2labelImg import json2labelImg

    names = ("road", "sidewalk", "cargroup", "person", "parking", "license plate", "train", "bicycle", "ego vehicle")
    record: Record = {}
    for kind in ("cityscapes ids", "cityscapes train ids"):
        images = record[kind] = {}
        for split, sizes in SIZES.items():
            for i, (width, height) in enumerate(sizes):
                stem = f"bonn_{i:06}_{width:06}"
                objects = []
                for k, name in enumerate(names):  # each over the lower right part of the one before
                    x, y = k * width // len(names), k * height // len(names)
                    corners = [[x, y], [width, y], [width, height], [x, height]]
                    objects.append({"label": name, "polygon": corners, "deleted": int(name == "bicycle")})
                content = {"imgHeight": height, "imgWidth": width, "objects": objects}
                places = [root / kind / part / split / "bonn" for part in ("leftImg8bit", "gtFine")]
                for place in places:
                    place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image_of((width, height))).save(places[0] / f"{stem}_leftImg8bit.png")
                document = places[1] / f"{stem}_gtFine_polygons.json"
                document.write_text(json.dumps(content))
                codings = {"ids": "labelIds", "color": "color", "trainIds": "labelTrainIds"}
                for coding, word in codings.items():
                    mask = document.with_name(f"{stem}_gtFine_{word}.png")
                    json2labelImg(str(document), str(mask), coding)
                with Image.open(document.with_name(f"{stem}_gtFine_labelTrainIds.png")) as opened:
                    values = np.array(opened)
                if kind == "cityscapes ids":
                    document.with_name(f"{stem}_gtFine_labelTrainIds.png").unlink()
                found = (int(v) for v in np.unique(values) if v < 255)
                add(images, stem, [], {trainId2label[v].name: values == v for v in found})
    return record


def main(kind: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, record = Path(place), Record()
        if kind in ADDED:
            with zipfile.ZipFile(ZIP) as old:
                old.extractall(root)
            record = json.loads((root / "record.json").read_text())
            record |= ADDED[kind](root)
        else:
            record = write_datumaro(root) | write_supervision(root)
        (root / "record.json").write_text(json.dumps(record, ensure_ascii=False, indent=1))
        with zipfile.ZipFile(ZIP, "w", zipfile.ZIP_DEFLATED) as new:
            for file in sorted(
                path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != "images"
            ):
                entry = zipfile.ZipInfo(file.relative_to(root).as_posix())  # without the time
                new.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


ADDED = {
    "label-studio": write_label_studio,
    "fiftyone": write_fiftyone,
    "labelme": write_labelme,
    "cityscapes": write_cityscapes,
}  # to what the others have written


if __name__ == "__main__":
    main(sys.argv[1])
