"""torchvision's Faster R-CNN on our backbones. Importing this module imports torchvision, so do it where it is used.

fpn   C2…C5 -> feature pyramid P2…P6 -> RPN; regions of 7x7 from P2…P5 -> two fully connected layers
c4    C4 (2015, appendix A: conv1 to conv4 shared) -> RPN; regions of 14x14 from C4 -> conv5 and average pooling of each
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from resnetlab.device import to_device
from resnetlab.errors import UsageError
from resnetlab.models.backbone import Backbone, levels, prepare_backbone
from resnetlab.models.head_spec import DetectorSpec
from resnetlab.models.resnet import ResNet
from resnetlab.random import seed_for

ASPECT_RATIOS = (0.5, 1.0, 2.0)  # of anchors, height to width
REGION_FEATURES = 1024  # of a region in the form "fpn"
# Proposals per image at test time: torchvision's number, and the paper's (conv5 runs on each).
PROPOSALS = {"fpn": 1000, "c4": 300}


class Pyramid(nn.Module):
    """C2…C5 and a feature pyramid over them, as torchvision's BackboneWithFPN."""

    def __init__(self, net: ResNet, width: int) -> None:
        super().__init__()
        self.body = Backbone(net, {f"C{i + 2}": str(i) for i in range(4)})
        self.fpn = FeaturePyramidNetwork(self.body.channels, width, LastLevelMaxPool())
        self.out_channels = width

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], self.fpn(self.body(x)))


class Conv5(nn.Module):
    """The last stage as the head of each region (2015, appendix A): (N, C4, 14, 14) -> (N, C5)."""

    def __init__(self, net: ResNet) -> None:
        """Moves the stage out of the network, so that its weights exist once."""
        super().__init__()
        last = len(net.spec.depths)
        self.stage, self.norm = net.get_submodule(f"layer{last}"), net.bn_last
        self.ends_in_relu = net.spec.activation_order == "original"
        delattr(net, f"layer{last}")
        net.bn_last = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(x)
        if self.norm is not None:
            x = self.norm(x)
        return (x if self.ends_in_relu else F.relu(x)).mean((2, 3))


class ProposalHead(RPNHead):  # type: ignore[misc]
    """torchvision's, with float32 outputs: bf16 would round boxes to whole pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, boxes = super().forward(x)
        return [s.float() for s in scores], [b.float() for b in boxes]


class RegionHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's, with the classification error among the losses, and with global context if `context` is set."""

    context: bool

    def region_features(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """The features of each box, (N, F); with global context (N, 2F), the box's own and the whole image's."""
        x = self.box_head(self.box_roi_pool(maps, boxes, sizes))
        if self.context:
            corners = [torch.tensor([[0, 0, w, h]], dtype=b.dtype) for b, (h, w) in zip(boxes, sizes, strict=True)]
            whole_image = [to_device(corner, x.device) for corner in corners]
            images = self.box_head(self.box_roi_pool(maps, whole_image, sizes))  # (B, F)
            counts = to_device(torch.tensor([len(b) for b in boxes]), x.device)
            x = torch.cat([x, images.repeat_interleave(counts, 0, output_size=len(x))], 1)  # without waiting for a GPU
        return cast(Tensor, x)

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, F) -> logits (N, 1 + classes), background first, and box regression (N, 4 (1 + classes))."""
        logits, regression = self.box_predictor(features)
        return logits.float(), regression.float()

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            logits, regression = self.predict(self.region_features(features, proposals, image_shapes))
            detections = self.postprocess_detections(logits, regression, proposals, image_shapes)
            return [{"boxes": b, "scores": s, "labels": c} for b, s, c in zip(*detections, strict=True)], {}
        proposals, _, labels, box_targets = self.select_training_samples(proposals, targets)
        logits, regression = self.predict(self.region_features(features, proposals, image_shapes))
        classes, boxes = fastrcnn_loss(logits, regression, labels, box_targets)
        wrong = (logits.detach().argmax(1) != torch.cat(labels)).float().mean()
        return [], {"loss_classifier": classes, "loss_box_reg": boxes, "error": wrong}


def build_detector(
    net: ResNet, spec: DetectorSpec, classes: int, *, sides: tuple[int, ...] = (), regions: int = 512, seed: int = 0
) -> FasterRCNN:
    """Builds a Faster R-CNN on a classifier's network, which becomes part of it; `classes` excludes the background.

    Args:
        sides: training draws the shorter side of each image from these and `spec.image_size`; 2015 has one.
        regions: regions of each image that the second stage trains on; at most a quarter of them show an object.
        seed: of the heads' initialisation, which is torchvision's.

    Raises:
        UsageError: the network does not have four stages and three channels.
    """
    if len(net.spec.depths) != 4 or net.spec.channels != 3:
        raise UsageError("a detector needs a network of four stages and three channels, such as resnet18 or resnet50.")
    channels, strides = levels(net)["C5"].channels, [level.stride for level in levels(net).values()]
    prepare_backbone(net, spec.frozen, spec.bn)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed_for(seed, "heads"))
        if spec.form == "fpn":
            backbone: nn.Module = Pyramid(net, spec.pyramid)
            head: nn.Module = TwoMLPHead(spec.pyramid * 7 * 7, REGION_FEATURES)
            pool = build_roi_pool(strides[1:], 7)
            sizes: tuple[tuple[int, ...], ...]
            sizes, features, width = tuple((side,) for side in spec.anchors), REGION_FEATURES, spec.pyramid
        else:
            backbone = Backbone(net, {"C4": "0"})
            head = Conv5(net)
            pool = build_roi_pool(strides[-2:-1], 14)
            sizes, features, width = (spec.anchors,), channels, backbone.out_channels
        anchors = AnchorGenerator(sizes, (ASPECT_RATIOS,) * len(sizes))
        predictor = FastRCNNPredictor(features * (2 if spec.context else 1), classes + 1)
        model = FasterRCNN(
            backbone,
            min_size=(*sides, spec.image_size),
            max_size=spec.longest,
            image_mean=list(spec.mean),
            image_std=list(spec.std),
            rpn_anchor_generator=anchors,
            rpn_head=ProposalHead(width, anchors.num_anchors_per_location()[0]),
            box_roi_pool=pool,
            box_head=head,
            box_predictor=predictor,
            box_batch_size_per_image=regions,
            rpn_post_nms_top_n_test=PROPOSALS[spec.form],
        )
    model.roi_heads.__class__ = RegionHeads  # which FasterRCNN cannot be told to make
    model.roi_heads.context = spec.context
    return model


def reorder_classes(net: FasterRCNN, order: Sequence[int]) -> None:
    """Makes class i of a detector the one that was `order[i]`, 0 for the first after the background, in place."""
    predictor = cast(FastRCNNPredictor, net.roi_heads.box_predictor)
    indices = torch.tensor([0, *(i + 1 for i in order)])
    with torch.no_grad():
        for layer in (predictor.cls_score, predictor.bbox_pred):
            for value in (layer.weight, layer.bias):
                rows = value.reshape(len(indices), -1, *value.shape[1:])  # (1 + classes, 1 or 4, …)
                value.copy_(rows[indices.to(value.device)].reshape(value.shape))


def build_roi_pool(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """torchvision's region pooling with given map strides.

    Without them it infers the strides from the first images that it sees and keeps them: wrong where the padding is large, and
    different after a resume.
    """
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], output_size=size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool
