#!/usr/bin/env python3
"""Errors of the recipes that are ours with one micro-batch, and with a smaller one that every thread can carry on its own.

    python benchmarks/bn_batch.py --data-dir DATA --out DIR [--recipes photos,finetune,boxes,masks] [--seeds 0,1,2]

Pairs of runs of equal seeds, one thread each, on data that are at hand everywhere: `photos` trains ResNet-20 on CIFAR-10,
`finetune` the included `cifar10:resnet20` on the digits, `boxes` and `masks` a ResNet-18 on scenes of CIFAR-10's images on
grey noise. Runs that are in DIR already count. Prints each pair, and the mean difference with its 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from resnetlab.device import environment
from resnetlab.studies.verdicts import compare_by_seed

SCENES = {"train": 480, "val": 240}
CLASSES = ("automobile", "cat", "ship")


class Comparison(NamedTuple):
    """What is run with both sizes of micro-batches."""

    command: str  # {data} and {scenes} are filled in
    sizes: tuple[int, int]  # bn_batch: the whole batch, and a part of it
    figure: str  # of result.json; the error, or what is to be high


COMPARISONS = {
    "photos": Comparison(
        "train cifar10 --data-dir {data} --net resnet20 --recipe photos --set image_size=32", (0, 16), "top1_error"
    ),
    "finetune": Comparison("train digits --recipe finetune --start-from cifar10:resnet20", (0, 16), "top1_error"),
    "boxes": Comparison(
        "detect train {scenes} --steps 250 --set image_size=128 --set longest=192 --set sides=112,144", (0, 4), "map_50"
    ),
    "masks": Comparison(
        "segment train {scenes} --set image_size=128 --set longest=192 --set sides=112,144", (0, 4), "mean_iou"
    ),
}


def make_scenes(data: Path, root: Path) -> None:
    """VOC's folder of scenes of 160 x 120 pixels with up to three images of CIFAR-10 at 20 to 56 pixels, not overlapping."""
    for place in ("Annotations", "JPEGImages", "SegmentationClass", "ImageSets/Main", "ImageSets/Segmentation"):
        (root / place).mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(("background", *CLASSES)) + "\n")
    known = (data / "cifar-10-batches-bin/batches.meta.txt").read_text().split()
    labels = [known.index(name) for name in CLASSES]
    draw = np.random.default_rng(0)
    for split, file in (("train", "data_batch_1.bin"), ("val", "test_batch.bin")):
        rows = np.fromfile(data / "cifar-10-batches-bin" / file, np.uint8).reshape(-1, 3073)
        rows, names = rows[np.isin(rows[:, 0], labels)], [f"{split}{i:03}" for i in range(SCENES[split])]
        for name in names:
            pixels, mask, objects = (
                draw.integers(90, 160, (120, 160, 3), dtype=np.uint8),
                np.zeros((120, 160), np.uint8),
                "",
            )
            for _ in range(int(draw.integers(1, 4))):
                side, row = int(draw.integers(20, 57)), rows[draw.integers(len(rows))]
                x, y, label = int(draw.integers(160 - side)), int(draw.integers(120 - side)), labels.index(row[0])
                if mask[y : y + side, x : x + side].any():
                    continue
                image = Image.fromarray(row[1:].reshape(3, 32, 32).transpose(1, 2, 0)).resize((side, side))
                pixels[y : y + side, x : x + side] = np.asarray(image)
                mask[y : y + side, x : x + side] = label + 1
                corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + side}</xmax><ymax>{y + side}</ymax>"
                objects += f"<object><name>{CLASSES[label]}</name><bndbox>{corners}</bndbox></object>"
            Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.png")
            Image.fromarray(mask).save(root / "SegmentationClass" / f"{name}.png")
            size = "<size><width>160</width><height>120</height></size>"
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
        for place in ("Main", "Segmentation"):
            (root / "ImageSets" / place / f"{split}.txt").write_text("\n".join(names) + "\n")


def measure(comparison: Comparison, size: int, seed: int, out: Path, places: dict[str, Path]) -> float:
    """The figure of a run, which is made where it is not there; a run that was stopped goes on."""
    result = out / "result.json"
    if not result.exists():
        command = comparison.command.format(**places).split()
        values = ["--set", f"bn_batch={size}", "--set", "threads=1", "--seed", str(seed), "--device", "cpu"]
        resume = [*command[: command.index("train") + 1], "--resume", str(out)]
        arguments = resume if out.exists() else [*command, *values, "--out", str(out)]
        subprocess.run([sys.executable, "-m", "resnetlab", *arguments], check=True, stdout=subprocess.DEVNULL)
    return float(json.loads(result.read_text())[comparison.figure])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="a folder with CIFAR-10's binary version")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", default=",".join(COMPARISONS), help="comma list")
    parser.add_argument("--seeds", default="0,1,2", help="comma list")
    options = parser.parse_args()
    if unknown := set(options.recipes.split(",")) - set(COMPARISONS):
        parser.error(f"nothing is compared for {', '.join(sorted(unknown))}; there are {', '.join(COMPARISONS)}.")
    if not (options.data_dir / "cifar-10-batches-bin").is_dir():
        parser.error(
            f"{options.data_dir} has no cifar-10-batches-bin, CIFAR-10's binary version; give its folder by --data-dir."
        )
    places = {"data": options.data_dir, "scenes": options.out / "scenes"}
    if not places["scenes"].exists():
        make_scenes(options.data_dir, places["scenes"])
    print(environment())
    for name in options.recipes.split(","):
        comparison = COMPARISONS[name]
        figures: dict[int, dict[int, float]] = {size: {} for size in comparison.sizes}
        for seed in map(int, options.seeds.split(",")):
            for size in comparison.sizes:
                figures[size][seed] = measure(comparison, size, seed, options.out / f"{name}-{size}-{seed}", places)
                print(
                    f"{name}, bn_batch={size}, seed {seed}: {comparison.figure} {figures[size][seed]:.2%}", flush=True
                )
        whole, part = (figures[size] for size in comparison.sizes)
        print(f"{name}, micro-batches of {comparison.sizes[1]} minus one: {compare_by_seed(part, whole).describe()}")


if __name__ == "__main__":
    main()
