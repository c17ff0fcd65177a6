"""torchvision's detectors and segmenters on our backbones. Importing this imports torchvision, so it is done where it is used.

fpn   C2…C5 -> feature pyramid P2…P6 -> RPN; regions of 7x7 from P2…P5 -> two fully connected layers
c4    C4 (2015, appendix A: conv1 to conv4 shared) -> RPN; regions of 14x14 from C4 -> conv5 and its average for each
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
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.ops.poolers import initLevelMapper

from residuum.errors import UsageError
from residuum.models.backbone import Backbone, dilate, fix_bn, freeze, levels
from residuum.models.resnet import ResNet
from residuum.models.values import Dense, Detector, Segmenter
from residuum.runtime import seed_for

SHAPES = (0.5, 1.0, 2.0)  # of anchors, height to width
REGION = 1024  # features of a region under the form "fpn"
PROPOSALS = {
    "fpn": 1000,
    "c4": 300,
}  # of a picture when testing: torchvision's number, and the paper's (conv5 runs on each)


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
    """The last stage as the head of each region: (N, C4, 14, 14) -> (N, C5), 2015, appendix A."""

    def __init__(self, net: ResNet) -> None:
        """Takes the stage out of the network, so that it is there once."""
        super().__init__()
        last = len(net.spec.depths)
        self.stage, self.norm = net.get_submodule(f"layer{last}"), net.bn_last
        self.activated = net.spec.order == "original"
        delattr(net, f"layer{last}")
        net.bn_last = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(x)
        if self.norm is not None:
            x = self.norm(x)
        return (x if self.activated else F.relu(x)).mean((2, 3))


class Proposer(RPNHead):  # type: ignore[misc]
    """torchvision's, answering in full precision: bf16 would round boxes to whole pixels."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, boxes = super().forward(x)
        return [s.float() for s in scores], [b.float() for b in boxes]


class Regions(RoIHeads):  # type: ignore[misc]
    """torchvision's, with the error of its classes among the losses, and global context where it is asked for."""

    context: bool

    @staticmethod
    def of(made: RoIHeads, context: bool) -> Regions:
        """The same parts and values."""
        matcher, sampler = made.proposal_matcher, made.fg_bg_sampler
        regions = Regions(
            made.box_roi_pool,
            made.box_head,
            made.box_predictor,
            matcher.high_threshold,
            matcher.low_threshold,
            sampler.batch_size_per_image,
            sampler.positive_fraction,
            made.box_coder.weights,
            made.score_thresh,
            made.nms_thresh,
            made.detections_per_img,
        )
        regions.context = context
        return regions

    def describe(self, maps: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """The features of each box, (N, F); under global context (N, 2F), the whole picture's beside each box's own."""
        x = self.box_head(self.box_roi_pool(maps, boxes, sizes))
        if self.context:
            whole = [b.new_tensor([[0, 0, w, h]]) for b, (h, w) in zip(boxes, sizes, strict=True)]
            pictures = self.box_head(self.box_roi_pool(maps, whole, sizes))  # (B, F)
            counts = torch.tensor([len(b) for b in boxes], device=x.device)
            x = torch.cat([x, pictures.repeat_interleave(counts, 0)], 1)
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
            logits, regression = self.predict(self.describe(features, proposals, image_shapes))
            found = self.postprocess_detections(logits, regression, proposals, image_shapes)
            return [{"boxes": b, "scores": s, "labels": c} for b, s, c in zip(*found, strict=True)], {}
        proposals, _, labels, aims = self.select_training_samples(proposals, targets)
        logits, regression = self.predict(self.describe(features, proposals, image_shapes))
        classes, boxes = fastrcnn_loss(logits, regression, labels, aims)
        wrong = (logits.detach().argmax(1) != torch.cat(labels)).float().mean()
        return [], {"loss_classifier": classes, "loss_box_reg": boxes, "error": wrong}


def detector(
    net: ResNet, values: Detector, classes: int, *, sides: tuple[int, ...] = (), regions: int = 512, seed: int = 0
) -> FasterRCNN:
    """A Faster R-CNN of so many classes, background not counted, on a classifier's network, which it takes over.

    Args:
        sides: training draws the shorter side of each picture among these and `values.size`; 2015 has one.
        regions: of each picture that the second stage trains on; a quarter of them may show an object.
        seed: of the heads' first values, which are torchvision's.

    Raises:
        UsageError: a network without four stages and three channels.
    """
    if len(net.spec.depths) != 4 or net.spec.channels != 3:
        raise UsageError("a detector needs a network of four stages and three channels, such as resnet18 or resnet50.")
    channels, strides = levels(net)["C5"].channels, [level.stride for level in levels(net).values()]
    _settle(net, values)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed_for(seed, "heads"))
        if values.form == "fpn":
            backbone: nn.Module = Pyramid(net, values.pyramid)
            head: nn.Module = TwoMLPHead(values.pyramid * 7 * 7, REGION)
            pool = pooling(strides[1:], 7)
            sizes: tuple[tuple[int, ...], ...]
            sizes, features, width = tuple((side,) for side in values.anchors), REGION, values.pyramid
        else:
            backbone = Backbone(net, {"C4": "0"})
            head = Conv5(net)
            pool = pooling(strides[-2:-1], 14)
            sizes, features, width = (values.anchors,), channels, backbone.out_channels
        anchors = AnchorGenerator(sizes, (SHAPES,) * len(sizes))
        predictor = FastRCNNPredictor(features * (2 if values.context else 1), classes + 1)
        model = FasterRCNN(
            backbone,
            min_size=(*sides, values.size),
            max_size=values.longest,
            image_mean=list(values.mean),
            image_std=list(values.std),
            rpn_anchor_generator=anchors,
            rpn_head=Proposer(width, anchors.num_anchors_per_location()[0]),
            box_roi_pool=pool,
            box_head=head,
            box_predictor=predictor,
            box_batch_size_per_image=regions,
            rpn_post_nms_top_n_test=PROPOSALS[values.form],
        )
    model.roi_heads = Regions.of(model.roi_heads, values.context)
    return model


def pooling(strides: Sequence[int], size: int) -> MultiScaleRoIAlign:
    """torchvision's pooling of regions, told the maps' strides.

    Else it guesses them from the first pictures that it sees, and keeps that: wrongly where the padding is large, and
    differently after a resume.
    """
    pool = MultiScaleRoIAlign([str(i) for i in range(len(strides))], output_size=size, sampling_ratio=2)
    pool.scales = [1 / stride for stride in strides]
    pool.map_levels = initLevelMapper(int(math.log2(strides[0])), int(math.log2(strides[-1])))
    return pool


def _settle(net: ResNet, values: Dense) -> None:
    """Takes the classifier off; frozen stages and BN as the values say."""
    net.fc = cast(nn.Linear, nn.Identity())
    if values.frozen:
        freeze(net, values.frozen)
    if values.bn == "fixed":
        fix_bn(net)


class Segments(nn.Module):
    """Pictures, uint8 (B, H, W, 3) -> logits (B, classes, H, W), by torchvision's FCN or DeepLabV3 head on the last map."""

    scale: Tensor
    shift: Tensor

    def __init__(self, net: ResNet, values: Segmenter, classes: int, seed: int = 0) -> None:
        """Takes the classifier's network over; `classes` counts the background. Raises UsageError as `dilate` does."""
        super().__init__()
        dilate(net, values.output_stride)
        _settle(net, values)
        deepest = list(levels(net).values())[-1]
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_for(seed, "heads"))
            head = {"fcn": FCNHead, "deeplab": DeepLabHead}[values.head](deepest.channels, classes)
        self.backbone = Backbone(net, {deepest.name: "out"})
        self.classifier = head
        deviation = torch.tensor(values.std)
        self.register_buffer("scale", 1 / (255 * deviation), persistent=False)
        self.register_buffer("shift", torch.tensor(values.mean) / deviation, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels * self.scale - self.shift).permute(0, 3, 1, 2)  # (B, 3, H, W) in channels-last memory
        x = self.classifier(self.backbone(x)["out"]).float()  # (B, classes, h, w)
        return F.interpolate(x, size=pixels.shape[1:3], mode="bilinear", align_corners=False)
