"""One step: forward and backward for each of its parts, their mean, update. There is one path through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from residuum.training.checkpoint import Learner
from residuum.training.parts import TreeMean


class Made(NamedTuple):
    """What a step found before its update; scalars on the device, not waited for."""

    loss: Tensor
    wrong: Tensor  # the share of pictures whose highest score is another class
    norm: Tensor  # length of the gradient, before it is clipped


Step = Callable[[Learner, Sequence[Any], float], Made]


def train_step(learner: Learner, parts: Sequence[Any], lr: float) -> Made:
    """Updates the network once, by the mean of the gradients of all parts of all processes.

    Args:
        parts: this process's share of the step, each what goes through the network together.
    """
    return update(learner, gradients(learner, parts, learner.seed_network), lr)


def gradients(learner: Learner, parts: Sequence[Any], seed: Callable[[int], None]) -> list[Tensor]:
    """Loss, share of wrong pictures and the gradients, each the mean over all parts; BN's averages have moved by the step.

    Args:
        seed: called with a part's number before it, for what the network draws.
    """
    task, optimizer, statistics = learner.task, learner.optimizer, learner.statistics
    world = task.engine.world
    mean, first = TreeMean(world), world.rank * len(parts)
    shared = len(parts) * world.size > 1
    if shared:
        statistics.hold()
    for number, part in enumerate(parts, first):
        seed(number)
        with task.engine.autocast():
            loss, wrong = task.loss(part)
        loss.backward()  # type: ignore[no-untyped-call]
        found = [loss.detach(), wrong, *optimizer.gradients()]
        if shared:
            mean.add(found + statistics.rewind())
            optimizer.forget()
    if shared:
        found = mean.result()
        statistics.set(found[len(found) - len(statistics.averages) :])
        found = found[: len(found) - len(statistics.averages)]
        optimizer.receive(found[2:])
    return found


def update(learner: Learner, found: Sequence[Tensor], lr: float) -> Made:
    """Moves the weights by the gradients that are in place, and their average."""
    norm = learner.optimizer.clip(learner.recipe.clip_norm)
    learner.optimizer.step(lr)
    learner.state.step += 1
    learner.average.update(learner.state.step)
    return Made(found[0], found[1], norm)
