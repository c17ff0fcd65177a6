"""CIFAR-10 from the binary version's files (A. Krizhevsky, 2009), held as uint8 in memory.

A record is 3,073 bytes: a label, then 1,024 red, green and blue values, row by row.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from residuum.data.dataset import Dataset, Split
from residuum.errors import DataError

FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
TEST = ("test_batch.bin",)
RECORD = 1 + 3 * 32 * 32


def load(data_dir: Path) -> Dataset:
    """CIFAR-10 from `data_dir`, or from its folder cifar-10-batches-bin; raises DataError where a file is missing or cut."""
    folder = data_dir / FOLDER if (data_dir / FOLDER).is_dir() else data_dir
    meta = folder / "batches.meta.txt"
    if not meta.is_file():
        raise DataError(
            f"CIFAR-10 is not under {data_dir}: put the binary version's folder {FOLDER} (batches.meta.txt, data_batch_1.bin … "
            "test_batch.bin) there, or say where it is with --data-dir."
        )
    classes = tuple(meta.read_text().split())
    return Dataset("cifar10", classes, _read(folder, TRAIN, classes, "train"), _read(folder, TEST, classes, "test"))


def _read(folder: Path, files: tuple[str, ...], classes: tuple[str, ...], split: str) -> Split:
    parts = []
    for name in files:
        file = folder / name
        try:
            raw = np.fromfile(file, np.uint8)
        except OSError as error:
            raise DataError(
                f"{file} cannot be read ({error.strerror}); unpack the binary version's archive again."
            ) from error
        if not len(raw) or len(raw) % RECORD:
            raise DataError(
                f"{file} has {len(raw):,} bytes, not a whole number of {RECORD:,}-byte records; unpack it again."
            )
        parts.append(raw.reshape(-1, RECORD))
    records = np.concatenate(parts)
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    if int(labels.max()) >= len(classes):
        raise DataError(
            f"{folder} has the label {int(labels.max())}, but batches.meta.txt names {len(classes)} classes."
        )
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    images = torch.from_numpy(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)))  # (N, 32, 32, 3)
    return Split(images, labels, split)
