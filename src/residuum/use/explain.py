"""Why a network says what it says of one picture: where it looked, what each block added, what it would say without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from residuum.evaluation.heat import grad_cam, overlay
from residuum.models.contributions import contributions
from residuum.models.lesion import blocks, without
from residuum.use.predict import Model, best


@dataclass(frozen=True)
class BlockShare:
    """What one block did for the answer.

    Attributes:
        ratio: |F(x)| / |shortcut|; None in a plain net, which has no shortcut.
        answer: the class with the highest score where the block is left out; None where it cannot be left out.
        score: what the explained class then scores; None as above.
    """

    block: str
    ratio: float | None
    answer: str | None
    score: float | None

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        return {"block": self.block, "ratio": self.ratio, "answer_without": self.answer, "score_without": self.score}


@dataclass(frozen=True, eq=False)
class Explanation:
    """One picture explained.

    Attributes:
        top: (class, score), best first; the first is what is explained.
        pixels: the picture as the network gets it, before normalisation; uint8 (h, w, C).
        heat: where the evidence for the first class lies, float32 (h', w') in [0, 1].
        blocks: in the order of the forward pass.
    """

    top: tuple[tuple[str, float], ...]
    pixels: Tensor
    heat: Tensor
    blocks: tuple[BlockShare, ...]

    @property
    def overlay(self) -> Image.Image:
        """The heat map over the picture."""
        return overlay(self.pixels, self.heat)

    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary; keys as in docs/json.md."""
        return {
            "top": [{"class": name, "score": score} for name, score in self.top],
            "blocks": [share.to_json() for share in self.blocks],
        }


def explain(
    model: Model, pixels: Tensor, *, top: int = 5, progress: Callable[[int, int], None] | None = None
) -> Explanation:
    """Explains what the model says of one picture.

    Args:
        pixels: the picture resized and cropped (`model.preprocessing`), uint8 (h, w, C).
        top: how many classes to name.
        progress: is told (blocks left out so far, of how many).
    """
    net, engine = model.net.eval(), model.engine
    removable = blocks(net)
    with torch.inference_mode(), engine.autocast():
        x = model.preprocessing.normalise(pixels[None].to(engine.device))  # (1, C, h, w)
        heat, logits = grad_cam(net, x)
        scores = _softmax(model, logits)
        first = int(scores.argmax())
        ratios = contributions(net, x)
        lesions: dict[str, Tensor] = {}
        for i, name in enumerate(removable, 1):
            lesions[name] = _softmax(model, without(net, name)(x))
            if progress is not None:
                progress(i, len(removable))
    shares = tuple(
        BlockShare(
            block=name,
            ratio=round(float(ratios[name]), 6) if name in ratios else None,
            answer=model.classes[int(lesions[name].argmax())] if name in lesions else None,
            score=round(float(lesions[name][first]), 6) if name in lesions else None,
        )
        for name, _ in net.blocks()
    )
    return Explanation(best(model.classes, scores, top), pixels, heat[0].cpu(), shares)


def _softmax(model: Model, logits: Tensor) -> Tensor:
    """Calibrated scores of one picture, float32 (classes,); of a lesion that overflows, equal ones."""
    scores = torch.softmax(logits[0].float().cpu() / model.temperature, 0)
    return scores if bool(scores.isfinite().all()) else torch.full_like(scores, 1 / len(scores))
