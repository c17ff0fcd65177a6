"""Classification: one label a picture, cross entropy, top-1 error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from residuum.data import sources
from residuum.data.augment import Augmentation
from residuum.data.dataset import Split, stratified
from residuum.data.loader import Batch, Loader
from residuum.errors import UsageError
from residuum.evaluation.evaluate import judge, prepared
from residuum.evaluation.metrics import Judgement
from residuum.models.bundle import Bundle
from residuum.models.resnet import ResNet, assemble
from residuum.models.spec import specification
from residuum.preprocessing import Preprocessing, centre_statistics
from residuum.runtime import Engine, seed_for

NORMALISATIONS = ("per-pixel mean", "per-channel mean and std")


@dataclass(frozen=True, eq=False)
class Classify:
    """A network, the pictures it learns from and is judged on, and how.

    Attributes:
        held_out: part of the training split that no step sees; empty where nothing is held out.
        test: touched once, at the end.
    """

    net: ResNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    loader: Loader
    held_out: Split
    test: Split
    data: Mapping[str, str]
    engine: Engine

    def batch(self, step: int) -> Batch:
        """The input of step `step`."""
        return self.loader.batch(step)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats, and the share of pictures whose highest score is another class; both scalars."""
        logits = self.net(batch.pictures).float()  # (B, classes)
        wrong = (logits.detach().argmax(1) != batch.labels).float().mean()
        return F.cross_entropy(logits, batch.labels), wrong

    def judge(self, split: Split) -> Judgement:
        """Judges the network as it is now."""
        return judge(self.net, split, self.preprocessing, self.classes, self.engine)

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
    net: str,
    specification_changes: Mapping[str, Any],
    init: str,
    size: int,
    normalise: str,
    held_out: int,
    augmentation: Augmentation,
    batch: int,
    seed: int,
    engine: Engine,
) -> Classify:
    """Reads the data, holds pictures out, takes the training pictures' statistics, and builds the network.

    Args:
        size: side of the network's input, in pixels.
        normalise: "per-pixel mean" (2015 §4.2: the mean alone) or "per-channel mean and std".
        held_out: how many training pictures are kept for judging while training; stratified, the same for every seed.

    Raises:
        DataError, UsageError: what the data set, the network's name or a value cannot be.
    """
    if normalise not in NORMALISATIONS:
        raise UsageError(f"unknown normalise {normalise!r}; known: {', '.join(map(repr, NORMALISATIONS))}.")
    source = sources.load(data, data_dir)
    channels = source.train.images.shape[-1]
    spec = specification(net, **{"channels": channels, "classes": len(source.classes)} | dict(specification_changes))
    shape = Preprocessing(channels, (size, size), size, torch.zeros(channels), torch.ones(channels))
    everything, test = prepared(source.train, shape), prepared(source.test, shape)
    train, kept = everything, everything.take(torch.empty(0, dtype=torch.long))
    if held_out:
        rest, chosen = stratified(everything.labels, held_out)
        train, kept = everything.take(rest), everything.take(chosen)
    mean, std = centre_statistics(train.images, normalise == "per-pixel mean", normalise != "per-pixel mean")
    preprocessing = Preprocessing(channels, (size, size), size, mean, std)
    network: Any = engine.place(assemble(spec, init=init, seed=seed_for(seed, "init")))
    return Classify(
        net=network,
        classes=source.classes,
        preprocessing=preprocessing,
        loader=Loader(train, preprocessing, augmentation, batch, seed, engine),
        held_out=kept,
        test=test,
        data={"name": source.name, "fingerprint": source.fingerprint},
        engine=engine,
    )
