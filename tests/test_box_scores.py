"""mAP equals pycocotools' on the same detections, VOC's AP is computed by hand, IoU by sets."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from resnetlab.data.annotations import AnnotatedImage
from resnetlab.data.mask_dataset import MaskedImage
from resnetlab.data.mask_files import MaskFile
from resnetlab.evaluation import overlays
from resnetlab.evaluation.detection import (
    DetectionMetrics,
    Detections,
    coco_documents,
    compute_detection_metrics,
    voc07_ap,
    voc_ap,
)
from resnetlab.evaluation.segmentation import SegmentationMetrics

pytest.importorskip("faster_coco_eval", reason="the extra 'detect' is not installed")


def truth(boxes: list[list[float]], labels: list[int], ignored: list[bool] | None = None) -> AnnotatedImage:
    return AnnotatedImage(
        "p", Path("p"), (200, 200), torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64),
        torch.tensor(ignored or [False] * len(labels), dtype=torch.bool),
    )  # fmt: skip


def found(boxes: list[list[float]], scores: list[float], labels: list[int]) -> Detections:
    return Detections(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), torch.tensor(labels, dtype=torch.int64))


def scattered(seed: int) -> tuple[list[AnnotatedImage], list[Detections]]:
    """Images with boxes of three classes (a fourth never occurs), found more or less well."""
    draw = np.random.default_rng(seed)
    truths, founds = [], []
    for _ in range(12):
        n = int(draw.integers(0, 9))
        corner, side = draw.uniform(0, 140, (n, 2)), draw.uniform(5, 60, (n, 2))
        boxes, labels = np.concatenate([corner, corner + side], 1), draw.integers(0, 3, n)
        truths.append(truth(boxes.tolist(), labels.tolist(), (draw.random(n) < 0.15).tolist()))
        moved = boxes + draw.normal(0, 4, boxes.shape)
        moved = np.concatenate([moved, draw.uniform(0, 50, (6, 4)) + np.array([0, 0, 60, 60])])
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        guessed = np.concatenate([np.where(draw.random(n) < 0.8, labels, 0), draw.integers(0, 4, 6)])
        founds.append(found(moved.tolist(), np.round(draw.random(n + 6), 2).tolist(), guessed.tolist()))  # with ties
    return truths, founds


@pytest.mark.parametrize("seed", range(4))
def test_map_is_pycocotools(seed: int) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths, founds = scattered(seed)
    document, results = coco_documents(truths, founds, 4)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = COCO()
        theirs.dataset = document
        theirs.createIndex()
        evaluator = COCOeval(theirs, theirs.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    ours = compute_detection_metrics(truths, founds, ("a", "b", "c", "d"))
    assert 0.05 < ours.map < 0.9
    assert ours.map == pytest.approx(evaluator.stats[0], abs=1e-12)
    assert ours.map_50 == pytest.approx(evaluator.stats[1], abs=1e-12)
    assert ours.ap[3] is None and ours.to_json()["per_class"][3]["n"] == 0
    precision = evaluator.eval["precision"][:, :, :, 0, 2]
    for k in range(3):
        assert ours.ap[k] == pytest.approx(precision[:, :, k].mean(), abs=1e-12)


def test_vocs_ap_by_hand() -> None:
    """Three boxes; hits in the order right, wrong (a second hit), right: precision 1, 1/2, 2/3 at recall 1/3, 1/3, 2/3."""
    truths = [
        truth(
            [[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60], [80, 80, 90, 90]], [0, 0, 0, 0], [False] * 3 + [True]
        )
    ]
    boxes = [[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [80, 80, 90, 90]]  # the last is a difficult one
    evaluated = compute_detection_metrics(truths, [found(boxes, [0.9, 0.8, 0.7, 0.95], [0, 0, 0, 0])], ("a", "b"))
    assert evaluated.voc == [pytest.approx(1 / 3 + 1 / 3 * 2 / 3), None]
    assert evaluated.voc07 == [pytest.approx((4 * 1 + 3 * 2 / 3) / 11), None]
    assert voc_ap(np.array([1.0]), np.array([1.0])) == voc07_ap(np.array([1.0]), np.array([1.0])) == 1


def test_nothing_found_and_nothing_there() -> None:
    nothing = found([], [], [])
    assert compute_detection_metrics([truth([[0, 0, 9, 9]], [0])], [nothing], ("a", "b")).ap == [0.0, None]
    empty = compute_detection_metrics([truth([], [])], [found([[0, 0, 9, 9]], [0.5], [0])], ("a",))
    assert empty.ap == [None] and empty.map == 0 and empty.to_json()["boxes"] == 0


def test_iou_of_masks() -> None:
    confusion = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])
    evaluated = SegmentationMetrics(
        ("a", "b", "c"), confusion, [MaskedImage("p", Path("p"), (0, 0), MaskFile(Path("m"), 3))]
    )
    assert evaluated.iou == [6 / 9, 3 / 6, None] and evaluated.mean_iou == pytest.approx((6 / 9 + 3 / 6) / 2)
    assert evaluated.pixel_error == 3 / 12


def test_curves_name_every_class_but_not_very_many() -> None:
    many = tuple(f"class {i}" for i in range(overlays.MAX_NAMED + 1))
    for classes in (("_a", "b"), many):
        n, curves = len(classes), np.ones((len(classes), 101))
        empty: list[float | None] = [1.0] * n
        page = overlays.precision_recall_svg(DetectionMetrics(classes, empty, empty, empty, empty, curves, (), ()))
        assert [f"{name} (1.000)" in page for name in classes] == [classes is not many] * n
