"""torchvision's segmentation heads on our backbones. Importing this module imports torchvision, so do it where it is used."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPPPooling, DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from resnetlab.device import to_device
from resnetlab.models.backbone import Backbone, dilate, levels, prepare_backbone
from resnetlab.models.head_spec import SegmenterSpec
from resnetlab.models.resnet import ResNet
from resnetlab.random import seed_for

HEAD_TYPES = {"fcn": FCNHead, "deeplab": DeepLabHead}


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W) of a size, bilinear as by F.interpolate with align_corners=False.

    In training on a GPU as two products of matrices, since the gradient of torch's adds in no fixed order there.
    """
    if x.device.type != "cuda" or not torch.is_grad_enabled():
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)
    rows, columns = (_interpolation_matrix(n, m, x.device) for n, m in zip(x.shape[2:], size, strict=True))
    with torch.autocast("cuda", enabled=False):
        return (rows @ x.float() @ columns.T).to(x.dtype)


@lru_cache(maxsize=16)
def _interpolation_matrix(n: int, m: int, device: torch.device) -> Tensor:
    """float32 (m, n): the weights of n values in each of m interpolated ones."""
    units = torch.eye(n)[None]  # (1, n, n): in each channel one value is 1
    return to_device(F.interpolate(units, size=m, mode="linear", align_corners=False)[0].T.contiguous(), device)


class PooledFeatures(nn.Sequential):
    """torchvision's ASPPPooling, by our `upsample`: the mean of the map, at every position."""

    def forward(self, x: Tensor) -> Tensor:
        return upsample(cast(Tensor, super().forward(x)), x.shape[2:])  # type: ignore[no-untyped-call]


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
        for parent in [module for module in head.modules() if isinstance(module, nn.ModuleList)]:
            for i, module in enumerate(parent):
                if isinstance(module, ASPPPooling):
                    parent[i] = PooledFeatures(*module)
        self.backbone = Backbone(net, {deepest.name: "out"})
        self.classifier = head
        std = torch.tensor(spec.std)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", torch.tensor(spec.mean) / std, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = (pixels * self.scale - self.shift).permute(0, 3, 1, 2)  # (B, 3, H, W) in channels-last memory
        x = self.classifier(self.backbone(x)["out"]).float()  # (B, classes, h, w)
        return upsample(x, pixels.shape[1:3])
