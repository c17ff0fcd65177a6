"""Heat maps: where in an image the evidence for a class is (Grad-CAM), and overlays of such maps on images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.device import DeviceConfig, eval_mode, to_device
from resnetlab.evaluation.figures import find_mistakes, pil_image_uri
from resnetlab.evaluation.metrics import ClassificationMetrics
from resnetlab.models.resnet import ResNet
from resnetlab.preprocessing import Preprocessing, render_pixels

MIN_SIDE = 256  # pixels of an overlay; smaller images are enlarged, without smoothing
MAX_OPACITY = 0.72  # of the heat where it is highest
# From no evidence to the most; dark to light as well, so that it can be read without seeing colours.
COLOURS = ((30, 18, 72), (102, 28, 122), (190, 55, 92), (241, 124, 40), (253, 231, 110))


def grad_cam(net: ResNet, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes where the evidence for a class is (Selvaraju et al. 2017, arXiv 1610.02391, §3).

    The layer is the last map before pooling, the deepest one with positions. Only the average over positions and the fully
    connected layer follow, so the gradient of a logit needs no backward pass: it is fc's row of that class over h·w.

    Args:
        x: normalised images, (B, C, H, W); no gradient is needed.
        classes: int64 (B,), the class to explain; None for the one with the highest logit.

    Returns:
        The maps, float32 (B, h, w) in [0, 1], each with its maximum at 1, or all 0 where there is no evidence for the class;
        and the logits, float32 (B, classes).
    """
    last = net.forward_features(x)  # (B, C, h, w)
    logits = net.fc(last.mean((2, 3)))
    rows = net.fc.weight[logits.argmax(1) if classes is None else classes]  # (B, C)
    maps = torch.einsum("bc,bchw->bhw", rows.float(), last.float()).relu()
    highest = maps.amax((1, 2), keepdim=True)
    return maps / highest.clamp_min(torch.finfo(torch.float32).tiny), logits.float()


def draw_overlay(pixels: Tensor, heat: Tensor) -> Image.Image:
    """A heat map in [0, 1] (h', w') over its image (h, w, C), as RGB of at least MIN_SIDE pixels on its shorter side.

    The image is drawn in grey (of more than three channels or 8 bits as `render_pixels` shows it), so every colour is heat.
    """
    grey = render_pixels(pixels).convert("L")
    factor = -(-MIN_SIDE // min(grey.size))
    size = (grey.width * factor, grey.height * factor)
    grey = grey.resize(size, Image.Resampling.NEAREST)
    alpha = Image.fromarray((heat.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    alpha = alpha.resize(size, Image.Resampling.BICUBIC)
    colours = Image.merge("RGB", [alpha.point(channel) for channel in _palette().tolist()])
    return Image.composite(colours, grey.convert("RGB"), alpha.point([round(MAX_OPACITY * v) for v in range(256)]))


def _palette() -> Tensor:
    """256 colours, straight lines between COLOURS; uint8 (3, 256)."""
    stops = torch.tensor(COLOURS, dtype=torch.float32).T[None]  # (1, 3, stops)
    lines = torch.nn.functional.interpolate(stops, size=256, mode="linear", align_corners=True)
    return lines[0].round().to(torch.uint8)


@dataclass(frozen=True)
class CamOverlay:
    """An image with the heat map of its predicted class."""

    index: int  # position in the split, from 0
    true: str
    predicted: str
    uri: str  # the overlay, as a data URI

    @property
    def correct(self) -> bool:
        return self.true == self.predicted


def make_cam_overlays(
    net: ResNet,
    metrics: ClassificationMetrics,
    images: PreprocessedSplit,
    preprocessing: Preprocessing,
    device_config: DeviceConfig,
    limit: int,
) -> list[CamOverlay]:
    """Overlays of some evaluated images: `limit` correct ones, then `limit` wrong ones.

    The correct ones are the first of each class, so none is picked by appearance; the wrong ones are the most confident.

    Args:
        images: the split's images as the network gets them, in the order of the metrics.
    """
    predicted, firsts = metrics.predicted, dict[int, int]()
    for i in metrics.right.nonzero().flatten().tolist():
        firsts.setdefault(int(metrics.labels[i]), i)
    chosen = [*list(firsts.values())[:limit], *find_mistakes(metrics, limit)]
    if not chosen:
        return []
    pixels = torch.stack([images[i] for i in chosen])  # (B, h, w, C)
    with eval_mode(net), device_config.autocast():
        x = preprocessing.normalise(to_device(pixels, device_config.device))
        heat, _ = grad_cam(net, x, to_device(predicted[chosen], device_config.device))
    return [
        CamOverlay(
            index=i,
            true=metrics.classes[int(metrics.labels[i])],
            predicted=metrics.classes[int(predicted[i])],
            uri=pil_image_uri(draw_overlay(image, heat_map)),
        )
        for i, image, heat_map in zip(chosen, pixels, heat.float().cpu(), strict=True)
    ]
