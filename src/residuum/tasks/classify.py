"""Classification: one label a picture, cross entropy, top-1 error."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
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
from residuum.data.marks import known, marked
from residuum.data.mixing import Mixing
from residuum.data.reading import Views
from residuum.data.statistics import statistics
from residuum.data.stored import Reading, Stored
from residuum.errors import DataError, UsageError
from residuum.evaluation.evaluate import judge, prepared
from residuum.evaluation.metrics import Judgement
from residuum.models.bundle import Bundle
from residuum.models.resnet import ResNet
from residuum.models.samples import MOST_CHECK, MOST_TRAINING, Samples, spread
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine
from residuum.tasks.network import Network, digest

NORMALISATIONS = ("per-pixel mean", "per-channel mean and std", "as start_from")


@dataclass(frozen=True, eq=False)
class Classify:
    """A network, the pictures it learns from and is judged on, and how.

    Attributes:
        held_out: pictures that no step sees, judged while training; empty where there are none.
        test: touched once, at the end.
        judged: what `test` is called: "test", "val" or "held-out".
        drawn: the names of the pictures in splits that were drawn here, not given by the data.
        label_smoothing: this much of every target is spread evenly over all classes (Szegedy et al. 2016, arXiv 1512.00567).
        notes: sentences for a person on where the network comes from.
        before: what the model that it started from says of its own data.
        shares: how many parts, which go through the network one after the other, this process's share of a step has.
    """

    net: ResNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    loader: Loader
    held_out: Pictures
    test: Pictures
    data: dict[str, str]
    engine: Engine
    judged: str = "test"
    drawn: Mapping[str, Sequence[str]] = field(default_factory=dict)
    label_smoothing: float = 0.0
    notes: Sequence[str] = ()
    shares: int = 1
    before: Mapping[str, Any] = field(default_factory=dict)

    def parts(self, step: int) -> list[Batch]:
        """The parts of this process's share of step `step`."""
        batch = self.loader.batch(step)
        if self.shares == 1:
            return [batch]
        if len(batch.labels) < 2 * self.shares:
            raise DataError(f"too few of the pictures of step {step:,} can be read; mend them: residuum data check.")
        return [Batch(*part) for part in zip(*(each.tensor_split(self.shares) for each in batch), strict=True)]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats, and the share of pictures whose highest score is another class; both scalars.

        Of a mixed picture the class counts of which it shows most.
        """
        logits = self._forward(batch.pictures).float()  # (B, classes)
        wrong = (logits.detach().argmax(1) != batch.labels).float().mean()
        return F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing), wrong

    @cached_property
    def _forward(self) -> Callable[[Tensor], Tensor]:
        return self.engine.forward(self.net)

    def judge(self, split: Pictures) -> Judgement:
        """Judges the network as it is now."""
        return judge(self.net, split, self.preprocessing, self.classes, self.engine, world=self.engine.world)

    def judge_held_out(self) -> dict[str, float] | None:
        """Top-1 error and loss on the held-out pictures."""
        if not len(self.held_out):
            return None
        judgement = self.judge(self.held_out)
        return {"top1_error": judgement.top1_error, "loss": judgement.loss}

    def close(self) -> None:
        """Ends the loader's processes."""
        self.loader.close()

    def views(self, split: Pictures) -> Views:
        """The pictures of a split that was judged, as the network got them, in the judgement's order."""
        return Views(split.readable() if isinstance(split, Stored) else split, self.preprocessing)

    def samples(self) -> Samples | None:
        """The pictures that the model file keeps (models.samples); None where none of them can be read."""
        train, kept = self.loader.split, self.held_out
        size = math.prod((*self.preprocessing.size, self.preprocessing.channels))
        if len(kept):
            learnt, checked = spread(len(train), MOST_TRAINING, size), spread(len(kept), MOST_CHECK, size)
        else:  # of one split, taking turns
            kept, both = train, spread(len(train), 2 * MOST_CHECK, size // 2)
            learnt, checked = both[::2], both[1::2]
        check, training = self._read(kept, checked), self._read(train, learnt)
        if not check:
            return None
        labels = kept.labels[torch.tensor([i for i, _ in check])]
        h, w, c = (*self.preprocessing.size, self.preprocessing.channels)
        learnt_from = [x for _, x in training]
        return Samples(
            torch.stack([x for _, x in check]),
            labels.to(torch.int64),
            torch.stack(learnt_from) if learnt_from else torch.empty(0, h, w, c, dtype=torch.uint8),
        )

    def _read(self, split: Pictures, positions: Sequence[int]) -> list[tuple[int, Tensor]]:
        """(position, uint8 (h, w, C)) of those that can be read."""
        views, found = Views(split, self.preprocessing), []
        for i in positions:
            with contextlib.suppress(DataError):
                found.append((i, views[i].clone()))
        return found

    @property
    def skipped(self) -> Mapping[str, str]:
        """name -> why, of the pictures left out so far because they could not be read."""
        splits = (self.loader.split, self.held_out, self.test)
        return {name: why for split in splits if isinstance(split, Stored) for name, why in split.skipped.items()}

    def bundle(self, recipe: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> Bundle:
        """All that goes into the model file."""
        from residuum import __version__

        versions = {"residuum": __version__, "torch": torch.__version__}
        seen = [self.loader.split, *([self.held_out] if "judged while training" in self.drawn else [])]
        marks = marked(seen, [self.test] if self.judged in self.drawn else [], self.before)
        return Bundle(
            net=self.net,
            classes=self.classes,
            preprocessing=self.preprocessing,
            recipe=recipe,
            metrics=metrics,
            data=self.data | marks,
            versions=versions,
        )


def prepare(
    *,
    data: str,
    data_dir: Path,
    reading: Reading,
    network: Network,
    size: int,
    resize: int,
    normalise: str,
    held_out: int,
    crop: Crop,
    augmentation: Augmentation,
    mixing: Mixing,
    label_smoothing: float,
    batch: int,
    shares: int,
    seed: int,
    engine: Engine,
) -> Classify:
    """Reads the data, holds pictures out, takes the training pictures' statistics, and builds the network.

    Args:
        size: side of the network's input, in pixels.
        resize: the shorter side is brought to this many pixels before the centre is cut out; 0 for `size`.
        normalise: "per-pixel mean" (2015 §4.2: the mean alone), "per-channel mean and std", or "as start_from" (the model's).
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
    net, start, notes = network.build(channels, source.classes)
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
    preprocessing = _normalised(normalise, train, shape, start)
    origin = {"start_from": digest(network.start_from)} if start else {}
    before = start.data if start else {}
    if n := int(known(before, source, source.test).seen.sum()):
        notes.append(
            f"{n:,} of the {len(source.test):,} pictures to test on were seen in the training of {network.start_from}"
        )
    engine.place(net)
    return Classify(
        net=net,
        classes=source.classes,
        preprocessing=preprocessing,
        loader=Loader(
            train, preprocessing, augmentation, batch, seed, engine, crop, mixing, len(source.classes), engine.world
        ),
        held_out=kept,
        test=test,
        data={"name": sources.short_name(data), "fingerprint": source.fingerprint} | origin,
        engine=engine,
        judged=source.judged,
        drawn=drawn,
        label_smoothing=label_smoothing,
        notes=notes,
        shares=shares,
        before=before,
    )


def _normalised(normalise: str, train: Pictures, shape: Preprocessing, start: Bundle | None) -> Preprocessing:
    """The preprocessing with the training pictures' mean and deviation, or those of the model that training starts from."""
    if normalise != "as start_from":
        return statistics(train, shape, normalise == "per-pixel mean")
    if start is None:
        raise UsageError("normalise='as start_from' needs a model to start from: --start-from MODEL.")
    theirs = start.preprocessing
    mean = theirs.mean if theirs.mean.ndim == 1 or theirs.size == shape.size else theirs.mean.mean((0, 1))
    return replace(theirs, size=shape.size, resize=shape.resize, mean=mean)
