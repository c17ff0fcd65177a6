"""How well boxes are found: COCO's mean average precision (by its evaluator) and Pascal VOC's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from residuum.data.annotated import Annotated
from residuum.errors import UsageError


class Found(NamedTuple):
    """What a detector says of one picture, best first: boxes (n, 4) in its pixels, scores (n,), labels (n,); all on the CPU."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def at_least(self, score: float) -> Found:
        """Those of at least a score."""
        return Found(*(part[self.scores >= score] for part in self))


@dataclass(frozen=True, eq=False)
class BoxJudgement:
    """Figures of a detector on a split; fractions, None for a class without a box in it.

    Attributes:
        ap, ap_50: of each class: at IoU thresholds .5 to .95 (mean) and at .5 (COCO).
        voc, voc07: of each class, at IoU .5: area under the curve (VOC 2010 on), mean at 11 recalls (VOC 2007).
        precision: of each class, at IoU .5 and 101 recalls from 0 to 1, float64 (classes, 101); nan for a class without a box.
        truth, found: what was judged.
    """

    classes: tuple[str, ...]
    ap: list[float | None]
    ap_50: list[float | None]
    voc: list[float | None]
    voc07: list[float | None]
    precision: NDArray[np.float64]
    truth: Sequence[Annotated]
    found: Sequence[Found]

    @property
    def map(self) -> float:
        """Mean over the classes that occur of `ap`: COCO's mAP@[.5:.95]."""
        return _mean(self.ap)

    @property
    def map_50(self) -> float:
        """Mean over the classes that occur of `ap_50`."""
        return _mean(self.ap_50)

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        counts = [sum(int(((p.labels == i) & ~p.ignored).sum()) for p in self.truth) for i in range(len(self.classes))]
        rows = zip(self.classes, counts, self.ap, self.ap_50, self.voc, self.voc07, strict=True)
        keys = ("class", "n", "ap", "ap_50", "voc_ap", "voc07_ap")
        return {
            "map": self.map,
            "map_50": self.map_50,
            "voc_map": _mean(self.voc),
            "voc07_map": _mean(self.voc07),
            "n": len(self.truth),
            "boxes": sum(counts),
            "per_class": [dict(zip(keys, row, strict=True)) for row in rows],
        }


def _mean(values: Sequence[float | None]) -> float:
    """Over those that are there; 0 where none is."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else 0.0


def needed() -> None:
    """Raises UsageError where the extra that counts mAP is not installed, before any work is done."""
    from importlib.util import find_spec

    if find_spec("faster_coco_eval") is None:
        raise UsageError(
            "boxes are judged by faster-coco-eval, which is not installed: pip install 'residuum[detect]'."
        )


def judge(truth: Sequence[Annotated], found: Sequence[Found], classes: tuple[str, ...]) -> BoxJudgement:
    """Judges what was found in each picture of `truth`; raises UsageError where the extra "detect" is not installed."""
    precision = coco_precision(truth, found, len(classes))  # (10, 101, classes); -1 where a class has no box
    ap, ap_50 = ([_none(precision[t, :, k]) for k in range(len(classes))] for t in (slice(None), 0))
    curves = [voc_curve(truth, found, k) for k in range(len(classes))]
    return BoxJudgement(
        classes=classes,
        ap=ap,
        ap_50=ap_50,
        voc=[None if c is None else voc_ap(*c) for c in curves],
        voc07=[None if c is None else voc07_ap(*c) for c in curves],
        precision=np.where(precision[0].T < 0, np.nan, precision[0].T),
        truth=truth,
        found=found,
    )


def _none(values: NDArray[np.float64]) -> float | None:
    return None if (values < 0).all() else float(values.mean())


def coco_documents(
    truth: Sequence[Annotated], found: Sequence[Found], classes: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Truth and detections in COCO's form; what is ignored is a crowd there."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for i, (picture, said) in enumerate(zip(truth, found, strict=True), 1):
        images.append({"id": i, "height": picture.size[0], "width": picture.size[1]})
        for box, label, ignored in zip(picture.boxes, picture.labels.tolist(), picture.ignored.tolist(), strict=True):
            bbox = _xywh(box)
            annotations.append(
                {"id": len(annotations) + 1, "image_id": i, "category_id": label + 1, "bbox": bbox,
                 "area": bbox[2] * bbox[3], "iscrowd": int(ignored)}
            )  # fmt: skip
        for box, score, label in zip(said.boxes, said.scores.tolist(), said.labels.tolist(), strict=True):
            results.append({"image_id": i, "category_id": label + 1, "bbox": _xywh(box), "score": score})
    categories = [{"id": k + 1, "name": str(k + 1)} for k in range(classes)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}, results


def _xywh(box: Tensor) -> list[float]:
    x1, y1, x2, y2 = box.double().tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def coco_precision(truth: Sequence[Annotated], found: Sequence[Found], classes: int) -> NDArray[np.float64]:
    """Precision at IoU .5, .55, …, .95 and 101 recalls, 100 detections a picture at most; (10, 101, classes), -1 for no box."""
    needed()
    from faster_coco_eval import COCO, COCOeval_faster

    document, results = coco_documents(truth, found, classes)
    if not results or not document["annotations"]:
        present = {a["category_id"] for a in document["annotations"] if not a["iscrowd"]}
        known = np.array([k + 1 in present for k in range(classes)])
        return np.broadcast_to(np.where(known, 0.0, -1.0), (10, 101, classes))
    truths = COCO(document)
    evaluator = COCOeval_faster(truths, truths.loadRes(results), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    return np.asarray(evaluator.eval["precision"], dtype=np.float64)[:, :, :, 0, -1]


Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # recall and precision after each detection, best first


def voc_curve(truth: Sequence[Annotated], found: Sequence[Found], label: int) -> Curve | None:
    """Recall and precision of one class at IoU .5; None where it has no box.

    As VOC's devkit counts: a second hit of a box is wrong, a difficult box is neither right nor wrong.
    """
    from torchvision.ops import box_iou

    hits: list[tuple[float, bool]] = []
    total = 0
    for picture, said in zip(truth, found, strict=True):
        own, mine = picture.labels == label, said.labels == label
        boxes, ignored = picture.boxes[own], picture.ignored[own]
        total += int((~ignored).sum())
        taken = torch.zeros(len(boxes), dtype=torch.bool)
        overlaps = box_iou(said.boxes[mine].double(), boxes.double())  # (detections, boxes)
        scores = said.scores[mine]
        for d in scores.argsort(descending=True, stable=True).tolist():
            best = int(overlaps[d].argmax()) if len(boxes) else -1
            if best < 0 or overlaps[d, best] < 0.5:
                hits.append((float(scores[d]), False))
            elif not ignored[best]:
                hits.append((float(scores[d]), not bool(taken[best])))
                taken[best] = True
    if not total:
        return None
    hits.sort(key=lambda hit: -hit[0])
    right = np.cumsum([hit for _, hit in hits], dtype=np.float64)
    return right / total, right / np.arange(1, len(hits) + 1)


def voc_ap(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Area under the curve, precision made to fall (VOC 2010 on)."""
    steps = np.concatenate(([0.0], recall))
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float(((steps[1:] - steps[:-1]) * falling).sum())


def voc07_ap(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Mean of the best precision at recalls of at least 0, .1, …, 1 (VOC 2007)."""
    return float(np.mean([precision[recall >= r - 1e-12].max(initial=0.0) for r in np.linspace(0, 1, 11)]))
