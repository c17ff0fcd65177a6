"""Weakly supervised localisation: a classifier's Grad-CAM boxes compared with true boxes (2015, appendix C, in small).

The classifier sees the whole image with its shorter side as long as in training. Its box surrounds the connected part of the
Grad-CAM map that contains the maximum and is at least PEAK_FRACTION of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from resnetlab.data import box_dataset
from resnetlab.data.annotations import AnnotatedImage
from resnetlab.device import eval_mode, standard_torch_state
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation import overlays
from resnetlab.evaluation.detection import Detections
from resnetlab.evaluation.gradcam import grad_cam
from resnetlab.evaluation.segmentation import resize_bounded
from resnetlab.inference.annotated import select_split
from resnetlab.inference.predict import Model
from resnetlab.models.model_file import compute_scores
from resnetlab.preprocessing import tensor_to_pil

PEAK_FRACTION = 0.2  # of the maximum (Zhou et al. 2016, arXiv 1512.04150, §3.2)
IOU_THRESHOLD = 0.5  # with a true box, for a correct localisation


@dataclass(frozen=True)
class LocalizationResult:
    """The class that a classifier predicts for one image, its box, and the highest IoU with a true box (0 without one)."""

    image: AnnotatedImage
    predicted_class: str
    score: float
    box: Tensor  # float32 (4,)
    iou: float

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        row = {"image": self.image.name, "class": self.predicted_class, "score": round(self.score, 6)}
        return row | {"box": self.box.tolist(), "iou": self.iou}

    def draw(self) -> Image.Image:
        """The image with the box, and the true boxes thin and white."""
        detection = Detections(self.box[None], torch.tensor([self.score]), torch.tensor([0]))
        return overlays.draw_boxes(self.image.read_pixels(), detection, (self.predicted_class,), self.image)


def localize_objects(
    model: Model, data: Path, split: str, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[str, list[LocalizationResult]]:
    """Localises the predicted class on each image of a split that has a box; returns the split's own name and the results.

    If the data's classes have the model's names, only boxes of the predicted class count, otherwise all boxes.

    Raises:
        DataError, UsageError: the data are invalid or have no boxes, or the model takes other images.
    """
    from torchvision.ops import box_iou

    if model.preprocessing.dtype:
        raise UsageError(f"boxes are drawn on photographs, and the model takes {model.preprocessing.pixel_format}.")
    dataset = box_dataset.load_boxes(data)
    split, images = select_split(dataset, split)
    match_class = bool(set(dataset.classes) & set(model.classes))
    with_boxes = [image for image in images if len(image.boxes)]
    if not with_boxes:
        raise DataError(f"{data} has no box on the {split} split; there is nothing to compare with.")
    results = []
    for done, image in enumerate(with_boxes, 1):
        heat, scores = localize_class(model, image.read_pixels())
        predicted_class, box = model.classes[int(scores.argmax())], box_around_peak(heat)
        of_class = [not match_class or dataset.classes[label] == predicted_class for label in image.labels.tolist()]
        iou = max(box_iou(box[None], image.boxes[torch.tensor(of_class)])[0].tolist(), default=0.0)
        results.append(LocalizationResult(image, predicted_class, float(scores.max()), box, iou))
        on_progress(done, len(with_boxes))
    return split, results


@standard_torch_state()
def localize_class(model: Model, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Grad-CAM of the predicted class on a whole image, uint8 (H, W, 3): float32 (H, W); and the scores (classes,)."""
    preprocessing, mean = model.preprocessing, model.preprocessing.mean
    side = min(preprocessing.size)
    pixels = preprocessing.to_pixels(tensor_to_pil(pixels))  # grey, where the network takes it
    x = resize_bounded(pixels, side, 16 * side).to(model.device_config.device).float() / 255
    mean = mean if mean.ndim == 1 else mean.mean((0, 1))
    x = ((x - mean.to(x)) / preprocessing.std.to(x)).permute(2, 0, 1)[None]  # (1, C, h, w)
    with eval_mode(model.resnet), model.device_config.autocast():
        heat, logits = grad_cam(model.resnet, x)
    heat = F.interpolate(heat[None].float().cpu(), pixels.shape[:2], mode="bilinear", align_corners=False)
    return heat[0, 0], compute_scores(logits[0].float().cpu() / model.temperature, model.multi_label, 0)


def box_around_peak(heat: Tensor) -> Tensor:
    """The box around the connected part of a map (H, W) that contains its maximum, float32 (4,)."""
    from scipy import ndimage

    values = heat.numpy()
    components, _ = ndimage.label(values >= PEAK_FRACTION * values.max())
    rows, columns = np.nonzero(components == components.flat[int(values.argmax())])
    return torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=torch.float32)
