"""Polygons and run lengths give pycocotools' pixels, and what is no mask is named."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from resnetlab.data.object_masks import parse_segmentation

reference = pytest.importorskip("pycocotools.mask", reason="pycocotools is not installed")


def painted(segmentation: Any, size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(size, np.uint8)
    parse_segmentation(segmentation, size).paint(mask, 1)
    return mask


def random_polygon(draw: np.random.Generator, kind: int, width: int, height: int) -> list[float]:
    """Outlines as tools write them: anywhere, on whole pixels, star-shaped, in tenths with a corner twice."""
    corners = draw.uniform(0, 1, (int(draw.integers(3, 14)), 2)) * (width, height)
    if kind == 0:
        corners = (corners * 1.1 - 0.05 * np.array([width, height])).clip((-1, -1), (width + 1, height + 1))
    elif kind == 1:
        corners = corners.round()
    elif kind == 2:
        turns = np.sort(draw.uniform(0, 2 * np.pi, len(corners)))
        radius = draw.uniform(1, min(width, height) / 2, len(corners))
        corners = np.stack([width / 2 + radius * np.cos(turns), height / 2 + radius * np.sin(turns)], 1)
    else:
        corners = corners.round(1)
        corners[1] = corners[0]
    return [float(v) for v in corners.ravel()]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in pycocotools
def test_polygons_and_run_lengths_are_pycocotools() -> None:
    draw = np.random.default_rng(0)
    for i in range(1000):
        height, width = (int(n) for n in draw.integers(5, 120, 2))
        polygons = [random_polygon(draw, i % 4, width, height) for _ in range(1 + i % 3 // 2)]
        runs = reference.merge(reference.frPyObjects(polygons, height, width))
        expected = reference.decode(runs)
        assert np.array_equal(painted(polygons, (height, width)), expected)
        if expected.any():
            text = runs["counts"].decode()
            assert np.array_equal(painted({"size": [height, width], "counts": text}, (height, width)), expected)
            changes = np.flatnonzero(np.diff(expected.T.ravel(), prepend=0)).tolist()
            counts = np.diff([0, *changes, height * width]).tolist()
            mask = parse_segmentation({"size": [height, width], "counts": counts}, (height, width))
            x1, y1, x2, y2 = mask.bounds()
            assert [x1, y1, x2 - x1, y2 - y1] == reference.toBbox(runs).tolist()
            assert mask.area() == reference.area(runs)


@pytest.mark.parametrize("side", [1, 2, 4, 16])
def test_a_square_has_its_own_pixels(side: int) -> None:
    mask = painted([[8, 4, 8 + side, 4, 8 + side, 4 + side, 8, 4 + side]], (48, 64))
    assert mask.sum() == side * side and mask[4 : 4 + side, 8 : 8 + side].all()
    assert painted([8, 4, 8 + side, 4, 8 + side, 4 + side, 8, 4 + side], (48, 64)).sum() == side * side  # not nested


def test_outlines_of_one_object_are_united() -> None:
    """A second outline inside the first is no hole: COCO has none."""
    assert painted([[0, 0, 20, 0, 20, 20, 0, 20], [5, 5, 9, 5, 9, 9, 5, 9]], (48, 64)).sum() == 400


NO_MASKS: dict[str, tuple[Any, str]] = {
    "nothing": ([], "has no polygon and no run lengths"),
    "null": (None, "has no polygon and no run lengths"),
    "a word": ("x", "is no list of polygons"),
    "a polygon of null": ([None], "has a polygon that is no list of numbers"),
    "words": ([[1, 2, "3", 4, 5, 6]], "has a polygon that is no list of numbers"),
    "two corners": ([[1, 2, 3, 4]], "has a polygon of fewer than three corners"),
    "half a corner": ([[1, 2, 3, 4, 5, 6, 7]], "has a polygon of fewer than three corners"),
    "nan": ([[float("nan"), 2, 3, 4, 5, 6]], "has a corner that does not consist of pixel coordinates"),
    "infinity": ([[1, float("inf"), 3, 4, 5, 6]], "has a corner that does not consist of pixel coordinates"),
    "outside": ([[-2000.0, 2, 3, 4, 5, 6]], r"has the corner \(-2000, 2\), which is outside the image of 64x48 pixels"),
    "below": ([[1, 2, 3, 50, 5, 6]], r"has the corner \(3, 50\), which is outside the image"),
    "another size": ({"size": [64, 48], "counts": [3072]}, "has run lengths for 48x64 pixels, the image has 64x48"),
    "no size": ({"counts": [3072]}, r"without a size \[height, width\]"),
    "too short": ({"size": [48, 64], "counts": [0, 10]}, "for 10 pixels, the image has 3,072"),
    "negative": ({"size": [48, 64], "counts": [-1, 3073]}, "are not whole numbers from 0 up"),
    "no counts": ({"size": [48, 64]}, "are not whole numbers from 0 up"),
    "empty": ({"size": [48, 64], "counts": [3072]}, "without a pixel inside"),
    "cut short": ({"size": [48, 64], "counts": "PPPo"}, "are cut short"),
    "other text": ({"size": [48, 64], "counts": "\x01"}, "with a character that cannot be one"),
}


@pytest.mark.parametrize(("segmentation", "message"), NO_MASKS.values(), ids=NO_MASKS)
def test_what_is_no_mask_is_named(segmentation: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_segmentation(segmentation, (48, 64))
