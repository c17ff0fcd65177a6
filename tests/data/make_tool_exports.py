"""Makes tool_exports.zip: one small scene as other tools write it, and what these tools themselves read in it (record.json).

Run once where datumaro and supervision are installed, once where label-studio-sdk is (they want different NumPy):

    python make_tool_exports.py tools          # writes the zip (datumaro 1.13.12, supervision 0.31.2)
    python make_tool_exports.py label-studio   # adds to it (label-studio-sdk 2.1.2)

record.json: {layout: {image's stem: {"boxes": [[class, x1, y1, x2, y2]], "masks": {class: [pixels, CRC-32 of the mask]}}}}.
"""

from __future__ import annotations

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


def main(kind: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        root, record = Path(place), Record()
        if kind == "label-studio":
            with zipfile.ZipFile(ZIP) as old:
                old.extractall(root)
            record = json.loads((root / "record.json").read_text())
            record |= write_label_studio(root)
        else:
            record = write_datumaro(root) | write_supervision(root)
        (root / "record.json").write_text(json.dumps(record, ensure_ascii=False, indent=1))
        with zipfile.ZipFile(ZIP, "w", zipfile.ZIP_DEFLATED) as new:
            for file in sorted(path for path in root.rglob("*") if path.is_file() and path.parent != root / "images"):
                entry = zipfile.ZipInfo(file.relative_to(root).as_posix())  # without the time
                new.writestr(entry, file.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main(sys.argv[1])
