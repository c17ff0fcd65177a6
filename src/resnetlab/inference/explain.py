"""Explains a prediction for one image: Grad-CAM, what each block adds, and the prediction without each block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from resnetlab.device import DeviceConfig, eval_mode, standard_torch_state
from resnetlab.errors import AnsweredAttributes
from resnetlab.evaluation.gradcam import draw_overlay, grad_cam
from resnetlab.inference.classes import top_classes
from resnetlab.models.lesion import removable_blocks, remove_blocks
from resnetlab.models.model_file import compute_scores
from resnetlab.models.probes import measure_contributions
from resnetlab.models.resnet import ResNet
from resnetlab.peer_words import EXPLANATION_ATTRIBUTES
from resnetlab.preprocessing import Preprocessing


class Classifier(Protocol):
    """What is needed of an `inference.predict.Model`, which imports this module."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    temperature: float
    device_config: DeviceConfig

    @property
    def resnet(self) -> ResNet: ...

    @property
    def multi_label(self) -> bool: ...


@dataclass(frozen=True)
class BlockEffect:
    """What one block does for the prediction.

    Attributes:
        ratio: |F(x)| / |shortcut|; None in a plain net, which has no shortcut.
        predicted_without: the class with the highest score without the block; None where it cannot be left out.
        score_without: of the explained class; None as above.
    """

    block: str
    ratio: float | None
    predicted_without: str | None
    score_without: float | None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return {
            "block": self.block,
            "ratio": self.ratio,
            "answer_without": self.predicted_without,
            "score_without": self.score_without,
        }


@dataclass(frozen=True, eq=False, repr=False)
class Explanation(AnsweredAttributes):
    """The explanation of one image.

    Attributes:
        top: (class, score), best first; the first is the explained class.
        pixels: the image as the network gets it, before normalisation; (h, w, C).
        heat: the evidence for the first class, float32 (h', w') in [0, 1].
        blocks: in the order of the forward pass.
    """

    top: tuple[tuple[str, float], ...]
    pixels: Tensor
    heat: Tensor
    blocks: tuple[BlockEffect, ...]
    attribute_answers = EXPLANATION_ATTRIBUTES

    @property
    def overlay(self) -> Image.Image:
        """The heat map over the image."""
        return draw_overlay(self.pixels, self.heat)

    def __repr__(self) -> str:
        return f"Explanation({self.top[0][0]} {self.top[0][1]:.1%}: overlay, {len(self.blocks)} blocks)"

    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary; keys as in docs/json.md."""
        return {
            "top": [{"class": name, "score": score} for name, score in self.top],
            "blocks": [effect.to_json() for effect in self.blocks],
        }

    to_dict = to_json


@standard_torch_state()
def explain(
    model: Classifier, pixels: Tensor, *, top: int = 5, progress: Callable[[int, int], None] | None = None
) -> Explanation:
    """Explains the model's prediction for one image.

    Args:
        pixels: the image resized and cropped (`model.preprocessing`), (h, w, C).
        top: how many classes to name.
        progress: called with (blocks left out so far, all such blocks).
    """
    net, device_config = model.resnet, model.device_config
    removable = removable_blocks(net)
    with eval_mode(net), device_config.autocast():
        x = model.preprocessing.normalise(pixels[None].to(device_config.device))  # (1, C, h, w)
        heat, logits = grad_cam(net, x)
        scores = _score_one(model, logits)
        first = int(scores.argmax())
        ratios = measure_contributions(net, x)
        lesions: dict[str, Tensor] = {}
        for i, name in enumerate(removable, 1):
            lesions[name] = _score_one(model, remove_blocks(net, name)(x))
            if progress is not None:
                progress(i, len(removable))
    effects = tuple(
        BlockEffect(
            block=name,
            ratio=round(float(ratios[name]), 6) if name in ratios else None,
            predicted_without=model.classes[int(lesions[name].argmax())] if name in lesions else None,
            score_without=round(float(lesions[name][first]), 6) if name in lesions else None,
        )
        for name, _ in net.blocks()
    )
    return Explanation(top_classes(model.classes, scores, top), pixels, heat[0].cpu(), effects)


def _score_one(model: Classifier, logits: Tensor) -> Tensor:
    """Calibrated scores of one image, float32 (classes,); equal ones for a lesion that overflows."""
    scores = compute_scores(logits[0].float().cpu() / model.temperature, model.multi_label, 0)
    return scores if bool(scores.isfinite().all()) else torch.full_like(scores, 1 / len(scores))
