"""What a run needs besides its recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from resnetlab.data.dataset import Dataset
from resnetlab.data.own_transform import Transform
from resnetlab.training.recipe import Epochs
from resnetlab.training.result import Progress

# a caller's function that sees the figures of evaluations, and may end the run by returning True
OnEvaluate = Callable[[Mapping[str, float]], bool | None]


def ignore(_: Any) -> None:
    """Takes a message or progress that nobody wants."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run needs besides its recipe; nothing here changes the result, apart from the device.

    Attributes:
        data_dir: the folder of the archives; None takes "data", or that of the resumed run.
        device: None takes a GPU if there is one, or the kind of device that the resumed run started on.
        workers: processes that decode images; None decides by the device.
        shard_space: bytes of each machine's disk that sampling=shards may fill; None for most of what is free.
        fit_micro_batch: take the largest micro-batch that fits into memory; a new run's recipe records it as `bn_batch`.
        epochs: the length of a new run in epochs; its recipe records the steps.
        trackers: names in training.trackers.TRACKERS, beside those that a resumed run remembers.
        report: called with sentences on what happens.
        on_progress: called at every line of metrics.jsonl.
        dataset: the data of a classifier, or their new place, if its recipe names none that can be loaded.
        on_evaluate: called with the figures of every evaluation of held-out images; if it returns True the run stops.
        transform: changes training images (data.own_transform).
        net: a classifier's network of the user's own (models.own_network), which is trained in place.
        profile: how many steps to trace, near the start, into the run's trace.json.
    """

    data_dir: Path | None = None
    device: str | None = None
    workers: int | None = None
    shard_space: int | None = None
    fit_micro_batch: bool = False
    epochs: Epochs | None = None
    trackers: tuple[str, ...] = ()
    profile: int = 0
    report: Callable[[str], None] = ignore
    on_progress: Callable[[Progress], None] = ignore
    on_evaluate: OnEvaluate | None = None
    dataset: Dataset | str | None = None
    transform: Transform | None = None
    net: nn.Module | None = None
