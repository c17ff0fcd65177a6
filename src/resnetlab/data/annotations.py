"""An image with boxes, in whatever format it was read, and the check that rejects invalid boxes.

A box is (x1, y1, x2, y2) in pixels from the image's upper left corner, float32, its area (x2 - x1)(y2 - y1). Coordinates are
used as the files give them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnetlab.data.decode import check_regular_file, decode_pixels
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.errors import DataError


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """One image and its boxes; without boxes it is background.

    Attributes:
        name: the image file's path inside the data's folder.
        size: (height, width) according to the annotation; (0, 0) where it gives none.
        boxes: float32 (n, 4).
        labels: int64 (n,), indices into the data's `classes`.
        ignored: bool (n,), VOC's "difficult" and COCO's "iscrowd": not trained on, neither right nor wrong when evaluated.
    """

    name: str
    file: Path
    size: tuple[int, int]
    boxes: Tensor
    labels: Tensor
    ignored: Tensor

    def read_pixels(self) -> Tensor:
        """Decodes the image, uint8 (H, W, 3). Raises DataError if it is unreadable or not of its annotation's size."""
        check_regular_file(self.file)
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise DataError(f"{self.file} cannot be read ({error.strerror}).") from error
        pixels = decode_pixels(content, str(self.file))
        h, w = pixels.shape[:2]
        if self.size != (0, 0) and (h, w) != self.size:
            raise DataError(
                f"{self.file} has {w}x{h} pixels, its annotation says {self.size[1]}x{self.size[0]}; "
                "its boxes may be meant for another image (an EXIF rotation turns it)."
            )
        return pixels

    def update_hash(self, digest: Any) -> None:
        """Adds the boxes to a hash."""
        digest.update(self.boxes.numpy().tobytes() + self.labels.numpy().tobytes() + self.ignored.numpy().tobytes())


def make_annotated_image(
    errors: ErrorPolicy,
    name: str,
    file: Path,
    source: str,
    size: tuple[int, int],
    annotations: Iterable[tuple[Sequence[float], int, bool]],
) -> AnnotatedImage:
    """An image with its valid boxes, given as (box, label, ignored); `source` is the annotation file."""
    valid: list[tuple[Sequence[float], int, bool]] = []
    for i, (box, label, ignored) in enumerate(annotations):
        if problem := find_box_error(box, size):
            errors.reject(f"{source}, box {i + 1} of {name}", problem)
        else:
            valid.append((box, label, ignored))
    return AnnotatedImage(
        name,
        file,
        size,
        torch.tensor([box for box, _, _ in valid], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([label for _, label, _ in valid], dtype=torch.int64),
        torch.tensor([ignored for _, _, ignored in valid], dtype=torch.bool),
    )


def find_box_error(box: Sequence[float], size: tuple[int, int]) -> str | None:
    """What is wrong with (x1, y1, x2, y2) in an image of (height, width), (0, 0) if unknown; None if nothing is."""
    x1, y1, x2, y2 = box
    height, width = size
    text = f"({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not all(abs(v) < 1e7 for v in box):
        return f"{text} does not consist of pixel coordinates"
    if x2 < x1 or y2 < y1:
        return f"{text} is flipped: its right or lower edge comes before its left or upper one"
    if x2 == x1 or y2 == y1:
        return f"{text} is empty"
    if x1 < 0 or y1 < 0 or (size != (0, 0) and (x2 > width or y2 > height)):
        return f"{text} reaches outside the image" + (f" of {width}x{height} pixels" if size != (0, 0) else "")
    return None
