"""Heat maps: where in a picture a network saw what speaks for a class (Grad-CAM), and how such a map is shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from residuum.data.reading import Views
from residuum.evaluation.figures import drawn_uri
from residuum.evaluation.metrics import Judgement
from residuum.models.resnet import ResNet
from residuum.preprocessing import Preprocessing, picture_of
from residuum.runtime import Engine, evaluating, to_device

SMALLEST = 256  # pixels on a side of what is shown; smaller pictures are enlarged, in hard pixels
STRONGEST = 0.72  # how much of the picture the hottest place covers
# From no evidence to most of it; dark to light as well, so that it can be read without seeing colours.
COLOURS = ((30, 18, 72), (102, 28, 122), (190, 55, 92), (241, 124, 40), (253, 231, 110))


def grad_cam(net: ResNet, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Where the evidence for a class lies (Selvaraju et al. 2017, arXiv 1610.02391, §3).

    The layer is the last map before pooling, the deepest one that still knows places. After it stand only the average over
    places and the fully connected layer, so the gradient of a logit is known without going backwards: fc's row of that class
    over h·w, everywhere.

    Args:
        x: normalised pictures, (B, C, H, W); no gradient is needed.
        classes: int64 (B,), which class is asked about; the one with the highest logit where None.

    Returns:
        The maps, float32 (B, h, w) in [0, 1], each with its highest place at 1, or 0 throughout where nothing speaks for the
        class; and the logits, float32 (B, classes).
    """
    last = net.last_map(x)  # (B, C, h, w)
    logits = net.fc(last.mean((2, 3)))
    rows = net.fc.weight[logits.argmax(1) if classes is None else classes]  # (B, C)
    maps = torch.einsum("bc,bchw->bhw", rows.float(), last.float()).relu()
    highest = maps.amax((1, 2), keepdim=True)
    return maps / highest.clamp_min(torch.finfo(torch.float32).tiny), logits.float()


def overlay(pixels: Tensor, heat: Tensor) -> Image.Image:
    """A heat map in [0, 1] (h', w') over its picture, uint8 (h, w, C), as RGB of at least SMALLEST pixels on its shorter side.

    The picture is drawn in grey, so that every colour is heat.
    """
    grey = picture_of(pixels).convert("L")
    factor = -(-SMALLEST // min(grey.size))
    size = (grey.width * factor, grey.height * factor)
    grey = grey.resize(size, Image.Resampling.NEAREST)
    alpha = Image.fromarray((heat.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    alpha = alpha.resize(size, Image.Resampling.BICUBIC)
    colours = Image.merge("RGB", [alpha.point(channel) for channel in _palette().tolist()])
    return Image.composite(colours, grey.convert("RGB"), alpha.point([round(STRONGEST * v) for v in range(256)]))


def _palette() -> Tensor:
    """256 colours, straight lines between COLOURS; uint8 (3, 256)."""
    stops = torch.tensor(COLOURS, dtype=torch.float32).T[None]  # (1, 3, stops)
    lines = torch.nn.functional.interpolate(stops, size=256, mode="linear", align_corners=True)
    return lines[0].round().to(torch.uint8)


@dataclass(frozen=True)
class Look:
    """A picture with the heat map of what the network took it for."""

    index: int  # position in the split, from 0
    true: str
    predicted: str
    uri: str  # the overlay, as a data URI

    @property
    def right(self) -> bool:
        return self.true == self.predicted


def looks(
    net: ResNet, judgement: Judgement, images: Views, preprocessing: Preprocessing, engine: Engine, limit: int
) -> list[Look]:
    """Some pictures of a split that was judged, and where the network looked: right ones, then wrong ones, `limit` of each.

    The right ones are the first of each class, so that nothing is picked for its looks; the wrong ones those it was surest of.

    Args:
        images: the split's pictures as the network gets them, in the judgement's order.
    """
    confidence, predicted = judgement.scores.max(1)
    right, wrong = (each.nonzero().flatten() for each in (predicted == judgement.labels, predicted != judgement.labels))
    firsts: dict[int, int] = {}
    for i in right.tolist():
        firsts.setdefault(int(judgement.labels[i]), i)
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:limit].tolist()
    chosen = [*list(firsts.values())[:limit], *worst]
    if not chosen:
        return []
    pixels = torch.stack([images[i] for i in chosen])  # (B, h, w, C)
    with evaluating(net), engine.autocast():
        heat, _ = grad_cam(
            net, preprocessing.normalise(to_device(pixels, engine)), to_device(predicted[chosen], engine)
        )
    return [
        Look(
            index=i,
            true=judgement.classes[int(judgement.labels[i])],
            predicted=judgement.classes[int(predicted[i])],
            uri=drawn_uri(overlay(picture, warmth)),
        )
        for i, picture, warmth in zip(chosen, pixels, heat.float().cpu(), strict=True)
    ]
