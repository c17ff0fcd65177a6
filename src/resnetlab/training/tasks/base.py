"""What the training loop needs from a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from resnetlab.device import DeviceConfig


class Task(Protocol):
    """A network, its training data, its loss and its evaluation; the loop knows neither images nor labels.

    `train_step` calls `loss` on each of `micro_batches(step)`; from time to time the loop calls `evaluate_held_out`.
    """

    @property
    def net(self) -> nn.Module:
        """The network to train; a checkpoint keeps its parameters and buffers."""

    @property
    def device_config(self) -> DeviceConfig: ...

    @property
    def data(self) -> Mapping[str, str]:
        """Name and fingerprint of the training data."""

    @property
    def holdout(self) -> Mapping[str, Sequence[str]]:
        """Split -> names of its images, for the splits that were drawn here rather than given by the data."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """name -> reason, of what was skipped so far."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """The input of a step, a function of seed and step alone, as micro-batches that go through the network in turn."""

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss, and an error in [0, 1] to report; both scalars."""

    def evaluate_held_out(self) -> dict[str, float] | None:
        """Figures on the held-out images, the most important first; None if nothing is held out."""

    def close(self) -> None:
        """Stops the processes that read data."""
