"""Checkpoints: everything that the next step depends on, in one safetensors file, written atomically; the last two are kept.

Randomness needs no state (it is a function of seed and step), so a checkpoint holds the network with BN's statistics, the
momentum, the moving average of the weights, the step, what the schedule measured, and the figures gathered since the last line
of metrics.jsonl.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residuum.errors import ModelFileError, RunError
from residuum.models.bundle import read_safetensors, write_safetensors
from residuum.records import Run, writing_error
from residuum.runtime import seed_for
from residuum.tasks.task import Task
from residuum.training.average import Average
from residuum.training.optim import SGD
from residuum.training.parts import Statistics
from residuum.training.recipe import Training


@dataclass
class State:
    """Where a run stands, apart from the network and the optimizer."""

    step: int = 0  # steps done
    warm_since: int | None = None  # under the warm-up rule "train-error": when it ended
    drops: int = 0  # under the schedule "plateau": how often the learning rate was divided
    best: float | None = None  # the lowest held-out error so far, and
    stale: int = 0  # how many judgements ago it was, or since the learning rate was divided
    losses: list[Tensor] = field(default_factory=list)  # of the steps since the last record; scalars
    errors: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0  # of training and judging so far
    step_seconds: float = 0.0  # of training steps alone

    def judged(self, error: float, patience: int) -> None:
        """Counts a judgement under the schedule "plateau" (2015 §3.4)."""
        if self.best is None or error < self.best:
            self.best, self.stale = error, 0
            return
        self.stale += 1
        if self.stale >= patience:
            self.drops, self.stale = self.drops + 1, 0


_NUMBERS = [f.name for f in fields(State) if f.name not in ("losses", "errors")]


@dataclass
class Learner:
    """All that a step changes, and what it belongs to."""

    task: Task
    recipe: Training
    optimizer: SGD
    average: Average
    statistics: Statistics
    state: State

    @staticmethod
    def fresh(task: Task, recipe: Training) -> Learner:
        """As it stands before the first step."""
        net = task.net
        return Learner(task, recipe, SGD(net, recipe), Average(net, recipe.ema), Statistics(net), State())

    def seed_network(self, part: int) -> None:
        """Before a part of a step: what the network draws (dropout, stochastic depth) depends on seed, step and part alone."""
        torch.manual_seed(seed_for(self.recipe.seed, "network", self.state.step, *([part] if part else [])))

    @property
    def identity(self) -> str:
        """What the result depends on, recipe and data; a checkpoint of another identity is not continued."""
        return "/".join((self.recipe.strict().key, self.task.data["fingerprint"], self.task.data.get("start_from", "")))

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds of networks and momentum."""
        return {
            **{f"net.{k}": v for k, v in self.task.net.state_dict().items()},
            **{f"momentum.{k}": v for k, v in self.optimizer.momentum.items()},
            **{f"average.{k}": v for k, v in self.average.tensors.items()},
        }


def save_checkpoint(run: Run, learner: Learner) -> Path:
    """Writes checkpoints/step-<n>.safetensors and removes all but the last two.

    Raises:
        RunError: no space or no permission; the checkpoints before it stay.
    """
    state, tensors = learner.state, learner.tensors()
    if state.losses:
        tensors |= {"losses": torch.stack(state.losses), "errors": torch.stack(state.errors)}
    about = {"identity": learner.identity} | {name: getattr(state, name) for name in _NUMBERS}
    try:
        run.checkpoints.mkdir(exist_ok=True)
    except OSError as error:
        raise writing_error(run.checkpoints, error) from error
    path = run.checkpoints / f"step-{state.step:08d}.safetensors"
    write_safetensors(path, tensors, about)
    for old in [other for other in checkpoints(run) if _step(other) < state.step][:-1]:
        with contextlib.suppress(OSError):  # one too many does no harm
            old.unlink()
    return path


def checkpoints(run: Run) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = [p for p in run.checkpoints.glob("step-*.safetensors") if p.stem.removeprefix("step-").isdigit()]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def restore(run: Run, learner: Learner) -> list[str]:
    """Brings the learner to the latest whole checkpoint, and leaves it where there is none.

    The first process reads; the others get what it found, so that the run folder need not be theirs too.

    Returns:
        A sentence for every damaged checkpoint that was passed over.

    Raises:
        RunError: the checkpoint belongs to another recipe or other data, or every checkpoint is damaged.
    """
    world = learner.task.engine.world
    passed_over = _read(run, learner) if world.first else []
    if world.size > 1:
        state, device = learner.state, learner.task.engine.device
        there = replace(state, losses=[x.cpu() for x in state.losses], errors=[x.cpu() for x in state.errors])
        state, passed_over, moving = world.from_first((there, passed_over, bool(learner.optimizer.momentum)))
        state.losses, state.errors = [x.to(device) for x in state.losses], [x.to(device) for x in state.errors]
        learner.state = state
        if moving and not world.first:
            learner.optimizer.start()
        world.from_first(None, *learner.tensors().values())
    return passed_over


def _read(run: Run, learner: Learner) -> list[str]:
    passed_over: list[str] = []
    for path in reversed(checkpoints(run)):
        try:
            tensors, about = read_safetensors(path, "checkpoint")
        except ModelFileError as error:
            passed_over.append(f"{error} Going on from the checkpoint before it.")
            continue
        if about.get("identity") != learner.identity:
            raise RunError(
                f"{path} was made with another recipe or other data; start a new run, or put back what was changed."
            )
        try:
            _apply(tensors, about, learner)
        except (KeyError, RuntimeError, TypeError) as error:
            raise RunError(f"{path} does not fit this run's network: {error}") from error
        return passed_over
    if passed_over:
        raise RunError(
            f"every checkpoint in {run.checkpoints} is damaged; start a new run, this one's metrics.jsonl stays."
        )
    return []


@torch.no_grad()
def _apply(tensors: dict[str, Tensor], about: dict[str, Any], learner: Learner) -> None:
    learner.optimizer.start()
    for name, tensor in learner.tensors().items():
        tensor.copy_(tensors[name])
    device = learner.task.engine.device
    gathered: dict[str, Any] = {
        k: list(tensors[k].to(device).unbind()) if k in tensors else [] for k in ("losses", "errors")
    }
    learner.state = State(**{name: about[name] for name in _NUMBERS}, **gathered)
