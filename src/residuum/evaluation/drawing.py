"""Boxes and masks on pictures, and a detector's curves, for people to look at."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from residuum.data.annotated import Annotated
from residuum.evaluation import figures
from residuum.evaluation.boxes import BoxJudgement, Found
from residuum.preprocessing import picture_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which people tell apart whatever their eyes; a class has the one of its number.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
TRUE = "#ffffff"
SHOWN = 640  # pixels on a side of a picture in a page, at most


def boxes_on(pixels: Tensor, found: Found, classes: Sequence[str], truth: Annotated | None = None) -> Image.Image:
    """The picture, uint8 (H, W, 3), with what was found in the classes' colours, and true boxes, if given, thin and white."""
    picture = picture_of(pixels).convert("RGB")
    draw = ImageDraw.Draw(picture)
    width = max(2, round(max(picture.size) / 320))
    if truth is not None:
        for box in truth.boxes.tolist():
            draw.rectangle(box, outline=TRUE, width=max(1, width // 2))
    font = _font(max(11, round(max(picture.size) / 45)))
    for box, score, label in reversed(list(zip(*(part.tolist() for part in found), strict=True))):  # the best on top
        colour = COLOURS[label % len(COLOURS)]
        draw.rectangle(box, outline=colour, width=width)
        words = f"{classes[label]} {100 * score:.0f}"
        left, top, right, bottom = draw.textbbox((box[0], box[1]), words, font=font)
        up = min(bottom - top + 4, max(0.0, box[1]))  # above the box where there is room
        draw.rectangle((left, top - up, right + 4, bottom - up + 2), fill=colour)
        draw.text((box[0] + 2, box[1] - up), words, fill="white", font=font)
    return picture


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def mask_on(pixels: Tensor, mask: Tensor) -> Image.Image:
    """The picture, uint8 (H, W, 3), tinted where the mask, int64 (H, W), says another class than 0, the background."""
    colours = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS], dtype=torch.float32)
    tint = colours[(mask - 1) % len(COLOURS)]  # (H, W, 3)
    marked = ((mask > 0) & (mask < 255))[..., None]
    return picture_of(torch.where(marked, 0.5 * pixels + 0.5 * tint, pixels.float()).round().to(torch.uint8))


def page_uri(picture: Image.Image) -> str:
    """A picture as a page shows it: JPEG of at most SHOWN pixels on a side, as a data URI."""
    picture = picture.copy()
    picture.thumbnail((SHOWN, SHOWN))
    buffer = io.BytesIO()
    picture.save(buffer, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def precision_recall(judgement: BoxJudgement) -> str:
    """Precision by recall at IoU .5 of each class, as inline SVG."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.08, 0.12, 0.9, 0.84))
        for k, name in enumerate(judgement.classes):
            ap = judgement.ap_50[k]
            if ap is not None:
                recall = torch.linspace(0, 1, judgement.precision.shape[1]).tolist()
                label, colour = f"{name} ({ap:.3f})", COLOURS[k % len(COLOURS)]
                axes.plot(recall, judgement.precision[k].tolist(), color=colour, linewidth=2, label=label)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        axes.legend(loc="lower left", frameon=False)

    label = "Precision by recall at IoU .5, a line for each class."
    return figures.inline_svg(draw, width=620, height=380, name="precision-recall", label=label)
