"""The pixels of an object's mask, from polygons or run lengths: those that COCO's reference (pycocotools) gives.

Own code, since an object needs no compiled package and no trust in the file: lengths that do not fit are an error here, while
pycocotools reads past them. `tests/test_object_masks.py` compares the two.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resnetlab.formatting import is_number

OVERSAMPLING = 5  # pycocotools rounds corners to fifths of a pixel
CIRCLE_CORNERS = 64  # of the polygon that is read for a circle or an ellipse
MARGIN = 1  # pixels by which a corner may be beyond the image's border: tools write the border as width or width + 1

Runs = NDArray[np.int64]  # where pixels change between outside and inside, ascending, in column-major order


@dataclass(frozen=True, eq=False)
class ObjectMask:
    """The mask of one object.

    Attributes:
        polygons: int32 (2, n) each: x and y of the corners in fifths of a pixel; the object is their union.
        extent: the smallest box around the polygons' corners as they were given, (x1, y1, x2, y2) in pixels.
        runs: instead of polygons, where the pixels change, int32 (n,), and
        size: (height, width) that they are meant for.
    """

    polygons: tuple[NDArray[np.int32], ...] = ()
    extent: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    runs: NDArray[np.int32] | None = None
    size: tuple[int, int] = (0, 0)

    def paint(self, mask: NDArray[np.uint8], value: int) -> None:
        """Sets the object's pixels in a mask (H, W) to a value."""
        height, width = mask.shape
        for polygon in self.polygons:
            _paint_runs(mask, _polygon_runs(polygon, height, width), value)
        if self.runs is not None:
            _paint_runs(mask, self.runs.astype(np.int64), value)

    def area(self) -> float:
        """Pixels, of polygons by the shoelace formula; decides which object is drawn over which."""
        if self.runs is not None:
            return float(np.diff(self.runs)[::2].sum())
        corners = (polygon.astype(np.float64) / OVERSAMPLING for polygon in self.polygons)
        return sum(float(abs(np.sum(np.roll(xs, 1) * ys - xs * np.roll(ys, 1)))) / 2 for xs, ys in corners)

    def bounds(self) -> tuple[float, float, float, float]:
        """The smallest box around the object, (x1, y1, x2, y2) in pixels."""
        if self.runs is None:
            return self.extent
        mask = np.zeros(self.size, np.uint8)
        self.paint(mask, 1)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)

    def update_hash(self, digest: Any) -> None:
        """Adds the mask to a hash."""
        for numbers in (*self.polygons, *((self.runs,) if self.runs is not None else ())):
            digest.update(b"%d " % numbers.size + numbers.tobytes())


def parse_segmentation(segmentation: Any, size: tuple[int, int]) -> ObjectMask:
    """The mask of COCO's `segmentation`: a list of polygons [x1, y1, x2, y2, …] (or one alone), or run lengths.

    Args:
        size: (height, width) of the image; (0, 0) if unknown.

    Raises:
        ValueError: it is none, or does not fit the image; the message continues "its segmentation …".
    """
    if isinstance(segmentation, dict):
        return _parse_runs(segmentation, size)
    if not isinstance(segmentation, list | tuple) or not segmentation:
        raise ValueError("has no polygon and no run lengths" if not segmentation else "is no list of polygons")
    if all(is_number(value) for value in segmentation):  # one polygon that is not in a list of its own
        segmentation = [segmentation]
    polygons = [_parse_polygon(polygon, size) for polygon in segmentation]
    xs, ys = np.concatenate(polygons, axis=1)
    fifths = tuple(np.trunc(OVERSAMPLING * corners + 0.5).astype(np.int32) for corners in polygons)
    return ObjectMask(fifths, (float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())))


def _parse_polygon(polygon: Any, size: tuple[int, int]) -> NDArray[np.float64]:
    """The corners (2, n) in pixels."""
    listed = isinstance(polygon, list | tuple) and all(is_number(value) for value in polygon)
    if not listed and not isinstance(polygon, array):
        raise ValueError("has a polygon that is no list of numbers")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("has a polygon of fewer than three corners (x and y of each)")
    corners = np.array(polygon, np.float64).reshape(-1, 2).T
    if not (np.abs(corners) < 1e7).all():  # NaN too
        raise ValueError("has a corner that does not consist of pixel coordinates")
    height, width = size
    outside = (corners < -MARGIN).any(0)
    if size != (0, 0):
        outside |= (corners[0] > width + MARGIN) | (corners[1] > height + MARGIN)
    if outside.any():
        x, y = corners[:, int(outside.argmax())]
        of = f" of {width}x{height} pixels" if size != (0, 0) else ""
        raise ValueError(f"has the corner ({x:g}, {y:g}), which is outside the image{of}")
    return corners


def _parse_runs(segmentation: dict[str, Any], size: tuple[int, int]) -> ObjectMask:
    """Run lengths, {"size": [height, width], "counts": [outside, inside, outside, …] or that compressed to text}."""
    counts, given = segmentation.get("counts"), segmentation.get("size")
    if not isinstance(given, list | tuple) or len(given) != 2 or not all(isinstance(n, int) and n > 0 for n in given):
        raise ValueError("has run lengths without a size [height, width]")
    height, width = given
    if size not in ((0, 0), (height, width)):
        raise ValueError(f"has run lengths for {width}x{height} pixels, the image has {size[1]}x{size[0]}")
    if isinstance(counts, str | bytes):
        counts = decompress_counts(counts.encode() if isinstance(counts, str) else counts)
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
        raise ValueError("has run lengths that are not whole numbers from 0 up")
    if sum(counts) != height * width:
        raise ValueError(f"has run lengths for {sum(counts):,} pixels, the image has {height * width:,}")
    if not any(counts[1::2]):
        raise ValueError("has run lengths without a pixel inside")
    return ObjectMask(runs=np.cumsum(counts, dtype=np.int64).astype(np.int32), size=(height, width))


def encode_mask(inside: NDArray[np.bool_], left: int, top: int, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's run lengths of a mask (h, w) that begins at (left, top) of an image of (height, width).

    Raises:
        ValueError: it reaches outside the image.
    """
    (h, w), (height, width) = inside.shape, size
    if min(left, top) < 0 or top + h > height or left + w > width:
        raise ValueError("its mask is larger than the image")
    whole = np.zeros(size, bool)
    whole[top : top + h, left : left + w] = inside
    return {"size": list(size), "counts": np.diff(_find_runs(whole), prepend=0).tolist()}


def make_mask(inside: NDArray[np.bool_]) -> ObjectMask:
    """The mask of the pixels that are True, (H, W)."""
    return ObjectMask(runs=_find_runs(inside).astype(np.int32), size=inside.shape)


def _find_runs(inside: NDArray[np.bool_]) -> Runs:
    return np.append(np.flatnonzero(np.diff(inside.T.ravel(), prepend=False)), inside.size)


def ellipse_corners(x: float, y: float, rx: float, ry: float) -> list[tuple[float, float]]:
    """The corners of the polygon that is read for an ellipse with the centre (x, y) and the radii rx and ry."""
    angles = (2 * math.pi * i / CIRCLE_CORNERS for i in range(CIRCLE_CORNERS))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def turn_corners(
    corners: Sequence[tuple[float, float]], pivot: tuple[float, float], angle: float
) -> list[tuple[float, float]]:
    """Corners in pixels, turned about a point by an angle in radians, clockwise on the screen."""
    (px, py), cos, sin = pivot, math.cos(angle), math.sin(angle)
    away = [(x - px, y - py) for x, y in corners]
    return [(px + dx * cos - dy * sin, py + dx * sin + dy * cos) for dx, dy in away]


def decompress_counts(text: bytes) -> list[int]:
    """COCO's compressed run lengths: five bits a character, lowest first; from the third on, differences to the last but one.

    Raises ValueError if the text is cut short or has other characters.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError("has compressed run lengths with a character that cannot be one")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("has compressed run lengths that are cut short")
    return counts


def _polygon_runs(polygon: NDArray[np.int32], height: int, width: int) -> Runs:
    """Where the pixels of a polygon (2, n) change, as pycocotools' rleFrPoly finds it.

    The outline is walked in fifths of a pixel; wherever it passes the middle of a column, the pixel below it changes.
    """
    starts = polygon.astype(np.int64)
    ends = np.roll(starts, -1, axis=1)
    spans = np.abs(ends - starts)
    steps = spans.max(0)  # of each edge
    flat = spans[0] >= spans[1]  # walked along x
    forwards = np.where(flat, starts[0] <= ends[0], starts[1] <= ends[1])
    low, high = np.where(forwards, starts, ends), np.where(forwards, ends, starts)
    rise = np.where(flat, high[1] - low[1], high[0] - low[0]) / np.maximum(steps, 1)
    edge = np.repeat(np.arange(len(steps)), steps + 1)
    along = np.arange(len(edge)) - np.repeat(np.cumsum(steps + 1) - steps - 1, steps + 1)
    along = np.where(forwards[edge], along, steps[edge] - along)
    across = np.trunc(np.where(flat, low[1], low[0])[edge] + rise[edge] * along + 0.5).astype(np.int64)
    along += np.where(flat, low[0], low[1])[edge]
    x, y = np.where(flat[edge], along, across), np.where(flat[edge], across, along)
    column = (np.minimum(x[1:], x[:-1]) + 0.5) / OVERSAMPLING - 0.5
    passed = (x[1:] != x[:-1]) & (np.floor(column) == column) & (column >= 0) & (column <= width - 1)
    row = (np.minimum(y[1:], y[:-1])[passed] + 0.5) / OVERSAMPLING - 0.5
    row = np.ceil(row.clip(0, height)).astype(np.int64)
    return np.sort(column[passed].astype(np.int64) * height + row)


def _paint_runs(mask: NDArray[np.uint8], runs: Runs, value: int) -> None:
    """Paints the pixels of a mask (H, W) from the first change to the second, the third to the fourth, and so on."""
    if not len(runs):
        return
    height, width = mask.shape
    first, last = int(runs[0]) // height, min(int(runs[-1]) // height + 1, width)  # columns
    toggles = np.bincount(runs - first * height, minlength=(last - first) * height)[: (last - first) * height]
    inside = (np.cumsum(toggles) & 1).astype(bool).reshape(last - first, height).T
    mask[:, first:last][inside] = value
