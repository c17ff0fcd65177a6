"""Small synthetic images with boxes or masks: dark discs ("round") and bright squares ("square") on grey."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = (64, 80)  # height, width
Box = tuple[int, int, int, int]


def scene(seed: int) -> tuple[Image.Image, Image.Image, list[tuple[str, Box]]]:
    """An image, its mask (1 for round, 2 for square) and its objects."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(110, 140, (*SIZE, 3))
    mask = np.zeros(SIZE, dtype=np.uint8)
    objects: list[tuple[str, Box]] = []
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for i in range(2):
        side = int(draw.integers(16, 26))
        left, top = int(draw.integers(1, 38 - side)) + 40 * i, int(draw.integers(1, 63 - side))
        name = ("round", "square")[int(draw.integers(2))]
        inside = (rows >= top) & (rows < top + side) & (columns >= left) & (columns < left + side)
        if name == "round":
            inside &= (rows - top - side / 2) ** 2 + (columns - left - side / 2) ** 2 <= (side / 2) ** 2
        pixels[inside] = 30 if name == "round" else 230
        mask[inside] = 1 if name == "round" else 2
        objects.append((name, (left, top, left + side, top + side)))
    return Image.fromarray(pixels.astype(np.uint8)), Image.fromarray(mask), objects


def voc_annotation(boxes: list[tuple[str, Box]], size: tuple[int, int] = SIZE) -> str:
    """A VOC annotation file's content."""
    objects = "".join(
        f"<object><name>{name}</name><difficult>0</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
        f"<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
        for name, (x1, y1, x2, y2) in boxes
    )
    return f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>{objects}</annotation>"


def make_voc_folder(root: Path, train: int = 6, val: int = 3) -> Path:
    """Writes a folder in Pascal VOC's format, with boxes and masks."""
    for folder in ("Annotations", "JPEGImages", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    names = [f"p{i}" for i in range(train + val)]
    for i, name in enumerate(names):
        image, mask, objects = scene(i)
        image.save(root / "JPEGImages" / f"{name}.png")
        mask.save(root / "SegmentationClass" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(voc_annotation(objects))
    for folder in ("Main", "Segmentation"):
        (root / "ImageSets" / folder / "train.txt").write_text("\n".join(names[:train]) + "\n")
        (root / "ImageSets" / folder / "val.txt").write_text("\n".join(names[train:]) + "\n")
    (root / "classes.txt").write_text("background\nround\nsquare\n")
    return root


def coco_document(seeds: range) -> dict[str, Any]:
    """The JSON of a split; polygons are the boxes' corners."""
    images, annotations = [], []
    for i in seeds:
        images.append({"id": i, "file_name": f"p{i}.png", "height": SIZE[0], "width": SIZE[1]})
        for name, (x1, y1, x2, y2) in scene(i)[2]:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": i,
                    "category_id": {"round": 7, "square": 9}[name],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "segmentation": [[x1, y1, x2, y1, x2, y2, x1, y2]],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": 7, "name": "round"}, {"id": 9, "name": "square"}]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_coco_folder(root: Path, train: int = 6, val: int = 3) -> Path:
    """Writes a folder with COCO's JSON for the same images."""
    (root / "images").mkdir(parents=True)
    for i in range(train + val):
        scene(i)[0].save(root / "images" / f"p{i}.png")
    (root / "train.json").write_text(json.dumps(coco_document(range(train))))
    (root / "val.json").write_text(json.dumps(coco_document(range(train, train + val))))
    return root
