"""What detection and segmentation share: what they are prepared from, the network they start from, and the task's frame.

begun = begin(plan, read, bn)             pictures held out, network and statistics; the head's values follow from these
begun.task(Detect, plan, values, net, …)  the task
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from residuum.data.ahead import Ahead
from residuum.data.parts import Marked, Parts, held_out
from residuum.data.samples import FLIPS, Draw, Read, Samples, accept
from residuum.errors import DataError, UsageError, unknown
from residuum.models.bundle import load_bundle
from residuum.models.dense_file import DenseBundle
from residuum.models.resnet import ResNet, assemble
from residuum.models.spec import Specification, specification
from residuum.models.values import Dense
from residuum.runtime import Engine, seed_for

MOST = 256  # pictures that the statistics are taken from

P = TypeVar("P", bound=Marked)
S = TypeVar("S")
T = TypeVar("T", bound="DenseTask[Any, Any]")


@dataclass(frozen=True, kw_only=True)
class Plan(Generic[P]):
    """What both are prepared from.

    Attributes:
        name: of the data, for the record.
        net, specification: the network and what is changed in its specification.
        start_from: a classifier's model file to start from; None for random weights.
        sides: other lengths of the shorter side that training draws from.
        held: how many training pictures are kept for judging while training; chosen by name, the same for every seed.
        bn_batch: pictures that go through the network together; 0 for all of a process's share of a step.
    """

    data: Parts[P]
    name: str
    net: str
    specification: Mapping[str, Any]
    init: str
    start_from: Path | None
    sides: tuple[int, ...]
    flips: str
    held: int
    on_bad: str
    batch: int
    bn_batch: int
    seed: int
    engine: Engine
    workers: int


@dataclass(frozen=True, eq=False, kw_only=True)
class DenseTask(Generic[P, S]):
    """The frame of both (`tasks.task`); each adds its loss and its judgement.

    Attributes:
        held_out: pictures that no step sees, judged while training; empty where there are none.
        test: touched once, at the end; `judged` is what it is called.
    """

    task: ClassVar[str]
    option: ClassVar[str]  # what decides on pictures that cannot be used

    net: nn.Module
    spec: Specification
    values: Dense
    classes: tuple[str, ...]
    steps: Ahead[Read[S]]
    train: Sequence[P]
    held_out: Sequence[P]
    test: Sequence[P]
    judged: str
    data: Mapping[str, str]
    engine: Engine
    on_bad: str
    skipped: dict[str, str]
    drawn: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def parts(self, step: int) -> list[list[S]]:
        """This process's share of step `step`, in its parts."""
        return accept(self.steps.get(step), self.on_bad == "stop", self.skipped, self.option)

    def close(self) -> None:
        """Ends the processes that read."""
        self.steps.close()

    def bundle(self, recipe: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> DenseBundle:
        """All that goes into the model file."""
        from residuum import __version__

        versions = {"residuum": __version__, "torch": torch.__version__}
        return DenseBundle(
            self.task, self.net, self.spec, self.values, self.classes, recipe, metrics, self.data, versions
        )


class Begun(NamedTuple, Generic[P]):
    """Pictures divided, and the network that a head is put on."""

    train: tuple[P, ...]
    held_out: tuple[P, ...]
    drawn: dict[str, list[str]]
    skipped: dict[str, str]
    start: Start

    def task(self, kind: type[T], plan: Plan[P], values: Dense, net: nn.Module, make: Callable[[P, Draw], Any]) -> T:
        """The task of a network that is ready; `make` makes a sample of a picture."""
        steps = Samples(self.train, make, plan.batch, plan.seed, plan.flips, plan.engine.world, plan.bn_batch)
        return kind(
            net=plan.engine.place(net),
            spec=self.start.net.spec,
            values=values,
            classes=plan.data.classes,
            steps=Ahead(steps, plan.workers),
            train=self.train,
            held_out=self.held_out,
            test=plan.data.test,
            judged=plan.data.judged,
            data={"name": plan.name, "fingerprint": plan.data.fingerprint + self.start.digest},
            engine=plan.engine,
            on_bad=plan.on_bad,
            skipped=self.skipped,
            drawn=self.drawn,
        )


def begin(plan: Plan[P], read: Callable[[P], Tensor], bn: str) -> Begun[P]:
    """Holds pictures out and builds the network to start from; `read` gives a picture's pixels, uint8 (H, W, 3).

    Raises:
        DataError, UsageError: what the data, the network's name or a value cannot be.
    """
    if plan.flips not in FLIPS:
        raise unknown("flips", plan.flips, FLIPS)
    train, kept, drawn = divided(plan.data, plan.held)
    skipped = dict(plan.data.skipped)
    pictures = readable(train, read, plan.on_bad, skipped)
    return Begun(
        train,
        kept,
        drawn,
        skipped,
        start(plan.net, plan.specification, plan.start_from, plan.init, plan.seed, bn, pictures),
    )


class Start(NamedTuple):
    """The network to start from, mean and deviation of channels in units of [0, 1], and a digest of its weights ("": none)."""

    net: ResNet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def start(
    net: str,
    changes: Mapping[str, Any],
    start_from: Path | None,
    init: str,
    seed: int,
    bn: str,
    pictures: Iterator[Tensor],
) -> Start:
    """A classifier from its model file, with the preprocessing it knows; or a new network, and the statistics of pictures.

    Args:
        net, changes: the network and what is changed in its specification.
        start_from: a classifier's model file; None starts from random weights.
        bn: "live", or "fixed", which needs the statistics of a model file.
        pictures: training pictures, uint8 (H, W, 3); read only where there is no model file.

    Raises:
        UsageError: the file holds another network, or none is given where BN is fixed.
        ModelFileError: it cannot be read.
    """
    spec = specification(net, **{"channels": 3, "classes": 1} | dict(changes))
    if start_from is None:
        if bn == "fixed":
            raise UsageError(
                "bn=fixed keeps the statistics of a classifier, but there is none: give --start-from MODEL, or --set bn=live."
            )
        mean, std = statistics(pictures)
        return Start(assemble(spec, init=init, seed=seed_for(seed, "init")), mean, std, "")
    bundle = load_bundle(start_from)
    if replace(bundle.spec, classes=1) != replace(spec, classes=1):
        raise UsageError(
            f"{start_from} holds another network than {net}; name its own with --net, and with --set what it changes in it."
        )
    kept = bundle.preprocessing
    average = kept.mean if kept.mean.ndim == 1 else kept.mean.mean((0, 1))
    digest = hashlib.sha256()
    for tensor in bundle.net.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return Start(bundle.net.train(), tuple(average.tolist()), tuple(kept.std.tolist()), digest.hexdigest()[:16])


def divided(data: Parts[P], held: int) -> tuple[tuple[P, ...], tuple[P, ...], dict[str, list[str]]]:
    """The pictures to train on and those judged meanwhile, and the names in splits that were drawn here.

    Raises DataError where there are none, UsageError where pictures are to be held out of data that have a part for it.
    """
    if not data.train:
        raise DataError(f"{data.name} has no train split; there is nothing to learn from.")
    drawn = {"held-out": [p.name for p in data.test]} if data.judged == "held-out" else {}
    if not held:
        return data.train, data.val, drawn
    if data.val:
        raise UsageError(f"{data.name} has a val split, which is judged while training; leave out held_out={held}.")
    train, kept = held_out(data.train, held)
    return train, kept, drawn | {"judged while training": [p.name for p in kept]}


def readable(
    pictures: Sequence[P], read: Callable[[P], Tensor], on_bad: str, skipped: dict[str, str]
) -> Iterator[Tensor]:
    """Some MOST pictures spread over all, as `read` gives them; one that cannot be read is noted, or stops the work."""
    for picture in pictures[:: max(1, len(pictures) // MOST)]:
        try:
            yield read(picture)
        except DataError as error:
            if on_bad == "stop":
                raise
            skipped[picture.name] = str(error)


def statistics(pictures: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over pictures of any sizes, uint8 (H, W, 3), in units of [0, 1]."""
    total, squares, n = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0
    for pixels in pictures:
        wide = pixels.reshape(-1, 3).to(torch.int64)
        total, squares, n = total + wide.sum(0), squares + wide.square().sum(0), n + len(wide)
    if not n:
        raise DataError("no training picture can be read.")
    mean = total.double() / n / 255
    std = (squares.double() / n / 255**2 - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(round(v, 6) for v in mean.tolist()), tuple(max(round(v, 6), 1e-6) for v in std.tolist())
