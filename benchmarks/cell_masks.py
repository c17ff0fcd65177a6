"""Makes a folder with masks out of one with boxes: every box becomes the ellipse inside it, as cells in a smear nearly are.

    python benchmarks/cell_masks.py blood-cells cell-masks

Pictures are linked, masks written into SegmentationClass/, lists copied into ImageSets/Segmentation/, classes into classes.txt.
Where ellipses cross, the smaller one lies on top.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from residuum.data import boxes


def main(source: Path, target: Path) -> None:
    data = boxes.load(source)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (target / folder).mkdir(parents=True)
    for split, pictures in data.splits.items():
        for picture in pictures:
            mask = Image.new("L", (picture.size[1], picture.size[0]))
            draw = ImageDraw.Draw(mask)
            areas = (picture.boxes[:, 2:] - picture.boxes[:, :2]).prod(1)
            for i in areas.argsort(descending=True).tolist():
                draw.ellipse(picture.boxes[i].tolist(), fill=int(picture.labels[i]) + 1)
            mask.save(target / "SegmentationClass" / f"{picture.file.stem}.png")
            os.symlink(picture.file.resolve(), target / "JPEGImages" / picture.file.name)
        names = "".join(f"{picture.file.stem}\n" for picture in pictures)
        (target / "ImageSets" / "Segmentation" / f"{split}.txt").write_text(names)
    (target / "classes.txt").write_text("\n".join(("background", *data.classes)) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
