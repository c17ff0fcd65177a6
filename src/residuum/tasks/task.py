"""What the loop asks of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from residuum.runtime import Engine


class Task(Protocol):
    """A network, the pictures it learns from and is judged on, and how; the loop knows neither pictures nor labels.

    `train_step` calls `loss` on every one of `parts(step)`; now and then `judge_held_out` is asked what the network can do.
    """

    @property
    def net(self) -> nn.Module:
        """What is trained; its parameters and statistics are what a checkpoint keeps."""

    @property
    def engine(self) -> Engine: ...

    @property
    def data(self) -> Mapping[str, str]:
        """Name and fingerprint of the training data."""

    @property
    def drawn(self) -> Mapping[str, Sequence[str]]:
        """The names of the pictures in splits that were drawn here, not given by the data."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """name -> why, of what was left out so far."""

    def parts(self, step: int) -> Sequence[Any]:
        """The input of step `step`, a function of the seed and the step alone, in parts that go through the network in turn."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss, and an error in [0, 1] that a person can follow; both scalars."""

    def judge_held_out(self) -> dict[str, float] | None:
        """Figures on the held-out pictures, the one to watch first; None where nothing is held out."""

    def close(self) -> None:
        """Ends what was started for reading."""
