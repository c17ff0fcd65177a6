"""Pictures made for tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("alpha", "größe ß", "红 花")


def photo(seed: int, width: int = 60, height: int = 45) -> Image.Image:
    """A smooth random RGB picture: no two are alike, and JPEG keeps it nearly as it is."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def folder(root: Path, splits: dict[str, int] | None = None, classes: tuple[str, ...] = NAMES) -> Path:
    """A folder of class folders; `splits` says how many pictures a class has in each, "" for no split folders."""
    seed = 0
    for split, count in (splits or {"train": 8, "val": 3}).items():
        for name in classes:
            place = root / split / name
            place.mkdir(parents=True)
            for i in range(count):
                seed += 1
                photo(seed, 50 + seed % 20, 40 + seed % 11).save(place / f"bild {i}.jpg", quality=90)
    return root
