"""Segmentation: a class for every pixel, cross entropy, intersection over union."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from residuum.data.ahead import Ahead
from residuum.data.masks import VOID, Masked
from residuum.data.parts import Parts
from residuum.data.samples import FLIPS, Draw, Read, Samples, accept, mirrored
from residuum.errors import unknown
from residuum.evaluation.masks import MaskJudgement, judge
from residuum.models.dense_file import DenseBundle, build
from residuum.models.spec import Specification
from residuum.models.values import Segmenter
from residuum.runtime import Engine, to_device
from residuum.tasks.dense import divided, readable, start


class Sample(NamedTuple):
    """A square of a training picture, uint8 (size, size, 3), and its mask, uint8 (size, size)."""

    pixels: Tensor
    mask: Tensor


def sample(picture: Masked, draw: Draw, *, size: int, sides: tuple[int, ...]) -> Sample:
    """A square of `size`, from the picture with its shorter side brought to one of `sides`; void where the picture ends."""
    pixels, mask = picture.read()
    side = sides[int(draw.scale * len(sides))]
    scale = side / min(mask.shape)
    height, width = (max(1, round(length * scale)) for length in mask.shape)
    x = F.interpolate(pixels.permute(2, 0, 1)[None].contiguous(), (height, width), mode="bilinear", antialias=True)
    y = F.interpolate(mask[None, None], (height, width), mode="nearest-exact")
    down, right = max(0, size - height), max(0, size - width)
    x, y = F.pad(x, (0, right, 0, down)), F.pad(y, (0, right, 0, down), value=VOID)
    top, left = (int(d * (length - size + 1)) for d, length in ((draw.top, x.shape[2]), (draw.left, x.shape[3])))
    window = (..., slice(top, top + size), slice(left, left + size))
    return Sample(
        mirrored(x[window][0].permute(1, 2, 0), draw).contiguous(), mirrored(y[window][0, 0], draw).contiguous()
    )


def _pixels(picture: Masked) -> Tensor:
    return picture.read()[0]


@dataclass(frozen=True, eq=False)
class Segment:
    """A segmenter, the pictures it learns from and is judged on (`tasks.task`).

    Attributes:
        held_out: pictures that no step sees, judged while training; empty where there are none.
        test: touched once, at the end; `judged` is what it is called.
    """

    net: nn.Module
    spec: Specification
    values: Segmenter
    classes: tuple[str, ...]
    steps: Ahead[Read[Sample]]
    train: Sequence[Masked]
    held_out: Sequence[Masked]
    test: Sequence[Masked]
    judged: str
    data: Mapping[str, str]
    engine: Engine
    on_bad: str
    skipped: dict[str, str]
    drawn: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def parts(self, step: int) -> list[list[Sample]]:
        """This process's share of step `step`, in one part."""
        return [accept(self.steps.get(step), self.on_bad == "stop", self.skipped, "--on-bad-mask")]

    def loss(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats over the pixels that have a class, and the share of them that is wrong; scalars."""
        logits = self.net(to_device(torch.stack([s.pixels for s in batch]), self.engine))  # (B, classes, h, w)
        masks = to_device(torch.stack([s.mask for s in batch]), self.engine).long()
        known = (masks != VOID).sum().clamp_min(1)
        wrong = ((logits.detach().argmax(1) != masks) & (masks != VOID)).sum() / known
        return F.cross_entropy(logits, masks, ignore_index=VOID, reduction="sum") / known, wrong

    def judge(self, pictures: Sequence[Masked]) -> MaskJudgement:
        """Judges the network as it is now."""
        return judge(self.net, pictures, self.classes, self.values, self.engine, self.on_bad, self.skipped)

    def judge_held_out(self) -> dict[str, float] | None:
        """Mean intersection over union on the held-out pictures."""
        return {"mean_iou": self.judge(self.held_out).mean_iou} if self.held_out else None

    def close(self) -> None:
        """Ends the processes that read."""
        self.steps.close()

    def bundle(self, recipe: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> DenseBundle:
        """All that goes into the model file."""
        from residuum import __version__

        versions = {"residuum": __version__, "torch": torch.__version__}
        return DenseBundle(
            "segment", self.net, self.spec, self.values, self.classes, recipe, metrics, self.data, versions
        )


def prepare(
    *,
    data: Parts[Masked],
    name: str,
    net: str,
    specification_changes: Mapping[str, Any],
    init: str,
    start_from: Path | None,
    values: Mapping[str, Any],
    sides: tuple[int, ...],
    flips: str,
    held: int,
    on_bad: str,
    batch: int,
    seed: int,
    engine: Engine,
    workers: int,
) -> Segment:
    """Holds pictures out, takes statistics, and builds the network; arguments as `tasks.detect.prepare`.

    Raises:
        DataError, UsageError: what the data, the network's name or a value cannot be.
    """
    if flips not in FLIPS:
        raise unknown("flips", flips, FLIPS)
    train, kept, drawn = divided(data, held)
    skipped = dict(data.skipped)
    pictures = readable(train, _pixels, on_bad, skipped)
    begun = start(net, specification_changes, start_from, init, seed, values["bn"], pictures)
    chosen = Segmenter(mean=begun.mean, std=begun.std, **values)
    network = build(begun.net, chosen, len(data.classes), seed=seed)
    make = partial(sample, size=chosen.size, sides=(chosen.size, *sides))
    return Segment(
        net=engine.place(network),
        spec=begun.net.spec,
        values=chosen,
        classes=data.classes,
        steps=Ahead(Samples(train, make, batch, seed, flips, engine.world), workers),
        train=train,
        held_out=kept,
        test=data.test,
        judged=data.judged,
        data={"name": name, "fingerprint": data.fingerprint + begun.digest},
        engine=engine,
        on_bad=on_bad,
        skipped=skipped,
        drawn=drawn,
    )
