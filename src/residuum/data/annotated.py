"""A picture with boxes, whatever form it came in, and the check that no box goes through unseen.

A box is (x1, y1, x2, y2) in pixels from the picture's upper left corner, float32, its area (x2 - x1)(y2 - y1); numbers are
taken as the files have them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residuum.data.decode import decode_pixels
from residuum.data.parts import Checker
from residuum.errors import DataError


@dataclass(frozen=True, eq=False)
class Annotated:
    """One picture and what is on it; no box at all makes it background.

    Attributes:
        name: of the picture's file below the data's folder.
        size: (height, width) as the annotation says; (0, 0) where it says nothing.
        boxes: float32 (n, 4).
        labels: int64 (n,), positions in the data's `classes`.
        ignored: bool (n,), VOC's "difficult" and COCO's "iscrowd": not trained on, and neither right nor wrong when judged.
    """

    name: str
    file: Path
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    ignored: Tensor

    def pixels(self) -> Tensor:
        """Decoded, uint8 (H, W, 3). Raises DataError where it cannot be read or is not of the size that its annotation says."""
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise DataError(f"{self.file} cannot be read ({error.strerror}).") from error
        found = decode_pixels(content, str(self.file))
        h, w = found.shape[:2]
        if self.size != (0, 0) and (h, w) != self.size:
            raise DataError(
                f"{self.file} has {w}x{h} pixels, its annotation says {self.size[1]}x{self.size[0]}; "
                "its boxes may be meant for another picture (an EXIF rotation turns it)."
            )
        return found

    def feed(self, digest: Any) -> None:
        """Feeds a hash with the boxes."""
        digest.update(self.boxes.numpy().tobytes() + self.labels.numpy().tobytes() + self.ignored.numpy().tobytes())


def checked(
    checker: Checker,
    name: str,
    file: Path,
    source: str,
    size: tuple[int, int],
    found: Iterable[tuple[Sequence[float], int, bool]],
) -> Annotated:
    """One picture of (box, label, ignored) each, without the boxes that are bad; `source` is the annotation's file."""
    kept: list[tuple[Sequence[float], int, bool]] = []
    for i, (box, label, ignored) in enumerate(found):
        if fault := box_fault(box, size):
            checker.bad(f"{source}, box {i + 1} of {name}", fault)
        else:
            kept.append((box, label, ignored))
    return Annotated(
        name,
        file,
        size,
        torch.tensor([box for box, _, _ in kept], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([label for _, label, _ in kept], dtype=torch.int64),
        torch.tensor([each for _, _, each in kept], dtype=torch.bool),
    )


def box_fault(box: Sequence[float], size: tuple[int, int]) -> str | None:
    """What is wrong with (x1, y1, x2, y2) in a picture of (height, width), (0, 0) where that is not known; None if nothing."""
    x1, y1, x2, y2 = box
    height, width = size
    shown = f"({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not all(abs(v) < 1e7 for v in box):
        return f"{shown} is not made of numbers of pixels"
    if x2 < x1 or y2 < y1:
        return f"{shown} is flipped: its right or lower edge comes before its left or upper one"
    if x2 == x1 or y2 == y1:
        return f"{shown} is empty"
    if x1 < 0 or y1 < 0 or (size != (0, 0) and (x2 > width or y2 > height)):
        return f"{shown} reaches outside the picture" + (f" of {width}x{height} pixels" if size != (0, 0) else "")
    return None
