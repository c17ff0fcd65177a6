"""The scenes of `cells` as annotation tools and data sets lay them out: 6 training and 3 validation images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import cells

SPLITS = {"train": range(6), "val": range(6, 9)}
NAMES = ("round", "square")
HEIGHT, WIDTH = cells.SIZE
COLOURS = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0)}


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def _write(file: Path, content: Any, encoding: str = "utf-8") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding)


def coco(
    root: Path,
    images: str,
    document: str,
    *,
    name: str = "{file}",
    splits: tuple[str, str] = ("train", "val"),
    **edit: Any,
) -> None:
    """COCO's documents; `images`, `document` and `name` are patterns of the split and the file."""
    for (split, seeds), word in zip(SPLITS.items(), splits, strict=True):
        content = cells.coco_document(seeds) | edit
        for entry in content["images"]:
            file = entry["file_name"]
            _save(cells.scene(entry["id"])[0], root / images.format(split=word) / file)
            entry["file_name"] = name.format(file=file, split=word)
        _write(root / document.format(split=word, base=split), content)


def roboflow_coco(root: Path) -> None:
    categories = [{"id": 0, "name": "shapes", "supercategory": "none"}]
    categories += [{"id": k, "name": n, "supercategory": "shapes"} for k, n in ((7, "round"), (9, "square"))]
    coco(root, "{split}", "{split}/_annotations.coco.json", splits=("train", "valid"), categories=categories)


def official_coco(root: Path) -> None:
    coco(root, "images/{split}2017", "annotations/instances_{split}2017.json")
    for split in SPLITS:
        _write(root / f"annotations/captions_{split}2017.json", {"images": [], "annotations": []})


def cvat_coco(root: Path) -> None:
    coco(root, "images/{split}", "annotations/instances_{split}.json", splits=("Train", "Validation"))


def fiftyone_coco(root: Path) -> None:
    coco(root, "{split}/data", "{split}/labels.json", splits=("train", "validation"))


def windows_coco(root: Path) -> None:
    """Names with backslashes and capitals, as Label Studio and X-AnyLabeling write on Windows."""
    coco(root, "images", "{split}.json", name="images\\{file}")
    for split in SPLITS:
        file = root / f"{split}.json"
        file.write_text(file.read_text().replace(".png", ".PNG"), "utf-8-sig")


def yolo(root: Path, config: str | None, images: str, labels: str, outlines: bool = False) -> None:
    for split, seeds in SPLITS.items():
        for i in seeds:
            image, _, objects = cells.scene(i)
            _save(image, root / images.format(split=split) / f"p{i}.png")
            lines = []
            for name, (x1, y1, x2, y2) in objects:
                numbers = [(x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT]
                if outlines:
                    numbers = [
                        x1 / WIDTH,
                        y1 / HEIGHT,
                        x2 / WIDTH,
                        y1 / HEIGHT,
                        x2 / WIDTH,
                        y2 / HEIGHT,
                        x1 / WIDTH,
                        y2 / HEIGHT,
                    ]
                lines.append(" ".join([str(NAMES.index(name)), *(f"{v:.6f}" for v in numbers)]))
            _write(root / labels.format(split=split) / f"p{i}.txt", "\r\n".join(lines) + "\r\n")
    if config is not None:
        _write(root / "data.yaml", config)


def ultralytics(root: Path, outlines: bool = False) -> None:
    config = (
        "path: ../datasets/shapes  # root\ntrain: images/train\nval: images/val\n\nnames:\n  0: round\n  1: square\n"
    )
    yolo(root, config, "images/{split}", "labels/{split}", outlines)


def roboflow_yolo(root: Path) -> None:
    config = (
        "train: ../train/images\nval: ../val/images\n\nnc: 2\nnames: ['round', 'square']\n\nroboflow:\n  license: MIT\n"
    )
    yolo(root, config, "{split}/images", "{split}/labels")


def roboflow_darknet(root: Path) -> None:
    """Labels beside the images, and the classes' names in the folder of each split."""
    yolo(root, None, "{split}", "{split}")
    for split in SPLITS:
        _write(root / split / "_darknet.labels", "round\nsquare\n")


def darknet_lists(root: Path) -> None:
    yolo(root, "train: train.txt\nval: val.txt\nnames:\n- round\n- square\n", "images", "labels")
    for split, seeds in SPLITS.items():
        _write(root / f"{split}.txt", "".join(f"./images/p{i}.png\n" for i in seeds))


def voc(root: Path) -> None:
    cells.make_voc_folder(root)


def official_voc(root: Path) -> None:
    """VOC's own archive: JPEG images, and masks as palettes."""
    place = cells.make_voc_folder(root / "VOCdevkit" / "VOC2012")
    for file in (place / "JPEGImages").iterdir():
        with Image.open(file) as image:
            image.save(file.with_suffix(".jpg"))
        file.unlink()
    for file in (place / "SegmentationClass").iterdir():
        with Image.open(file) as mask:
            palette(mask).save(file)


def voc_in_splits(root: Path) -> None:
    """VOC's folders in one for each split."""
    roboflow_voc(root)
    for split in SPLITS:
        for file in sorted((root / split).iterdir()):
            place = root / split / ("Annotations" if file.suffix == ".xml" else "JPEGImages")
            place.mkdir(exist_ok=True)
            file.rename(place / file.name)


def roboflow_voc(root: Path) -> None:
    """XML beside the images of each split."""
    for split, seeds in SPLITS.items():
        for i in seeds:
            image, _, objects = cells.scene(i)
            _save(image, root / split / f"p{i}.png")
            source = f"<folder></folder><filename>p{i}.png</filename><source><database>roboflow.ai</database></source>"
            text = cells.voc_annotation(objects).replace("<annotation>", f"<annotation>{source}")
            _write(root / split / f"p{i}.xml", text)


def labelme(root: Path) -> None:
    for split, seeds in SPLITS.items():
        for i in seeds:
            image, _, objects = cells.scene(i)
            _save(image, root / split / f"p{i}.png")
            shapes: list[dict[str, Any]] = []
            for k, (name, (x1, y1, x2, y2)) in enumerate(objects):
                kind = ("polygon", "rectangle")[k % 2]
                points = [[x1, y1], [x2, y1], [x2, y2], [x1, y2]] if kind == "polygon" else [[x2, y2], [x1, y1]]
                shapes.append({"label": name, "points": points, "group_id": None, "shape_type": kind, "flags": {}})
            content = {"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"..\\{split}\\p{i}.png"}
            content |= {"imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH}
            _write(root / split / f"p{i}.json", content)


def label_studio(root: Path) -> None:
    tasks = []
    for split, seeds in SPLITS.items():
        for i in seeds:
            image, _, objects = cells.scene(i)
            _save(image, root / split / f"p{i}.png")
            result: list[dict[str, Any]] = [{"type": "choices", "value": {"choices": ["good"]}}]
            for k, (name, (x1, y1, x2, y2)) in enumerate(objects):
                left, top, right, bottom = 100 * x1 / WIDTH, 100 * y1 / HEIGHT, 100 * x2 / WIDTH, 100 * y2 / HEIGHT
                value: dict[str, Any] = {
                    "x": left,
                    "y": top,
                    "width": right - left,
                    "height": bottom - top,
                    "rotation": 0,
                }
                kind = "rectanglelabels"
                if k:
                    kind, value = (
                        "polygonlabels",
                        {"points": [[left, top], [right, top], [right, bottom], [left, bottom]]},
                    )
                result.append(
                    {"type": kind, "original_width": WIDTH, "original_height": HEIGHT, "value": {**value, kind: [name]}}
                )
            annotations = [{"was_cancelled": True, "result": []}, {"was_cancelled": False, "result": result}]
            tasks.append({"id": i, "data": {"image": f"/data/upload/1/0a1b2c3d-p{i}.png"}, "annotations": annotations})
    _write(root / "project-1.json", tasks)


def encode_brush(inside: Any) -> list[int]:
    """Label Studio's run lengths of a mask (H, W), as RGBA; every run is of one value."""
    values = np.repeat(255 * inside.astype(np.uint8).ravel(), 4)
    bits = [f"{len(values):032b}", f"{7:05b}", *(f"{n - 1:04b}" for n in (3, 4, 8, 16))]
    runs = np.split(values, np.flatnonzero(np.diff(values)) + 1)
    text = "".join(bits + [f"1{3:02b}{len(run) - 1:016b}{run[0]:08b}" for run in runs])
    return [int(text[i : i + 8].ljust(8, "0"), 2) for i in range(0, len(text), 8)]


def label_studio_brushes(root: Path) -> None:
    tasks = []
    for split, seeds in SPLITS.items():
        for i in seeds:
            image, _, objects = cells.scene(i)
            _save(image, root / split / f"p{i}.png")
            result = []
            for name, (x1, y1, x2, y2) in objects:
                inside = np.zeros(cells.SIZE, bool)
                inside[y1:y2, x1:x2] = True
                value = {"format": "rle", "rle": encode_brush(inside), "brushlabels": [name]}
                size = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
                result.append({"type": "brushlabels", **size, "value": value})
            tasks.append({"id": i, "data": {"image": f"s3://bucket/p{i}.png"}, "annotations": [{"result": result}]})
    _write(root / "project-2.json", tasks)


def cvat_images(root: Path) -> None:
    """CVAT's XML for images: boxes, polygons and masks."""
    labels = "".join(f"<label><name>{name}</name><color>#ff0000</color></label>" for name in NAMES)
    images = []
    for seeds, subset in zip(SPLITS.values(), ("Train", "Validation"), strict=True):
        for i in seeds:
            image, _, objects = cells.scene(i)
            _save(image, root / "images" / subset / f"p{i}.png")
            shapes = ['<tag label="round" source="manual"/>']
            for k, (name, (x1, y1, x2, y2)) in enumerate(objects):
                outer = f'label="{name}" source="manual" occluded="0" z_order="0"'
                if (i + k) % 3 == 0:
                    shapes.append(f'<box {outer} xtl="{x1}.00" ytl="{y1}.00" xbr="{x2}.00" ybr="{y2}.00"></box>')
                elif (i + k) % 3 == 1:
                    shapes.append(f'<polygon {outer} points="{x1},{y1};{x2},{y1};{x2},{y2};{x1},{y2}"></polygon>')
                else:
                    w, h = x2 - x1, y2 - y1
                    shapes.append(
                        f'<mask {outer} rle="0, {w * h}" left="{x1}" top="{y1}" width="{w}" height="{h}"></mask>'
                    )
            size = f'width="{WIDTH}" height="{HEIGHT}"'
            images.append(f'<image id="{i}" name="p{i}.png" subset="{subset}" {size}>{"".join(shapes)}</image>')
    head = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta><project><labels>'
    subsets = "<subsets><subset>Train</subset><subset>Validation</subset></subsets>"
    _write(
        root / "annotations.xml", f"{head}{labels}</labels>{subsets}</project></meta>{''.join(images)}</annotations>"
    )


def fiftyone_samples(root: Path) -> None:
    """FiftyOne's own export of a data set whose splits are tags; a model's predictions stand beside."""
    samples = []
    for split, seeds in SPLITS.items():
        for i in seeds:
            image, _, objects = cells.scene(i)
            _save(image, root / "data" / f"p{i}.png")
            detections = [
                {
                    "_cls": "Detection",
                    "label": name,
                    "bounding_box": [x1 / WIDTH, y1 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT],
                }
                for name, (x1, y1, x2, y2) in objects
            ]
            wrong = [{"_cls": "Detection", "label": "round", "bounding_box": [0, 0, 0.1, 0.1], "confidence": 0.4}]
            fields = {"ground_truth": detections, "a_model": wrong}
            samples.append(
                {"filepath": f"data/p{i}.png", "tags": ["batch 3", "validation" if split == "val" else split]}
                | {name: {"_cls": "Detections", "detections": value} for name, value in fields.items()}
            )
    _write(root / "samples.json", {"samples": samples})
    _write(root / "metadata.json", {"name": "cells", "default_classes": []})


def fiftyone(root: Path) -> None:
    for split, seeds in SPLITS.items():
        labels: dict[str, Any] = {}
        for i in seeds:
            image, _, objects = cells.scene(i)
            _save(image, root / split / "data" / f"p{i}.png")
            labels[f"p{i}"] = [
                {
                    "label": NAMES.index(n),
                    "bounding_box": [x1 / WIDTH, y1 / HEIGHT, (x2 - x1) / WIDTH, (y2 - y1) / HEIGHT],
                }
                for n, (x1, y1, x2, y2) in objects
            ]
        _write(root / split / "labels.json", {"classes": NAMES, "labels": labels})


def masks(root: Path, images: str, files: str, form: Callable[[Image.Image], Image.Image] = lambda mask: mask) -> None:
    """Images and masks; the patterns have the split and the image's stem."""
    for split, seeds in SPLITS.items():
        for i in seeds:
            image, mask, _ = cells.scene(i)
            _save(image, root / images.format(split=split, stem=f"p{i}"))
            _save(form(mask), root / files.format(split=split, stem=f"p{i}"))


def coloured(mask: Image.Image) -> Image.Image:
    return Image.fromarray(np.array([COLOURS[k] for k in range(3)], np.uint8)[np.array(mask)])


def palette(mask: Image.Image) -> Image.Image:
    mask = mask.convert("P")
    mask.putpalette([channel for k in range(3) for channel in COLOURS[k]])
    return mask


def cvat_masks(root: Path) -> None:
    """Segmentation mask 1.1: colours, and a label map sorted by name."""
    cells.make_voc_folder(root)
    (root / "classes.txt").unlink()
    for file in (root / "SegmentationClass").iterdir():
        with Image.open(file) as mask:
            coloured(mask).save(file)
    lines = "square:0,128,0::\nbackground:0,0,0::\nround:128,0,0::\n"
    _write(root / "labelmap.txt", f"# label:color_rgb:parts:actions\n{lines}")


def camvid(root: Path) -> None:
    masks(root, "{split}/{stem}.png", "{split}_labels/{stem}_L.png", coloured)
    _write(root / "class_dict.csv", "name,r,g,b\nbackground,0,0,0\nround,128,0,0\nsquare,0,128,0\n", "utf-8-sig")


def black_and_white(root: Path) -> None:
    """FiftyOne's folders of masks, with 255 inside any object."""
    masks(
        root, "{split}/data/{stem}.png", "{split}/labels/{stem}.png", lambda mask: mask.point(lambda v: 255 * (v > 0))
    )


def roboflow_masks(root: Path) -> None:
    masks(root, "{split}/{stem}.png", "{split}/{stem}_mask.png")
    for split in SPLITS:
        _write(root / split / "_classes.csv", "Pixel Value, Class\n0, background\n1, round\n2, square\n")


def segnet(root: Path) -> None:
    masks(root, "{split}/{stem}.png", "{split}annot/{stem}.png")
    _write(root / "classes.txt", "background\nround\nsquare\n")
    _save(cells.scene(20)[0], root / "test" / "unlabelled.png")


def images_and_masks(root: Path) -> None:
    masks(root, "images/{stem}.png", "masks/{stem}_mask.png", palette)
    _write(root / "classes.txt", "background\nround\nsquare\n")
    _write(root / "valid.txt", "".join(f"p{i}.png\n" for i in SPLITS["val"]))


def cityscapes(root: Path) -> None:
    """Round is a person (24), square a car (26), the background a road (7)."""
    ids = np.array([7, 24, 26], np.uint8)
    for split, seeds in SPLITS.items():
        for i in seeds:
            image, mask, _ = cells.scene(i)
            stem = f"aachen_{i:06}_000019"
            _save(image, root / "leftImg8bit" / split / "aachen" / f"{stem}_leftImg8bit.png")
            place = root / "gtFine" / split / "aachen"
            _save(Image.fromarray(ids[np.array(mask)]), place / f"{stem}_gtFine_labelIds.png")
            _save(coloured(mask), place / f"{stem}_gtFine_color.png")
            instances = np.array([7, 24_000, 26_000], np.uint16)[np.array(mask)]
            _save(Image.fromarray(instances), place / f"{stem}_gtFine_instanceIds.png")


BOXES: dict[str, Callable[[Path], None]] = {
    "voc": voc, "voc in a folder": official_voc, "voc in splits": voc_in_splits, "roboflow voc": roboflow_voc,
    "fiftyone": fiftyone, "roboflow darknet": roboflow_darknet,
    "fiftyone samples": fiftyone_samples,
    "ultralytics": ultralytics, "roboflow yolo": roboflow_yolo, "darknet": darknet_lists,
}  # fmt: skip
OUTLINES: dict[str, Callable[[Path], None]] = {  # both boxes and masks
    "coco": official_coco, "roboflow coco": roboflow_coco, "cvat coco": cvat_coco, "fiftyone coco": fiftyone_coco,
    "coco from windows": windows_coco, "yolo outlines": lambda root: ultralytics(root, outlines=True), "labelme": labelme,
    "label studio": label_studio, "label studio brushes": label_studio_brushes, "cvat images": cvat_images,
}  # fmt: skip
MASKS: dict[str, Callable[[Path], None]] = {
    "voc": voc, "cvat": cvat_masks, "camvid": camvid, "segnet": segnet, "images and masks": images_and_masks,
    "roboflow masks": roboflow_masks,
}  # fmt: skip
EVERY = BOXES | OUTLINES | MASKS | {"cityscapes": cityscapes, "masks of 0 and 255": black_and_white}
