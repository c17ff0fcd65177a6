"""Boxes that a detector predicts, and their metrics: COCO's mean average precision (by its evaluator) and Pascal VOC's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from resnetlab.data.annotations import AnnotatedImage
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.prefetch import default_workers, read_in_threads
from resnetlab.device import DeviceConfig, eval_mode, to_device
from resnetlab.errors import missing_package
from resnetlab.evaluation.metrics import mean_of_known
from resnetlab.models.head_spec import DetectionOptions


class Detections(NamedTuple):
    """The boxes of one image, best first: boxes (n, 4) in its pixels, scores (n,), labels (n,); all on the CPU."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def at_least(self, score: float) -> Detections:
        """The boxes with at least this score."""
        return Detections(*(part[self.scores >= score] for part in self))


def predict_boxes(
    nets: Sequence[nn.Module],
    images: Sequence[AnnotatedImage],
    device_config: DeviceConfig,
    testing: DetectionOptions,
    errors: ErrorPolicy,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[AnnotatedImage], list[Detections]]:
    """The images that can be read, and the boxes of a detector or an ensemble in each; `errors` handles the others."""
    readable, detections = [], []

    def predict(read: tuple[AnnotatedImage, Tensor]) -> tuple[AnnotatedImage, Detections]:
        return read[0], predict_image_boxes(nets, read[1], device_config, testing)

    # torchvision writes the anchors of every call into the network, which streams of a GPU would do over each other
    at_once = len(images) if device_config.device.type == "cpu" else 1
    with (
        eval_mode(*nets),
        read_in_threads(AnnotatedImage.read_pixels, images, default_workers(device_config)) as read,
        device_config.side_by_side_map(at_once) as side_by_side,
    ):
        for image, found in side_by_side(predict, errors.read_each(images, read)):
            readable.append(image)
            detections.append(found)
            on_progress(len(readable), len(images))
    return readable, detections


def predict_image_boxes(
    nets: Sequence[nn.Module], pixels: Tensor, device_config: DeviceConfig, testing: DetectionOptions
) -> Detections:
    """The boxes found in one image, uint8 (H, W, 3)."""
    from resnetlab.models.test_time import detect

    with eval_mode(*nets), device_config.autocast():
        image = to_device(pixels, device_config.device).permute(2, 0, 1) / 255
        boxes, scores, labels = detect(nets, image, testing)
    best = scores.argsort(descending=True, stable=True)
    return Detections(boxes[best].float().cpu(), scores[best].float().cpu(), labels[best].cpu() - 1)


@dataclass(frozen=True, eq=False)
class DetectionMetrics:
    """Metrics of a detector on a split: fractions, None for a class without a box in it.

    Attributes:
        ap, ap_50: of each class: at IoU thresholds .5 to .95 (mean) and at .5 (COCO).
        voc, voc07: of each class, at IoU .5: area under the curve (VOC 2010 on), mean at 11 recalls (VOC 2007).
        precision: of each class, at IoU .5 and 101 recalls from 0 to 1, float64 (classes, 101); nan for a class without a box.
        truth, detections: what was compared.
    """

    classes: tuple[str, ...]
    ap: list[float | None]
    ap_50: list[float | None]
    voc: list[float | None]
    voc07: list[float | None]
    precision: NDArray[np.float64]
    truth: Sequence[AnnotatedImage]
    detections: Sequence[Detections]

    @property
    def map(self) -> float:
        """COCO's mAP@[.5:.95]: the mean of `ap` over the classes that occur."""
        return mean_of_known(self.ap)

    @property
    def map_50(self) -> float:
        """The mean of `ap_50` over the classes that occur."""
        return mean_of_known(self.ap_50)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        counts = [sum(int(((p.labels == i) & ~p.ignored).sum()) for p in self.truth) for i in range(len(self.classes))]
        rows = zip(self.classes, counts, self.ap, self.ap_50, self.voc, self.voc07, strict=True)
        keys = ("class", "n", "ap", "ap_50", "voc_ap", "voc07_ap")
        return {
            "map": self.map,
            "map_50": self.map_50,
            "voc_map": mean_of_known(self.voc),
            "voc07_map": mean_of_known(self.voc07),
            "n": len(self.truth),
            "boxes": sum(counts),
            "per_class": [dict(zip(keys, row, strict=True)) for row in rows],
        }


def require_coco_eval() -> None:
    """Raises UsageError, before any work is done, if the extra that computes mAP is not installed."""
    from importlib.util import find_spec

    if find_spec("faster_coco_eval") is None:
        raise missing_package("the evaluation of boxes", "faster-coco-eval", "detect")


def compute_detection_metrics(
    truth: Sequence[AnnotatedImage], detections: Sequence[Detections], classes: tuple[str, ...]
) -> DetectionMetrics:
    """Compares detections with the boxes of each image; raises UsageError if the extra "detect" is not installed."""
    precision = coco_precision(truth, detections, len(classes))  # (10, 101, classes); -1 for a class without a box
    ap, ap_50 = ([_average_precision(precision[t, :, k]) for k in range(len(classes))] for t in (slice(None), 0))
    curves = [voc_curve(truth, detections, k) for k in range(len(classes))]
    return DetectionMetrics(
        classes=classes,
        ap=ap,
        ap_50=ap_50,
        voc=[None if c is None else voc_ap(*c) for c in curves],
        voc07=[None if c is None else voc07_ap(*c) for c in curves],
        precision=np.where(precision[0].T < 0, np.nan, precision[0].T),
        truth=truth,
        detections=detections,
    )


def _average_precision(precision: NDArray[np.float64]) -> float | None:
    """The mean of precisions; None for a class without a box, whose precisions are -1."""
    return None if (precision < 0).all() else float(precision.mean())


def coco_documents(
    truth: Sequence[AnnotatedImage], detections: Sequence[Detections], classes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth and detections in COCO's format, which calls ignored boxes crowds."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for i, (image, predicted) in enumerate(zip(truth, detections, strict=True), 1):
        images.append({"id": i, "height": image.size[0], "width": image.size[1]})
        for box, label, ignored in zip(image.boxes, image.labels.tolist(), image.ignored.tolist(), strict=True):
            bbox = _xywh(box)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "bbox": bbox,
                 "area": bbox[2] * bbox[3], "iscrowd": int(ignored)}
            )  # fmt: skip
        for box, score, label in zip(
            predicted.boxes, predicted.scores.tolist(), predicted.labels.tolist(), strict=True
        ):
            results.append({"image_id": i, "category_id": label + 1, "bbox": _xywh(box), "score": score})
    categories = [{"id": k + 1, "name": str(k + 1)} for k in range(classes)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, results


def _xywh(box: Tensor) -> list[float]:
    x1, y1, x2, y2 = box.double().tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def coco_precision(
    truth: Sequence[AnnotatedImage], detections: Sequence[Detections], classes: int
) -> NDArray[np.float64]:
    """Precision at IoU .5, .55, …, .95 and 101 recalls, at most 100 detections per image; (10, 101, classes), -1: no box."""
    require_coco_eval()
    from faster_coco_eval import COCO, COCOeval_faster

    document, results = coco_documents(truth, detections, classes)
    if not results or not document["annotations"]:
        present = {a["category_id"] for a in document["annotations"] if not a["iscrowd"]}
        occurs = np.array([k + 1 in present for k in range(classes)])
        return np.broadcast_to(np.where(occurs, 0.0, -1.0), (10, 101, classes))
    truths = COCO(document)
    evaluator = COCOeval_faster(truths, truths.loadRes(results), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"], dtype=np.float64)[:, :, :, 0, -1]


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # recall and precision after each detection, best first


def voc_curve(truth: Sequence[AnnotatedImage], detections: Sequence[Detections], label: int) -> Curve | None:
    """Recall and precision of one class at IoU .5; None if it has no box.

    As in VOC's devkit, a second hit of a box is wrong, and a difficult box is neither right nor wrong.
    """
    from torchvision.ops import box_iou

    hits: list[tuple[float, bool]] = []
    total = 0
    for image, predicted in zip(truth, detections, strict=True):
        true, found = image.labels == label, predicted.labels == label
        boxes, ignored = image.boxes[true], image.ignored[true]
        total += int((~ignored).sum())
        matched = torch.zeros(len(boxes), dtype=torch.bool)
        overlaps = box_iou(predicted.boxes[found].double(), boxes.double())  # (detections, boxes)
        scores = predicted.scores[found]
        for d in scores.argsort(descending=True, stable=True).tolist():
            best = int(overlaps[d].argmax()) if len(boxes) else -1
            if best < 0 or overlaps[d, best] < 0.5:
                hits.append((float(scores[d]), False))
            elif not ignored[best]:
                hits.append((float(scores[d]), not bool(matched[best])))
                matched[best] = True
    if not total:
        return None
    hits.sort(key=lambda hit: -hit[0])
    right = np.cumsum([hit for _, hit in hits], dtype=np.float64)
    return right / total, right / np.arange(1, len(hits) + 1)


def voc_ap(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Area under the curve with monotonically decreasing precision (since VOC 2010)."""
    steps = np.concatenate(([0.0], recall))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(((steps[1:] - steps[:-1]) * envelope).sum())


def voc07_ap(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Mean over 11 recalls r = 0, .1, …, 1 of the best precision at recall r or more (VOC 2007)."""
    return float(np.mean([precision[recall >= r - 1e-12].max(initial=0.0) for r in np.linspace(0, 1, 11)]))
