"""What a detector says of pictures: as torchvision's, or with the 2015 paper's additions to the answer (appendix B).

box refinement   each region is pooled again from the box that was regressed from it; both sets are judged together
box voting       each box that is left is the mean of those it stood for, weighted by their scores
multi-scale      regions are pooled from two adjacent scales, and the larger of each feature is kept (maxout)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image

from residuum.models.dense import Regions
from residuum.models.values import Additions

NMS = 0.3  # of a refined union (2015, appendix B)
VOTES = 0.5  # IoU of the boxes that vote


@dataclass(frozen=True)
class Scale:
    """One picture at one scale: its maps, and (h, w) in that scale's pixels."""

    maps: dict[str, Tensor]
    size: tuple[int, int]


def detect(net: FasterRCNN, picture: Tensor, testing: Additions) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (n, 4) in the picture's own pixels, scores (n,) and labels (n,), 1 for the first class; best first.

    Args:
        net: in eval mode; the caller sees to inference mode and precision.
        picture: float (3, H, W) in [0, 1].
    """
    if testing == Additions():
        said = net([picture])[0]
        return said["boxes"], said["scores"], said["labels"]
    regions = cast(Regions, net.roi_heads)
    base, proposals = _proposals(net, picture)
    scales = [_scale(net, picture, side) for side in testing.sides] or [base]
    boxes, scores = _answers(net, regions, proposals, base.size, scales)
    if testing.refine:
        best = scores[:, 1:].argmax(1) + 1
        again = boxes[torch.arange(len(boxes)), best]
        again = again[((again[:, 2:] - again[:, :2]) > 1e-2).all(1)]
        more, their = _answers(net, regions, again, base.size, scales)
        boxes, scores = torch.cat([boxes, more]), torch.cat([scores, their])
    found = _kept(regions, boxes, scores, testing.refine)
    h, w = picture.shape[-2:]
    return resize_boxes(found[0], list(base.size), [h, w]), found[1], found[2]


def _proposals(net: FasterRCNN, picture: Tensor) -> tuple[Scale, Tensor]:
    """The picture at the network's own scale, and the boxes proposed there, (N, 4)."""
    images, _ = net.transform([picture])
    maps = _maps(net, images.tensors)
    proposals, _ = net.rpn(images, maps)
    return Scale(maps, images.image_sizes[0]), proposals[0]


def _maps(net: FasterRCNN, x: Tensor) -> dict[str, Tensor]:
    return cast(dict[str, Tensor], net.backbone(x))


def _scale(net: FasterRCNN, picture: Tensor, side: int) -> Scale:
    """The picture with its shorter side of so many pixels, the longer one in proportion."""
    transform = net.transform
    kept = transform.min_size, transform.max_size
    transform.min_size, transform.max_size = (side,), 100_000
    try:
        images, _ = transform([picture])
    finally:
        transform.min_size, transform.max_size = kept
    return Scale(_maps(net, images.tensors), images.image_sizes[0])


def _answers(
    net: FasterRCNN, regions: Regions, boxes: Tensor, size: tuple[int, int], scales: Sequence[Scale]
) -> tuple[Tensor, Tensor]:
    """What the second stage makes of boxes: (N, 1 + classes, 4), inside the picture, and scores (N, 1 + classes)."""
    features = torch.stack(
        [regions.describe(s.maps, [resize_boxes(boxes, list(size), list(s.size))], [s.size]) for s in scales]
    )  # (scales, N, F)
    if len(scales) > 1:
        first = adjacent(boxes, size, scales, net.transform.min_size[-1])
        rows = torch.arange(len(boxes))
        features = torch.maximum(features[first, rows], features[first + 1, rows])
    logits, regression = regions.predict(features.reshape(-1, features.shape[-1]))
    decoded = regions.box_coder.decode(regression, [boxes])  # (N, 1 + classes, 4)
    return clip_boxes_to_image(decoded, size), logits.softmax(-1)


def adjacent(boxes: Tensor, size: tuple[int, int], scales: Sequence[Scale], own: int) -> Tensor:
    """For each box the first of the two adjacent scales, int64 (N,), that bring it nearest to 224 pixels on a side.

    224 of a picture whose shorter side is 600, as where the paper trains; in proportion for a network of another size.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1e-6).prod(1).sqrt()  # (N,)
    factors = torch.tensor([s.size[0] / size[0] for s in scales], device=boxes.device)  # (scales,)
    distance = (sides[:, None] * factors / (224 * own / 600)).log().abs()  # (N, scales)
    return (distance[:, :-1] + distance[:, 1:]).argmin(1)


def _kept(regions: Regions, boxes: Tensor, scores: Tensor, vote: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression within each class, and voting where boxes were refined."""
    classes = scores.shape[1]
    labels = torch.arange(classes, device=scores.device).expand_as(scores)[:, 1:].reshape(-1)
    flat, values = boxes[:, 1:].reshape(-1, 4), scores[:, 1:].reshape(-1)
    likely = (values > regions.score_thresh) & ((flat[:, 2:] - flat[:, :2]) >= 1e-2).all(1)
    flat, values, labels = flat[likely], values[likely], labels[likely]
    keep = batched_nms(flat, values, labels, NMS if vote else regions.nms_thresh)[: regions.detections_per_img]
    kept = flat[keep]
    if vote:
        agreeing = (box_iou(kept, flat) >= VOTES) & (labels[keep][:, None] == labels)  # (kept, all)
        weights = agreeing * values
        kept = weights @ flat / weights.sum(1, keepdim=True)
    return kept, values[keep], labels[keep]
