"""How well pixels are told apart: intersection over union of each class, over all pixels of a split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residuum.data.masks import VOID, Masked
from residuum.errors import DataError
from residuum.models.values import Segmenter
from residuum.runtime import Engine, evaluating, to_device


@dataclass(frozen=True, eq=False)
class MaskJudgement:
    """Figures of a segmenter on a split.

    Attributes:
        confusion: pixels, int64 (classes, classes); rows are true classes. Pixels that are void are not in it.
        pictures: those that were judged.
    """

    classes: tuple[str, ...]
    confusion: Tensor
    pictures: Sequence[Masked]

    @property
    def iou(self) -> list[float | None]:
        """Of each class: right pixels over those that are it or are called it; None where there are neither."""
        right = self.confusion.diag().double()
        union = self.confusion.sum(0) + self.confusion.sum(1) - self.confusion.diag()
        return [float(r / u) if u else None for r, u in zip(right, union.tolist(), strict=True)]

    @property
    def mean_iou(self) -> float:
        """Over the classes that occur, background included."""
        known = [v for v in self.iou if v is not None]
        return sum(known) / len(known) if known else 0.0

    @property
    def pixel_error(self) -> float:
        """Share of pixels whose class is wrong."""
        total = int(self.confusion.sum())
        return 1 - int(self.confusion.diag().sum()) / total if total else 0.0

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        counts = self.confusion.sum(1).tolist()
        rows = zip(self.classes, counts, self.iou, strict=True)
        return {
            "mean_iou": self.mean_iou,
            "pixel_error": self.pixel_error,
            "n": len(self.pictures),
            "per_class": [{"class": name, "pixels": n, "iou": iou} for name, n, iou in rows],
        }


def resized(pixels: Tensor, size: int, longest: int) -> Tensor:
    """uint8 (H, W, 3) -> uint8 (h, w, 3): the shorter side `size` pixels long, the longer at most `longest`."""
    height, width = pixels.shape[:2]
    scale = min(size / min(height, width), longest / max(height, width))
    shape = (max(1, round(height * scale)), max(1, round(width * scale)))
    x = pixels.permute(2, 0, 1)[None].contiguous()
    return F.interpolate(x, shape, mode="bilinear", antialias=True, align_corners=False)[0].permute(1, 2, 0)


def segment(net: nn.Module, pixels: Tensor, values: Segmenter, engine: Engine) -> Tensor:
    """The class of every pixel of a picture, uint8 (H, W, 3) -> int64 (H, W)."""
    with evaluating(net), engine.autocast():
        logits = net(to_device(resized(pixels, values.size, values.longest)[None], engine))  # (1, classes, h, w)
        whole = F.interpolate(logits.float(), pixels.shape[:2], mode="bilinear", align_corners=False)
    return whole[0].argmax(0).cpu()


def judge(
    net: nn.Module,
    pictures: Sequence[Masked],
    classes: tuple[str, ...],
    values: Segmenter,
    engine: Engine,
    on_bad: str,
    skipped: dict[str, str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MaskJudgement:
    """Judges a segmenter on pictures at their own size; one that cannot be read is noted in `skipped`.

    Raises DataError where it is to stop the work instead.
    """
    confusion, judged = torch.zeros(len(classes), len(classes), dtype=torch.int64), []
    for i, picture in enumerate(pictures, 1):
        try:
            pixels, mask = picture.read()
        except DataError as error:
            if on_bad == "stop":
                raise
            skipped[picture.name] = str(error)
            continue
        said = segment(net, pixels, values, engine)
        counted = mask != VOID
        pairs = mask[counted].long() * len(classes) + said[counted]
        confusion += torch.bincount(pairs, minlength=len(classes) ** 2).view_as(confusion)
        judged.append(picture)
        progress(i, len(pictures))
    return MaskJudgement(classes, confusion, judged)
