"""Predictions of a detector: torchvision's, or with the 2015 paper's additions (appendix B).

box refinement   each region is pooled again from the box that was regressed from it; NMS sees the boxes of both rounds
box voting       each remaining box is the mean of the boxes that it overlaps, weighted by their scores
multi-scale      regions are pooled from two adjacent scales, and the larger of each feature is kept (maxout)
ensemble         the union of all networks' proposals is classified by each of them; scores and regressed boxes are averaged
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

from resnetlab.models.detection import RegionHeads
from resnetlab.models.head_spec import DetectionOptions

REFINED_NMS_IOU = 0.3  # of the boxes of both rounds (2015, appendix B)
VOTE_IOU = 0.5  # of the boxes that vote


@dataclass(frozen=True)
class ImageScale:
    """One image at one scale: its feature maps, and (h, w) in that scale's pixels."""

    maps: dict[str, Tensor]
    size: tuple[int, int]


def detect(nets: Sequence[FasterRCNN], image: Tensor, testing: DetectionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (n, 4) in the image's own pixels, scores (n,) and labels (n,), 1 for the first class; best first.

    Args:
        nets: one, or an ensemble with the same classes in the same order; in eval mode; the caller sets inference mode and
            precision. The thresholds of the last steps are those of the first.
        image: float (3, H, W) in [0, 1].
    """
    if len(nets) == 1 and testing == DetectionOptions():
        prediction = nets[0]([image])[0]
        return prediction["boxes"], prediction["scores"], prediction["labels"]
    bases, own_proposals = zip(*(_propose_boxes(net, image) for net in nets), strict=True)
    size = bases[0].size  # boxes are in the pixels of the first network's own scale
    proposals = torch.cat(
        [resize_boxes(p, list(b.size), list(size)) for b, p in zip(bases, own_proposals, strict=True)]
    )
    scales = [
        [_compute_scale(net, image, side) for side in testing.sides] or [base]
        for net, base in zip(nets, bases, strict=True)
    ]
    boxes, scores = _predict_regions(nets, proposals, size, scales)
    if testing.refine:
        best = scores[:, 1:].argmax(1) + 1
        refined = boxes[torch.arange(len(boxes)), best]
        refined = refined[((refined[:, 2:] - refined[:, :2]) > 1e-2).all(1)]
        refined_boxes, refined_scores = _predict_regions(nets, refined, size, scales)
        boxes, scores = torch.cat([boxes, refined_boxes]), torch.cat([scores, refined_scores])
    boxes, scores, labels = suppress_and_vote(cast(RegionHeads, nets[0].roi_heads), boxes, scores, testing.refine)
    h, w = image.shape[-2:]
    return resize_boxes(boxes, list(size), [h, w]), scores, labels


def _propose_boxes(net: FasterRCNN, image: Tensor) -> tuple[ImageScale, Tensor]:
    """The image at the network's own scale, and the boxes proposed there, (N, 4)."""
    images, _ = net.transform([image])
    maps = net.backbone(images.tensors)
    proposals, _ = net.rpn(images, maps)
    return ImageScale(maps, images.image_sizes[0]), proposals[0]


def _compute_scale(net: FasterRCNN, image: Tensor, side: int) -> ImageScale:
    """The image resized to a shorter side of `side` pixels."""
    transform = net.transform
    sizes = transform.min_size, transform.max_size
    transform.min_size, transform.max_size = (side,), 100_000
    try:
        images, _ = transform([image])
    finally:
        transform.min_size, transform.max_size = sizes
    return ImageScale(net.backbone(images.tensors), images.image_sizes[0])


def _predict_regions(
    nets: Sequence[FasterRCNN], boxes: Tensor, size: tuple[int, int], scales: Sequence[Sequence[ImageScale]]
) -> tuple[Tensor, Tensor]:
    """The second stage's boxes (N, 1 + classes, 4), clipped to the image, and scores (N, 1 + classes): means over networks."""
    each = [_predict_regions_of(net, boxes, size, own) for net, own in zip(nets, scales, strict=True)]
    all_boxes, all_scores = (torch.stack(part) for part in zip(*each, strict=True))
    return all_boxes.mean(0), all_scores.mean(0)


def _predict_regions_of(
    net: FasterRCNN, boxes: Tensor, size: tuple[int, int], scales: Sequence[ImageScale]
) -> tuple[Tensor, Tensor]:
    heads = cast(RegionHeads, net.roi_heads)
    scaled = [resize_boxes(boxes, list(size), list(s.size)) for s in scales]
    each = [heads.region_features(s.maps, [own], [s.size]) for s, own in zip(scales, scaled, strict=True)]
    features = torch.stack(each)  # (scales, N, F)
    if len(scales) > 1:
        first = adjacent_scales(boxes, size, scales, net.transform.min_size[-1])
        rows = torch.arange(len(boxes))
        features = torch.maximum(features[first, rows], features[first + 1, rows])
    logits, regression = heads.predict(features.reshape(-1, features.shape[-1]))
    decoded = heads.box_coder.decode(regression, [boxes])  # (N, 1 + classes, 4)
    return clip_boxes_to_image(decoded, size), logits.softmax(-1)


def adjacent_scales(boxes: Tensor, size: tuple[int, int], scales: Sequence[ImageScale], own: int) -> Tensor:
    """For each box the first of the two adjacent scales, int64 (N,), at which its side is nearest to 224 pixels.

    224 of an image whose shorter side is 600, as in the paper; in proportion for a network of another size (`own`).
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp_min(1e-6).prod(1).sqrt()  # (N,)
    factors = torch.tensor([s.size[0] / size[0] for s in scales], device=boxes.device)  # (scales,)
    distance = (sides[:, None] * factors / (224 * own / 600)).log().abs()  # (N, scales)
    return (distance[:, :-1] + distance[:, 1:]).argmin(1)


def suppress_and_vote(heads: RegionHeads, boxes: Tensor, scores: Tensor, vote: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression within each class, and box voting if `vote` is set."""
    classes = scores.shape[1]
    labels = torch.arange(classes, device=scores.device).expand_as(scores)[:, 1:].reshape(-1)
    flat, values = boxes[:, 1:].reshape(-1, 4), scores[:, 1:].reshape(-1)
    candidates = (values > heads.score_thresh) & ((flat[:, 2:] - flat[:, :2]) >= 1e-2).all(1)
    flat, values, labels = flat[candidates], values[candidates], labels[candidates]
    indices = batched_nms(flat, values, labels, REFINED_NMS_IOU if vote else heads.nms_thresh)
    indices = indices[: heads.detections_per_img]
    kept = flat[indices]
    if vote:
        agreeing = (box_iou(kept, flat) >= VOTE_IOU) & (labels[indices][:, None] == labels)  # (kept, all)
        weights = agreeing * values
        kept = weights @ flat / weights.sum(1, keepdim=True)
    return kept, values[indices], labels[indices]
