"""One training step: forward and backward of each micro-batch, the mean of the gradients, the update."""

from __future__ import annotations

import contextlib
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


# (state, this process's micro-batches) -> loss and error; leaves the gradients in the parameters
Gradients = Callable[[TrainState, Sequence[Any]], Sequence[Tensor]]


def compute_gradients(
    train_state: TrainState, micro_batches: Sequence[Any], seed: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Loss, error and gradients, each the mean over all micro-batches of all processes; also moves BN's averages.

    Args:
        seed: called with a micro-batch's number before its forward pass, to seed what the network draws.
    """
    task, optimizer, statistics = train_state.task, train_state.optimizer, train_state.statistics
    seed = seed or train_state.seed_network
    world, exchange = task.device_config.world, train_state.exchange
    mean, first = TreeMean(world), world.rank * len(micro_batches)
    shared = len(micro_batches) * world.size > 1
    if shared:
        statistics.save()
    if exchange is not None:
        exchange.start(len(micro_batches))
    for number, micro_batch in enumerate(micro_batches):
        seed(first + number)
        with task.device_config.autocast():
            loss, error = task.loss(micro_batch)
        with contextlib.nullcontext() if exchange is None else exchange.own.collecting(number):
            loss.backward()  # type: ignore[no-untyped-call]
        results = [loss.detach(), error, *optimizer.grads()]  # no gradients where they are exchanged
        if shared:
            mean.add(results + statistics.rewind())
            optimizer.zero_grad()
    if shared:
        results = mean.result()
        count = len(results) - len(statistics.averages)
        statistics.set(results[count:])
        results = results[:count] + ([] if exchange is None else exchange.result())
        optimizer.set_grads(results[2:])
    return results


def train_step(
    train_state: TrainState, micro_batches: Sequence[Any], lr: float, gradients: Gradients = compute_gradients
) -> StepOutput:
    """Updates the network once by the mean of the gradients of all micro-batches of all processes.

    Args:
        micro_batches: this process's share of the step.
        gradients: `compute_gradients`, or a bit-identical replacement.
    """
    loss, error, *_ = gradients(train_state, micro_batches)
    norm = train_state.optimizer.clip_grad_norm(train_state.recipe.clip_norm)
    train_state.optimizer.step(lr)
    train_state.state.step += 1
    train_state.average.update(train_state.state.step)
    return StepOutput(loss, error, norm)
