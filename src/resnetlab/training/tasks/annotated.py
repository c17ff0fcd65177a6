"""Code shared by detection and segmentation: the task's base class, its preparation, and the network that training starts from.

prepared = prepare_data(plan, read, bn)                  holds images out, builds the network, computes statistics
prepared.build_task(DetectionTask, plan, head_spec, …)   the task
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from resnetlab.data.annotated_dataset import AnnotatedDataset, AnnotatedItem, hold_out_images
from resnetlab.data.annotated_sampler import FLIPS, AnnotatedLoader, AugmentationDraw
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.device import DeviceConfig
from resnetlab.errors import DataError, UsageError, unknown_name_error
from resnetlab.models.annotated_model import AnnotatedModel
from resnetlab.models.head_spec import HeadSpec
from resnetlab.models.model_file import load_trained_model
from resnetlab.models.resnet import ResNet, build_from_spec
from resnetlab.models.spec import Specification, get_specification
from resnetlab.random import seed_for

STATISTICS_IMAGES = 256  # about so many images give the channel statistics

P = TypeVar("P", bound=AnnotatedItem)
S = TypeVar("S")
T = TypeVar("T", bound="AnnotatedTask[Any, Any]")


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[P]):
    """What a task is prepared from.

    Attributes:
        name: name of the data that the model file records.
        net, specification: the network and the changes to its specification.
        start_from: a classifier's model file to start from; None for random weights.
        sides: further shorter sides that training draws from.
        val_images: training images to hold out for evaluation while training; chosen by name, the same for every seed.
        bn_batch: images of a micro-batch; 0 for all of a process's share of a step.
    """

    data: AnnotatedDataset[P]
    name: str
    net: str
    specification: Mapping[str, Any]
    init: str
    start_from: Path | None
    sides: tuple[int, ...]
    flips: str
    val_images: int
    batch: int
    bn_batch: int
    seed: int
    device_config: DeviceConfig
    workers: int


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnotatedTask(Generic[P, S]):
    """Base class of both tasks (`tasks.base`); each adds its loss and its evaluation.

    Attributes:
        held_out: images evaluated while training and never trained on; may be empty.
        test: the images of `evaluated_split`, evaluated once, at the end.
    """

    task: ClassVar[str]

    net: nn.Module
    spec: Specification
    head_spec: HeadSpec
    classes: tuple[str, ...]
    loader: AnnotatedLoader[P, S]
    train: Sequence[P]
    held_out: Sequence[P]
    test: Sequence[P]
    evaluated_split: str
    data: Mapping[str, str]
    device_config: DeviceConfig
    errors: ErrorPolicy
    holdout: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def micro_batches(self, step: int) -> list[list[S]]:
        """This process's micro-batches of step `step`."""
        return self.loader.micro_batches(step)

    @property
    def skipped(self) -> Mapping[str, str]:
        """name -> reason, of the images and annotations skipped so far."""
        return self.errors.skipped

    def close(self) -> None:
        """Ends the reading processes."""
        self.loader.close()

    def annotated_model(self, recipe: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> AnnotatedModel:
        """The content of the model file."""
        from resnetlab import __version__

        versions = {"resnetlab": __version__, "torch": torch.__version__}
        return AnnotatedModel(
            self.task, self.net, self.spec, self.head_spec, self.classes, recipe, metrics, self.data, versions
        )


class PreparedData(NamedTuple, Generic[P]):
    """The divided images, and the network that gets a head."""

    train: tuple[P, ...]
    held_out: tuple[P, ...]
    holdout: dict[str, list[str]]
    start: StartingNetwork

    def build_task(
        self,
        kind: type[T],
        plan: Plan[P],
        head_spec: HeadSpec,
        net: nn.Module,
        make_sample: Callable[[P, AugmentationDraw], Any],
    ) -> T:
        """The task for a complete network."""
        loader = AnnotatedLoader(
            self.train,
            make_sample,
            plan.batch,
            plan.seed,
            plan.flips,
            world=plan.device_config.world,
            micro_batch=plan.bn_batch,
            errors=plan.data.errors,
            workers=plan.workers,
        )
        return kind(
            net=plan.device_config.place(net),
            spec=self.start.net.spec,
            head_spec=head_spec,
            classes=plan.data.classes,
            loader=loader,
            train=self.train,
            held_out=self.held_out,
            test=plan.data.test,
            evaluated_split=plan.data.evaluated_split,
            data={"name": plan.name, "fingerprint": plan.data.fingerprint + self.start.digest},
            device_config=plan.device_config,
            errors=plan.data.errors,
            holdout=self.holdout,
        )


def prepare_data(plan: Plan[P], read: Callable[[P], Tensor], bn: str) -> PreparedData[P]:
    """Holds images out and builds the network to start from; `read` returns an image's pixels, uint8 (H, W, 3).

    Raises:
        DataError, UsageError: the data, the network's name or a value is invalid.
    """
    if plan.flips not in FLIPS:
        raise unknown_name_error("flips", plan.flips, FLIPS)
    train, held_out, holdout = divide_images(plan.data, plan.val_images)
    some = train[:: max(1, len(train) // STATISTICS_IMAGES)]  # evenly spaced
    images = (pixels for _, pixels in plan.data.errors.read_each(some, read))
    start = build_starting_network(plan.net, plan.specification, plan.start_from, plan.init, plan.seed, bn, images)
    return PreparedData(train, held_out, holdout, start)


class StartingNetwork(NamedTuple):
    """The network, mean and std of channels in units of [0, 1], and a digest of the weights ("" if they are random)."""

    net: ResNet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def build_starting_network(
    net: str,
    changes: Mapping[str, Any],
    start_from: Path | None,
    init: str,
    seed: int,
    bn: str,
    images: Iterator[Tensor],
) -> StartingNetwork:
    """A classifier with its own channel statistics, from a model file; or a new network with the statistics of images.

    Args:
        net, changes: the network and the changes to its specification.
        start_from: a classifier's model file; None starts from random weights.
        bn: "live", or "fixed", which needs the statistics of a model file.
        images: training images, uint8 (H, W, 3); read only without a model file.

    Raises:
        UsageError: the file holds another network, or BN is fixed and there is no file.
        ModelFileError: the file cannot be read.
    """
    spec = get_specification(net, **{"channels": 3, "classes": 1} | dict(changes))
    if start_from is None:
        if bn == "fixed":
            raise UsageError(
                "bn=fixed keeps the statistics of a classifier, but there is none: give --start-from MODEL, or --set bn=live."
            )
        mean, std = channel_statistics(images)
        return StartingNetwork(build_from_spec(spec, init=init, seed=seed_for(seed, "init")), mean, std, "")
    bundle = load_trained_model(start_from)
    if replace(bundle.spec, classes=1) != replace(spec, classes=1):
        raise UsageError(
            f"{start_from} holds another network than {net}; name its own with --net, and its changes with --set."
        )
    preprocessing = bundle.preprocessing
    means = preprocessing.mean if preprocessing.mean.ndim == 1 else preprocessing.mean.mean((0, 1))
    digest = hashlib.sha256()
    for tensor in bundle.net.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return StartingNetwork(
        bundle.net.train(), tuple(means.tolist()), tuple(preprocessing.std.tolist()), digest.hexdigest()[:16]
    )


def divide_images(
    data: AnnotatedDataset[P], val_images: int
) -> tuple[tuple[P, ...], tuple[P, ...], dict[str, list[str]]]:
    """(training images, images evaluated while training, names of the images in each split that was held out here).

    Raises DataError if there is no training image, UsageError if images are to be held out although there is a val split.
    """
    if not data.train:
        raise DataError(f"{data.name} has no train split; there is nothing to train on.")
    holdout = {"held-out": [p.name for p in data.test]} if data.evaluated_split == "held-out" else {}
    if not val_images:
        return data.train, data.val, holdout
    if data.val:
        raise UsageError(
            f"{data.name} has a val split, which is evaluated while training; leave out val_images={val_images}."
        )
    train, held_out = hold_out_images(data.train, val_images)
    return train, held_out, holdout | {"evaluated while training": [p.name for p in held_out]}


def channel_statistics(images: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over images of any sizes, uint8 (H, W, 3), in units of [0, 1]."""
    total, squares, n = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0
    for pixels in images:
        flat = pixels.reshape(-1, 3).to(torch.int64)
        total, squares, n = total + flat.sum(0), squares + flat.square().sum(0), n + len(flat)
    if not n:
        raise DataError("no training image can be read.")
    mean = total.double() / n / 255
    std = (squares.double() / n / 255**2 - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(round(v, 6) for v in mean.tolist()), tuple(max(round(v, 6), 1e-6) for v in std.tolist())
