"""One training step: forward and backward of each micro-batch, the mean of the gradients, the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from resnetlab.training.checkpoint import TrainState
from resnetlab.training.micro_batches import TreeMean


class StepOutput(NamedTuple):
    """Figures of a step before its update; scalars on the device, without synchronisation."""

    loss: Tensor
    error: Tensor  # the share of images whose highest score is another class
    grad_norm: Tensor  # norm of the gradient before clipping


TrainStep = Callable[[TrainState, Sequence[Any], float], StepOutput]


def train_step(train_state: TrainState, micro_batches: Sequence[Any], lr: float) -> StepOutput:
    """Updates the network once by the mean of the gradients of all micro-batches of all processes.

    Args:
        micro_batches: this process's share of the step.
    """
    return apply_gradients(train_state, compute_gradients(train_state, micro_batches, train_state.seed_network), lr)


def compute_gradients(
    train_state: TrainState, micro_batches: Sequence[Any], seed: Callable[[int], None]
) -> list[Tensor]:
    """Loss, error and gradients, each the mean over all micro-batches; also moves BN's averages.

    Args:
        seed: called with a micro-batch's number before its forward pass, to seed what the network draws.
    """
    task, optimizer, statistics = train_state.task, train_state.optimizer, train_state.statistics
    world = task.device_config.world
    mean, first = TreeMean(world), world.rank * len(micro_batches)
    shared = len(micro_batches) * world.size > 1
    if shared:
        statistics.save()
    for number, micro_batch in enumerate(micro_batches, first):
        seed(number)
        with task.device_config.autocast():
            loss, wrong = task.loss(micro_batch)
        loss.backward()  # type: ignore[no-untyped-call]
        results = [loss.detach(), wrong, *optimizer.grads()]
        if shared:
            mean.add(results + statistics.rewind())
            optimizer.zero_grad()
    if shared:
        results = mean.result()
        statistics.set(results[len(results) - len(statistics.averages) :])
        results = results[: len(results) - len(statistics.averages)]
        optimizer.set_grads(results[2:])
    return results


def apply_gradients(train_state: TrainState, results: Sequence[Tensor], lr: float) -> StepOutput:
    """Updates the weights by their gradients, and the moving average."""
    norm = train_state.optimizer.clip_grad_norm(train_state.recipe.clip_norm)
    train_state.optimizer.step(lr)
    train_state.state.step += 1
    train_state.average.update(train_state.state.step)
    return StepOutput(results[0], results[1], norm)
