"""Makes a folder with masks from one with boxes: every box becomes the ellipse inside it, about the shape of cells in a smear.

    python benchmarks/cell_masks.py blood-cells cell-masks

Images are linked, masks written into SegmentationClass/, lists copied into ImageSets/Segmentation/, classes into classes.txt.
Smaller ellipses are drawn over larger ones.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from resnetlab.data import box_dataset


def main(source: Path, target: Path) -> None:
    data = box_dataset.load_boxes(source)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (target / folder).mkdir(parents=True)
    for split, images in data.splits.items():
        for image in images:
            mask = Image.new("L", (image.size[1], image.size[0]))
            draw = ImageDraw.Draw(mask)
            areas = (image.boxes[:, 2:] - image.boxes[:, :2]).prod(1)
            for i in areas.argsort(descending=True).tolist():
                draw.ellipse(image.boxes[i].tolist(), fill=int(image.labels[i]) + 1)
            mask.save(target / "SegmentationClass" / f"{image.file.stem}.png")
            os.symlink(image.file.resolve(), target / "JPEGImages" / image.file.name)
        names = "".join(f"{image.file.stem}\n" for image in images)
        (target / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    (target / "classes.txt").write_text("\n".join(("background", *data.classes)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
