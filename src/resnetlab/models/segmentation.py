"""torchvision's segmentation heads on our backbones. Importing this module imports torchvision, so do it where it is used."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from resnetlab.models.backbone import Backbone, dilate, levels, prepare_backbone
from resnetlab.models.head_spec import SegmenterSpec
from resnetlab.models.resnet import ResNet
from resnetlab.random import seed_for

HEAD_TYPES = {"fcn": FCNHead, "deeplab": DeepLabHead}


class SegmentationNet(nn.Module):
    """Images, uint8 (B, H, W, 3) -> logits (B, classes, H, W), by torchvision's FCN or DeepLabV3 head on the last map."""

    scale: Tensor
    shift: Tensor

    def __init__(self, net: ResNet, spec: SegmenterSpec, classes: int, seed: int = 0) -> None:
        """Makes the classifier's network part of it; `classes` includes the background. Raises UsageError as `dilate` does."""
        super().__init__()
        dilate(net, spec.output_stride)
        prepare_backbone(net, spec.frozen, spec.bn)
        deepest = list(levels(net).values())[-1]
        with torch.random.fork_rng([]):
            torch.manual_seed(seed_for(seed, "heads"))
            head = HEAD_TYPES[spec.head](deepest.channels, classes)
        self.backbone = Backbone(net, {deepest.name: "out"})
        self.classifier = head
        std = torch.tensor(spec.std)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", torch.tensor(spec.mean) / std, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels * self.scale - self.shift).permute(0, 3, 1, 2)  # (B, 3, H, W) in channels-last memory
        x = self.classifier(self.backbone(x)["out"]).float()  # (B, classes, h, w)
        return F.interpolate(x, size=pixels.shape[1:3], mode="bilinear", align_corners=False)
