"""One training step: forward and backward of each micro-batch, the mean of the gradients, the update."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnetlab.errors import DivergedError
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.compilation import GRAPH_MODES
from resnetlab.training.exchange import GradientExchange
from resnetlab.training.micro_batches import TreeMean, take_gradients
from resnetlab.training.run_state import INITIAL_SCALE, RunState

SMALLEST_SCALE = 2.0**-10  # of fp16's loss; below it the run has diverged


class StepOutput(NamedTuple):
    """Figures of a step before its update; scalars on the device, without synchronisation."""

    loss: Tensor
    error: Tensor  # the share of images whose highest score is another class
    grad_norm: Tensor  # norm of the gradient before clipping; 0 where fp16 overflowed and the update was left out


# (state, this process's micro-batches) -> loss and error; leaves the gradients in the parameters
Gradients = Callable[[TrainState, Sequence[Any]], Sequence[Tensor]]


def compute_gradients(
    train_state: TrainState, micro_batches: Sequence[Any], seed: Callable[[int], None] | None = None
) -> list[Tensor]:
    """Loss, error and gradients, each the mean over all micro-batches of all processes; also moves BN's averages.

    Args:
        seed: called with a micro-batch's number before its forward pass, to seed what the network draws.
    """
    world, exchange, seed = train_state.task.device_config.world, train_state.exchange, seed or train_state.seed_network
    if len(micro_batches) * world.size == 1:
        seed(0)
        return [*_forward_backward(train_state, micro_batches[0]), *train_state.optimizer.grads()]
    if exchange is not None:
        exchange.start(len(micro_batches))
    return set_means(train_state, add_micro_batches(train_state, micro_batches, seed, exchange).result())


def add_micro_batches(
    train_state: TrainState,
    micro_batches: Sequence[Any],
    seed: Callable[[int], None],
    exchange: GradientExchange | None,
) -> TreeMean:
    """Loss, error, gradients and BN's averages of this process's micro-batches; with an exchange the gradients go there."""
    task, optimizer, statistics = train_state.task, train_state.optimizer, train_state.statistics
    mean, first = TreeMean(task.device_config.world), task.device_config.world.rank * len(micro_batches)
    statistics.save()
    for number, micro_batch in enumerate(micro_batches):
        seed(first + number)
        with contextlib.nullcontext() if exchange is None else exchange.own.collecting(number):
            results = _forward_backward(train_state, micro_batch)
        results += take_gradients(optimizer.parameters.values()) if exchange is None else []
        if task.device_config.compile_mode in GRAPH_MODES:  # the next forward pass takes the graph's memory again
            results = [x.clone() for x in results]
        mean.add(results + statistics.rewind())
    return mean


def _forward_backward(train_state: TrainState, micro_batch: Any) -> list[Tensor]:
    """Loss and error of a micro-batch, whose gradients are added to the parameters'."""
    with train_state.task.device_config.autocast():
        loss, error = train_state.task.loss(micro_batch)
    scaled = loss if train_state.loss_scale is None else loss * train_state.loss_scale
    scaled.backward()  # type: ignore[no-untyped-call]
    return [loss.detach(), error]


def set_means(train_state: TrainState, results: list[Tensor]) -> list[Tensor]:
    """Sets BN's averages and the gradients to their means, which end `results` unless they come from the exchange.

    Returns loss, error and gradients.
    """
    averages = train_state.statistics.averages
    count = len(results) - len(averages)
    train_state.statistics.set(results[count:])
    results = results[:count] + ([] if train_state.exchange is None else train_state.exchange.result())
    train_state.optimizer.set_grads(results[2:])
    return results


def train_step(
    train_state: TrainState, micro_batches: Sequence[Any], lr: float, gradients: Gradients = compute_gradients
) -> StepOutput:
    """Updates the network once by the mean of the gradients of all micro-batches of all processes.

    Args:
        micro_batches: this process's share of the step.
        gradients: `compute_gradients`, or a bit-identical replacement.
    """
    optimizer, state, scale = train_state.optimizer, train_state.state, train_state.loss_scale
    if scale is not None:
        state.loss_scale = state.loss_scale or INITIAL_SCALE
        scale.fill_(state.loss_scale)
    loss, error, *_ = gradients(train_state, micro_batches)
    if scale is not None:
        torch._foreach_mul_(optimizer.grads(), 1 / state.loss_scale)
    norm = optimizer.clip_grad_norm(train_state.recipe.clip_norm)
    if scale is not None and not _keep_update(state, norm):
        optimizer.zero_grad()
        norm = torch.zeros_like(norm)
    else:
        optimizer.step(lr)
    state.step += 1
    train_state.average.update(state.step)
    return StepOutput(loss, error, norm)


def _keep_update(state: RunState, norm: Tensor) -> bool:
    """Whether the gradients of an fp16 step are finite, which adapts the scale; as GradScaler's, waits for the device.

    Raises DivergedError where no scale is small enough.
    """
    finite = bool(norm.isfinite())
    state.update_loss_scale(finite)
    if state.loss_scale < SMALLEST_SCALE:
        raise DivergedError(
            f"the gradients overflow in fp16 at step {state.step:,}, whatever the loss's scale; try --set precision=fp32, or a "
            "smaller learning rate."
        )
    return finite
