"""Damaged tar shards and indices, and archives of class folders, are read or refused in a sentence."""

from __future__ import annotations

import random
import shutil
import tempfile
import zipfile
from pathlib import Path

from harness import damage, run

from resnetlab.data.dataset import Dataset
from resnetlab.errors import DataError
from shard_files import load, members, packed, tar

FOLDER = Path(tempfile.mkdtemp(prefix="resnetlab-robustness-"))
ROOT, PACKED = packed(FOLDER)
tar(FOLDER / "elsewhere" / "s.tar", members())
with zipfile.ZipFile(FOLDER / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
    for file in sorted((ROOT / "train").rglob("*.jpg")):
        archive.write(file, file.relative_to(ROOT / "train"))


def read_all(data: Dataset) -> None:
    for split in data.splits.values():
        for i in range(len(split)):
            split.read_image(i)


def attack(draw: random.Random) -> str | None:
    source = draw.choice([PACKED, FOLDER / "elsewhere", FOLDER / "photos.zip"])
    place = FOLDER / "attacked"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    copy = place / source.name
    shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
    target = draw.choice(sorted(copy.iterdir())) if copy.is_dir() else copy
    target.write_bytes(damage(target.read_bytes(), draw))
    try:
        read_all(load(copy, place / "data"))
    except DataError as error:
        return f"not a sentence: {error}" if "\n" in str(error) else None
    return None


if __name__ == "__main__":
    run("damaged shards", attack, 1000)
