"""Boxes and masks drawn on images, and a detector's precision-recall curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from resnetlab.data.annotations import AnnotatedImage
from resnetlab.evaluation import figures
from resnetlab.evaluation.detection import DetectionMetrics, Detections
from resnetlab.preprocessing import tensor_to_pil

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind people can distinguish; class i has colour i.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442")
TRUTH_COLOUR = "#ffffff"
MAX_SIDE = 640  # pixels, of an image in a page
MAX_NAMED = 14  # curves; of more there is no legend, which would cover them


def draw_boxes(
    pixels: Tensor, detections: Detections, classes: Sequence[str], truth: AnnotatedImage | None = None
) -> Image.Image:
    """The image, uint8 (H, W, 3), with detections in the classes' colours and, if given, thin white true boxes."""
    image = tensor_to_pil(pixels).convert("RGB")
    draw = ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / 320))
    if truth is not None:
        for box in truth.boxes.tolist():
            draw.rectangle(box, outline=TRUTH_COLOUR, width=max(1, width // 2))
    font = ImageFont.load_default(max(11, round(max(image.size) / 45)))
    rows = zip(*(part.tolist() for part in detections), strict=True)
    for box, score, label in reversed(list(rows)):  # the best is drawn last
        colour = COLOURS[label % len(COLOURS)]
        draw.rectangle(box, outline=colour, width=width)
        text = f"{classes[label]} {100 * score:.0f}"
        left, top, right, bottom = draw.textbbox((box[0], box[1]), text, font=font)
        up = min(bottom - top + 4, max(0.0, box[1]))  # above the box if there is room
        draw.rectangle((left, top - up, right + 4, bottom - up + 2), fill=colour)
        draw.text((box[0] + 2, box[1] - up), text, fill="white", font=font)
    return image


def draw_mask(pixels: Tensor, mask: Tensor) -> Image.Image:
    """The image, uint8 (H, W, 3), tinted where the mask, int64 (H, W), is not 0, the background."""
    colours = torch.tensor([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in COLOURS], dtype=torch.float32)
    tint = colours[(mask - 1) % len(COLOURS)]  # (H, W, 3)
    foreground = ((mask > 0) & (mask < 255))[..., None]
    return tensor_to_pil(torch.where(foreground, 0.5 * pixels + 0.5 * tint, pixels.float()).round().to(torch.uint8))


def jpeg_data_uri(image: Image.Image) -> str:
    """The image as a JPEG of at most MAX_SIDE pixels on a side, as a data URI."""
    return figures.encode_uri(image, "jpeg", MAX_SIDE, quality=80)


def precision_recall_svg(metrics: DetectionMetrics) -> str:
    """Precision against recall at IoU .5 of each class, as inline SVG."""

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.08, 0.12, 0.9, 0.84))
        for k, name in enumerate(metrics.classes):
            ap = metrics.ap_50[k]
            if ap is not None:
                recall = torch.linspace(0, 1, metrics.precision.shape[1]).tolist()
                name = f"\u200b{name}" if name.startswith("_") else name  # matplotlib names no line "_…"
                label, colour = f"{name} ({ap:.3f})", COLOURS[k % len(COLOURS)]
                axes.plot(recall, metrics.precision[k].tolist(), color=colour, linewidth=2, label=label)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("recall")
        axes.set_ylabel("precision")
        if len(axes.lines) <= MAX_NAMED:
            axes.legend(loc="lower left", frameon=False)

    label = "Precision against recall at IoU .5, one line per class."
    return figures.inline_svg(draw, width=620, height=380, name="precision-recall", label=label)
