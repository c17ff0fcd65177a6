"""One step: forward, backward, update. There is one path through it."""

from __future__ import annotations

from torch import Tensor

from residuum.data.loader import Batch
from residuum.tasks.classify import Classify
from residuum.training.optim import SGD


def train_step(task: Classify, optimizer: SGD, batch: Batch, lr: float) -> tuple[Tensor, Tensor]:
    """Updates the network once.

    Returns:
        The loss and the training error of the batch before the update; scalars on the device, not waited for.
    """
    with task.engine.autocast():
        loss, wrong = task.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step(lr)
    return loss.detach(), wrong
