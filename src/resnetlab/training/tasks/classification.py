"""Classification: one label per image, cross entropy, top-1 error."""

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

from resnetlab.data import sources
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import MemorySplit, Split, split_stratified
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.fingerprints import match_fingerprints, record_fingerprints
from resnetlab.data.mixing import Mixing
from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.data.sampler import Batch, TrainLoader
from resnetlab.data.statistics import compute_statistics
from resnetlab.device import DeviceConfig
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation.evaluate import evaluate_network, prepare_split
from resnetlab.evaluation.metrics import ClassificationMetrics
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.reference_images import MAX_CHECK, MAX_TRAINING, ReferenceImages, spread_positions
from resnetlab.models.resnet import ResNet
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.tasks.starting_network import NetworkOptions, file_digest

NORMALISATIONS = ("per-pixel mean", "per-channel mean and std", "as start_from")


@dataclass(frozen=True, eq=False)
class ClassificationTask:
    """A classifier, its training data and the images it is evaluated on.

    Attributes:
        held_out: images that no step sees, evaluated during training; may be empty.
        test: evaluated once, at the end.
        evaluated_split: the name of `test`: "test", "val" or "held-out".
        holdout: split -> names of its images, for the splits that were drawn here rather than given by the data.
        label_smoothing: the share of every target that is spread evenly over all classes (Szegedy et al., arXiv 1512.00567).
        notes: sentences on where the network comes from.
        start_fingerprints: the fingerprints of the model that training started from.
        num_micro_batches: of this process's share of a step; they go through the network one after the other.
    """

    net: ResNet
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    loader: TrainLoader
    held_out: Split
    test: Split
    data: dict[str, str]
    device_config: DeviceConfig
    evaluated_split: str = "test"
    holdout: Mapping[str, Sequence[str]] = field(default_factory=dict)
    label_smoothing: float = 0.0
    notes: Sequence[str] = ()
    num_micro_batches: int = 1
    start_fingerprints: Mapping[str, Tensor] = field(default_factory=dict)

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this process's share of step `step`."""
        batch = self.loader.batch(step)
        if self.num_micro_batches == 1:
            return [batch]
        if len(batch.labels) < 2 * self.num_micro_batches:
            raise DataError(f"too few of the images of step {step:,} can be read; fix them: resnetlab data check.")
        return [
            Batch(*part) for part in zip(*(each.tensor_split(self.num_micro_batches) for each in batch), strict=True)
        ]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats, and the share of images whose highest score is another class; both scalars.

        A mixed image counts as the class that it shows most of.
        """
        logits = self._forward(batch.images).float()  # (B, classes)
        wrong = (logits.detach().argmax(1) != batch.labels).float().mean()
        return F.cross_entropy(logits, batch.targets, label_smoothing=self.label_smoothing), wrong

    @cached_property
    def _forward(self) -> Callable[[Tensor], Tensor]:
        return self.device_config.forward_fn(self.net)

    def evaluate(self, split: Split) -> ClassificationMetrics:
        """Evaluates the network in its present state."""
        return evaluate_network(
            self.net, split, self.preprocessing, self.classes, self.device_config, world=self.device_config.world
        )

    def evaluate_held_out(self) -> dict[str, float] | None:
        """Top-1 error and loss on the held-out images."""
        if not len(self.held_out):
            return None
        evaluation = self.evaluate(self.held_out)
        return {"top1_error": evaluation.top1_error, "loss": evaluation.loss}

    def close(self) -> None:
        """Stops the loader's processes."""
        self.loader.close()

    def evaluated_images(self, split: Split) -> PreprocessedSplit:
        """The images of an evaluated split as the network got them, in the evaluation's order."""
        return PreprocessedSplit(split.without_skipped(), self.preprocessing)

    def reference_images(self) -> ReferenceImages | None:
        """The images that the model file keeps (models.reference_images); None if none of them can be read."""
        train, kept = self.loader.split, self.held_out
        size = math.prod((*self.preprocessing.size, self.preprocessing.channels))
        if len(kept):
            learnt, checked = (
                spread_positions(len(train), MAX_TRAINING, size),
                spread_positions(len(kept), MAX_CHECK, size),
            )
        else:  # alternately, from one split
            kept, both = train, spread_positions(len(train), 2 * MAX_CHECK, size // 2)
            learnt, checked = both[::2], both[1::2]
        check, training = self._read(kept, checked), self._read(train, learnt)
        if not check:
            return None
        labels = kept.labels[torch.tensor([i for i, _ in check])]
        h, w, c = (*self.preprocessing.size, self.preprocessing.channels)
        learnt_from = [x for _, x in training]
        return ReferenceImages(
            torch.stack([x for _, x in check]),
            labels.to(torch.int64),
            torch.stack(learnt_from) if learnt_from else torch.empty(0, h, w, c, dtype=torch.uint8),
        )

    def _read(self, split: Split, positions: Sequence[int]) -> list[tuple[int, Tensor]]:
        """(position, uint8 (h, w, C)) of the images that can be read."""
        views, found = PreprocessedSplit(split, self.preprocessing), []
        for i in positions:
            with contextlib.suppress(DataError):
                found.append((i, views[i].clone()))
        return found

    @property
    def skipped(self) -> Mapping[str, str]:
        """name -> reason, of the images skipped so far because they could not be read."""
        splits = (self.loader.split, self.held_out, self.test)
        return {name: why for split in splits for name, why in split.errors.skipped.items()}

    def trained_model(self, recipe: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> TrainedModel:
        """The content of the model file."""
        from resnetlab import __version__

        versions = {"resnetlab": __version__, "torch": torch.__version__}
        seen = [self.loader.split, *([self.held_out] if "evaluated while training" in self.holdout else [])]
        held_out = [self.test] if self.evaluated_split in self.holdout else []
        return TrainedModel(
            net=self.net,
            classes=self.classes,
            preprocessing=self.preprocessing,
            recipe=recipe,
            metrics=metrics,
            data=self.data,
            versions=versions,
            fingerprints=record_fingerprints(seen, held_out, self.start_fingerprints),
        )


def prepare(
    *,
    data: str,
    data_dir: Path,
    reading: ReadOptions,
    network: NetworkOptions,
    size: int,
    resize: int,
    normalise: str,
    held_out: int,
    crop: Crop,
    augmentation: Augmentation,
    mixing: Mixing,
    label_smoothing: float,
    batch: int,
    num_micro_batches: int,
    seed: int,
    device_config: DeviceConfig,
) -> ClassificationTask:
    """Loads the data, holds images out, computes the training images' statistics, and builds the network.

    Args:
        size: side of the network's input, in pixels.
        resize: the shorter side is resized to this many pixels before the centre crop; 0 for `size`.
        normalise: "per-pixel mean" (2015 §4.2: the mean alone), "per-channel mean and std", or "as start_from" (the model's).
        held_out: how many training images are held out for evaluation during training; stratified, the same for every seed.

    Raises:
        DataError, UsageError: the data, the network's name or a value cannot be used.
    """
    if normalise not in NORMALISATIONS:
        raise UsageError(f"unknown normalise {normalise!r}; known: {', '.join(map(repr, NORMALISATIONS))}.")
    source = sources.load_dataset(data, data_dir, reading)
    if not len(source.train):
        raise DataError(
            f"{data} has no train folder; training needs class folders, or train/ with class folders in it."
        )
    channels = source.train.images.shape[-1] if isinstance(source.train, MemorySplit) else 3
    net, start, notes = network.build(channels, source.classes)
    shape = Preprocessing(channels, (size, size), resize or size, torch.zeros(channels), torch.ones(channels))
    everything, test = (
        split if crop.kind != "centre" else prepare_split(split, shape) for split in (source.train, source.test)
    )
    train, kept = everything, source.val or everything.subset(torch.empty(0, dtype=torch.long))
    drawn = {source.evaluated_split: source.test.names} if source.all_images is not None else {}
    if held_out:
        if source.val is not None:
            raise UsageError(
                f"{data} has a val folder, which is evaluated while training; leave out val_images={held_out}."
            )
        rest, chosen = split_stratified(everything.labels, held_out)
        train, kept = everything.subset(rest), everything.subset(chosen)
        drawn = drawn | {"evaluated while training": kept.names}
    preprocessing = _normalised(normalise, train, shape, start)
    origin = {"start_from": file_digest(network.start_from)} if start else {}
    known = start.fingerprints if start else {}
    trained_on = start.data.get("fingerprint", "") if start else ""
    if n := int(match_fingerprints(known, trained_on, source, source.test).seen.sum()):
        notes.append(
            f"{n:,} of the {len(source.test):,} images to test on were seen in the training of {network.start_from}"
        )
    device_config.place(net)
    return ClassificationTask(
        net=net,
        classes=source.classes,
        preprocessing=preprocessing,
        loader=TrainLoader(
            train,
            preprocessing,
            augmentation,
            batch,
            seed,
            device_config,
            crop,
            mixing,
            len(source.classes),
            device_config.world,
        ),
        held_out=kept,
        test=test,
        data={"name": sources.short_name(data), "fingerprint": source.fingerprint} | origin,
        device_config=device_config,
        evaluated_split=source.evaluated_split,
        holdout=drawn,
        label_smoothing=label_smoothing,
        notes=notes,
        num_micro_batches=num_micro_batches,
        start_fingerprints=known,
    )


def _normalised(normalise: str, train: Split, shape: Preprocessing, start: TrainedModel | None) -> Preprocessing:
    """The preprocessing with the training images' mean and standard deviation, or those of the start model."""
    if normalise != "as start_from":
        return compute_statistics(train, shape, normalise == "per-pixel mean")
    if start is None:
        raise UsageError("normalise='as start_from' needs a model to start from: --start-from MODEL.")
    theirs = start.preprocessing
    mean = theirs.mean if theirs.mean.ndim == 1 or theirs.size == shape.size else theirs.mean.mean((0, 1))
    return replace(theirs, size=shape.size, resize=shape.resize, mean=mean)
