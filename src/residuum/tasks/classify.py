"""Classification: one label a picture, cross entropy, top-1 error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from residuum.data import sources
from residuum.data.augment import Augmentation
from residuum.data.crops import Crop
from residuum.data.dataset import Pictures, Split, stratified
from residuum.data.loader import Batch, Loader
from residuum.data.reading import Views
from residuum.data.statistics import statistics
from residuum.data.stored import Reading, Stored
from residuum.errors import DataError, UsageError
from residuum.evaluation.evaluate import judge, prepared
from residuum.evaluation.metrics import Judgement
from residuum.models.bundle import Bundle
from residuum.models.resnet import ResNet, assemble
from residuum.models.spec import specification
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine, seed_for

NORMALISATIONS = ("per-pixel mean", "per-channel mean and std")


@dataclass(frozen=True, eq=False)
class Classify:
    """A network, the pictures it learns from and is judged on, and how.

    Attributes:
        held_out: pictures that no step sees, judged while training; empty where there are none.
        test: touched once, at the end.
        judged: what `test` is called: "test", "val" or "held-out".
        drawn: the names of the pictures in splits that were drawn here, not given by the data.
    """

    net: ResNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    loader: Loader
    held_out: Pictures
    test: Pictures
    data: Mapping[str, str]
    engine: Engine
    judged: str = "test"
    drawn: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def batch(self, step: int) -> Batch:
        """The input of step `step`."""
        return self.loader.batch(step)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats, and the share of pictures whose highest score is another class; both scalars."""
        logits = self.net(batch.pictures).float()  # (B, classes)
        wrong = (logits.detach().argmax(1) != batch.labels).float().mean()
        return F.cross_entropy(logits, batch.labels), wrong

    def judge(self, split: Pictures) -> Judgement:
        """Judges the network as it is now."""
        return judge(self.net, split, self.preprocessing, self.classes, self.engine)

    def views(self, split: Pictures) -> Views:
        """The pictures of a split that was judged, as the network got them, in the judgement's order."""
        return Views(split.readable() if isinstance(split, Stored) else split, self.preprocessing)

    @property
    def skipped(self) -> Mapping[str, str]:
        """name -> why, of the pictures left out so far because they could not be read."""
        splits = (self.loader.split, self.held_out, self.test)
        return {name: why for split in splits if isinstance(split, Stored) for name, why in split.skipped.items()}

    def bundle(self, recipe: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> Bundle:
        """All that goes into the model file."""
        from residuum import __version__

        versions = {"residuum": __version__, "torch": torch.__version__}
        return Bundle(
            net=self.net,
            classes=self.classes,
            preprocessing=self.preprocessing,
            recipe=recipe,
            metrics=metrics,
            data=self.data,
            versions=versions,
        )


def prepare(
    *,
    data: str,
    data_dir: Path,
    reading: Reading,
    net: str,
    specification_changes: Mapping[str, Any],
    init: str,
    size: int,
    resize: int,
    normalise: str,
    held_out: int,
    crop: Crop,
    augmentation: Augmentation,
    batch: int,
    seed: int,
    engine: Engine,
) -> Classify:
    """Reads the data, holds pictures out, takes the training pictures' statistics, and builds the network.

    Args:
        size: side of the network's input, in pixels.
        resize: the shorter side is brought to this many pixels before the centre is cut out; 0 for `size`.
        normalise: "per-pixel mean" (2015 §4.2: the mean alone) or "per-channel mean and std".
        held_out: how many training pictures are kept for judging while training; stratified, the same for every seed.

    Raises:
        DataError, UsageError: what the data set, the network's name or a value cannot be.
    """
    if normalise not in NORMALISATIONS:
        raise UsageError(f"unknown normalise {normalise!r}; known: {', '.join(map(repr, NORMALISATIONS))}.")
    source = sources.load(data, data_dir, reading)
    if not len(source.train):
        raise DataError(
            f"{data} has no train folder; training needs class folders, or train/ with class folders in it."
        )
    channels = source.train.images.shape[-1] if isinstance(source.train, Split) else 3
    spec = specification(net, **{"channels": channels, "classes": len(source.classes)} | dict(specification_changes))
    shape = Preprocessing(channels, (size, size), resize or size, torch.zeros(channels), torch.ones(channels))
    everything, test = (
        split if crop.kind != "centre" else prepared(split, shape) for split in (source.train, source.test)
    )
    train, kept = everything, source.val or everything.take(torch.empty(0, dtype=torch.long))
    drawn = {source.judged: source.test.names} if source.whole is not None else {}
    if held_out:
        if source.val is not None:
            raise UsageError(f"{data} has a val folder, which is judged while training; leave out held_out={held_out}.")
        rest, chosen = stratified(everything.labels, held_out)
        train, kept = everything.take(rest), everything.take(chosen)
        drawn = drawn | {"judged while training": kept.names}
    preprocessing = statistics(train, shape, normalise == "per-pixel mean")
    network: Any = engine.place(assemble(spec, init=init, seed=seed_for(seed, "init")))
    return Classify(
        net=network,
        classes=source.classes,
        preprocessing=preprocessing,
        loader=Loader(train, preprocessing, augmentation, batch, seed, engine, crop),
        held_out=kept,
        test=test,
        data={"name": sources.short_name(data), "fingerprint": source.fingerprint},
        engine=engine,
        judged=source.judged,
        drawn=drawn,
    )
