"""Where a classifier looked, held against boxes (2015, appendix C, in small): no box was shown to it while it learnt.

The whole picture is shown, its shorter side as long as in training; the box is the one around that part of the Grad-CAM map
which holds its highest place and is at least LEAST of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from residuum.data import boxes
from residuum.data.annotated import Annotated
from residuum.errors import DataError
from residuum.evaluation import drawing
from residuum.evaluation.boxes import Found
from residuum.evaluation.heat import grad_cam
from residuum.evaluation.masks import resized
from residuum.use.dense import chosen
from residuum.use.predict import Model

LEAST = 0.2  # of the highest place (Zhou et al. 2016, arXiv 1512.04150, §3.2)
RIGHT = 0.5  # IoU with a given box


@dataclass(frozen=True)
class Placed:
    """What the classifier says of one picture, and where; `iou` with the given box that it covers best, else 0."""

    picture: Annotated
    said: str
    score: float
    box: Tensor  # float32 (4,)
    iou: float

    def drawn(self) -> Image.Image:
        """The picture with the box, and the given ones thin and white."""
        found = Found(self.box[None], torch.tensor([self.score]), torch.tensor([0]))
        return drawing.boxes_on(self.picture.pixels(), found, (self.said,), self.picture)


def localise(
    model: Model, data: Path, split: str, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Placed]:
    """Each picture of a split that has a box, in order.

    Where the data's classes have the model's names, only boxes of the class that is said count, else all of them.

    Raises:
        DataError, UsageError: what the data cannot be.
    """
    parts = boxes.load(data)
    _, pictures = chosen(parts, split)
    named = bool(set(parts.classes) & set(model.classes))
    wanted = [picture for picture in pictures if len(picture.boxes)]
    if not wanted:
        raise DataError(f"{data} has no box on the {split} split; there is nothing to hold a place against.")
    for done, picture in enumerate(wanted, 1):
        heat, scores = looked(model, picture.pixels())
        said, box = model.classes[int(scores.argmax())], around(heat)
        given = [b for b, label in zip(picture.boxes, picture.labels.tolist(), strict=True)
                 if not named or parts.classes[label] == said]  # fmt: skip
        yield Placed(picture, said, float(scores.max()), box, max((iou(box, b) for b in given), default=0.0))
        progress(done, len(wanted))


def looked(model: Model, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Grad-CAM of the first class on a whole picture, uint8 (H, W, 3): float32 (H, W); and the scores (classes,)."""
    prepared, mean = model.preprocessing, model.preprocessing.mean
    side = min(prepared.size)
    x = resized(pixels, side, 16 * side).to(model.engine.device).float() / 255
    average = mean if mean.ndim == 1 else mean.mean((0, 1))
    x = ((x - average.to(x)) / prepared.std.to(x)).permute(2, 0, 1)[None]  # (1, 3, h, w)
    with torch.inference_mode(), model.engine.autocast():
        heat, logits = grad_cam(model.net.eval(), x)
    whole = F.interpolate(heat[None].float().cpu(), pixels.shape[:2], mode="bilinear", align_corners=False)
    return whole[0, 0], torch.softmax(logits[0].float().cpu() / model.temperature, 0)


def around(heat: Tensor) -> Tensor:
    """The box around the part of a map (H, W) that holds its highest place, float32 (4,)."""
    from scipy import ndimage

    values = heat.numpy()
    places, _ = ndimage.label(values >= LEAST * values.max())
    rows, columns = np.nonzero(places == places.flat[int(values.argmax())])
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)


def iou(a: Tensor, b: Tensor) -> float:
    """Intersection over union of two boxes (4,)."""
    inside = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0).prod()
    return float(inside / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inside))


def figures(placed: list[Placed]) -> dict[str, Any]:
    """What `residuum detect localise --json` prints of all pictures."""
    n = len(placed)
    return {
        "n": n,
        "localisation_error": sum(each.iou < RIGHT for each in placed) / n,
        "mean_iou": sum(each.iou for each in placed) / n,
    }
