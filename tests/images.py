"""Images made for tests."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("alpha", "größe ß", "红 花")


def photo(seed: int, width: int = 60, height: int = 45) -> Image.Image:
    """A smooth random RGB image: no two are alike, and JPEG changes it little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def folder(root: Path, splits: dict[str, int] | None = None, classes: tuple[str, ...] = NAMES) -> Path:
    """A folder of class folders; `splits` maps a split to its images per class, "" for no split folders."""
    seed = 0
    for split, count in (splits or {"train": 8, "val": 3}).items():
        for name in classes:
            place = root / split / name
            place.mkdir(parents=True)
            for i in range(count):
                seed += 1
                photo(seed, 50 + seed % 20, 40 + seed % 11).save(place / f"bild {i}.jpg", quality=90)
    return root


def png_of(width: int, height: int, form: tuple[int, int], rows: bytes) -> bytes:
    """A PNG of (bits, colour type: 0 grey, 2 RGB, 4 and 6 with alpha) from rows that begin with their filter's number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, *form, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_bomb(side: int = 20_000) -> bytes:
    """A PNG of 200 bytes whose header claims side x side pixels."""
    return png_of(side, side, (8, 2), bytes(99))
