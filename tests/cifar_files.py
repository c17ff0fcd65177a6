"""Small CIFAR files for tests, in the published binary form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from resnetlab.data import cifar


def write_binary(folder: Path, name: str, n: int = 4) -> np.ndarray:
    version = cifar.VERSIONS[name][0]
    files = (*version.train, *version.test)
    rng = np.random.default_rng(1)
    records = rng.integers(0, 256, (len(files) * n, version.labels + cifar.PIXELS), dtype=np.uint8)
    records[:, : version.labels] %= 10
    folder.mkdir(parents=True)
    for i, file in enumerate(files):
        (folder / file).write_bytes(records[i * n : (i + 1) * n].tobytes())
    (folder / version.meta).write_text("".join(f"class{i}\n" for i in range(10)) + "\n")
    return records
