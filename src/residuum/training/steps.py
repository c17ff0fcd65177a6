"""The steps: for each of them a batch, a step, and now and then record, judge, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from residuum.errors import DivergedError, RunError
from residuum.records import Metrics, Run
from residuum.training.average import learn
from residuum.training.checkpoint import Learner, State, save_checkpoint
from residuum.training.recipe import Training
from residuum.training.result import Progress
from residuum.training.schedule import learning_rate
from residuum.training.step import Made, Step
from residuum.training.stopping import Request, Stopped
from residuum.world import GONE, World


def train_steps(
    learner: Learner,
    run: Run,
    metrics: Metrics | None,
    request: Request,
    progress: Callable[[Progress], None],
    again: str,
    refresh: Callable[[], None] | None,
    step: Step,
) -> None:
    """Trains from the learner's step to the recipe's last.

    Args:
        metrics: None in all processes but the first, which is the one that writes.
        again: how a person goes on with the run after a stop.
        refresh: called when a checkpoint was written, for the page of a run that goes on.
        step: makes one step: `train_step`, or what comes to the same.
    """
    task, recipe, state, world = learner.task, learner.recipe, learner.state, learner.task.engine.world
    clock, saved = _Clock(state), time.monotonic()
    held_out: Mapping[str, float] = {}
    learn(task.net)
    while state.step < recipe.steps:
        clock.start()
        lr = learning_rate(recipe, state.step, state.warm_since, state.drops)
        parts = task.parts(state.step)
        clock.loaded()
        made = step(learner, parts, lr)
        state.losses.append(made.loss)
        state.errors.append(made.wrong)
        last = state.step == recipe.steps
        recording = last or state.step % recipe.record_every == 0
        due = world.first and time.monotonic() - saved >= 60 * recipe.checkpoint_minutes
        asked = request.signum or 0  # read once: a signal that comes later in the step waits for the next
        signum, saving = world.agree(asked, int(last or asked > 0 or due))  # so that all stop at the same step
        if recording or saving or task.engine.device.type == "cpu":
            _check_finite(state, lr, world)  # on a GPU this waits for the device, so only where something does anyway
        clock.stop()
        if recording:
            figures = _record(recipe, state, made, lr, clock.share_waiting(), metrics)
        if last or state.step % recipe.judge_every == 0:
            held_out = _judge(learner, metrics)
        if recording:
            progress(_progress(recipe, state, figures, lr, held_out))
        if saving and metrics is not None:
            metrics.sync()
            save_checkpoint(run, learner)
            saved = time.monotonic()
            if refresh is not None and not last:
                refresh()
        if signum and not last:
            raise Stopped(signum, f"stopped at step {state.step:,}, which is saved; {again}")


class Rarely:
    """Calls a function when it is called, but not before half a minute has gone by, nor oftener than for 2 % of the time."""

    def __init__(self, function: Callable[[], None], pause: float = 30.0) -> None:
        self._function, self._pause = function, pause
        self._next = time.monotonic() + pause

    def __call__(self) -> None:
        began = time.monotonic()
        if began < self._next:
            return
        self._function()
        now = time.monotonic()
        self._next = now + max(self._pause, 50 * (now - began))


class _Clock:
    """Where the time goes; what the state says of it includes resumed parts."""

    def __init__(self, state: State) -> None:
        self._state, self._began = state, time.perf_counter() - state.seconds
        self._started = self._recorded = time.perf_counter()
        self._waited = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def loaded(self) -> None:
        """The step's pictures are there."""
        self._waited += time.perf_counter() - self._started

    def stop(self) -> None:
        """The step is done."""
        now = time.perf_counter()
        self._state.step_seconds += now - self._started
        self._state.seconds = now - self._began

    def share_waiting(self) -> float:
        """The share of the time since it was last asked for in which pictures were waited for."""
        now = time.perf_counter()
        share = self._waited / max(now - self._recorded, 1e-9)
        self._waited, self._recorded = 0.0, now
        return min(1.0, share)


def _check_finite(state: State, lr: float, world: World) -> None:
    """Raises DivergedError, naming the step, where a loss since the last record is not finite; the first process speaks."""
    finite = torch.stack(state.losses).isfinite().tolist()
    if all(finite):
        return
    if not world.first:
        raise RunError(f"{GONE}: the loss is not finite.")
    step = state.step - len(finite) + finite.index(False)
    raise DivergedError(
        f"the loss is not finite at step {step:,} (learning rate {lr:g}); try a tenth of the learning rate "
        f"(--set lr={lr / 10:g}), a warm-up (--set warmup=steps) or --set precision=fp32."
    )


def _record(
    recipe: Training, state: State, made: Made, lr: float, waiting: float, metrics: Metrics | None
) -> dict[str, float]:
    """Writes the means since the last record, and ends the warm-up of 2015 §4.2 where they say so."""
    loss, error = (float(torch.stack(values).mean()) for values in (state.losses, state.errors))
    if recipe.warmup == "train-error" and state.warm_since is None and error < recipe.warmup_error:
        state.warm_since = state.step
    state.losses.clear()
    state.errors.clear()
    figures = {
        "loss": loss,
        "error": error,
        "lr": lr,
        "gradient_norm": float(made.norm),
        "images_per_second": recipe.batch * state.step / state.step_seconds,
        "share_waiting": waiting,
        "seconds": state.seconds,
    }
    if metrics is not None:
        metrics.write("train", state.step, **figures)
    return figures


def _judge(learner: Learner, metrics: Metrics | None) -> Mapping[str, float]:
    """Figures on the held-out pictures, by what would be kept if the run ended here; under "plateau" they decide its rate."""
    state, recipe = learner.state, learner.recipe
    with learner.average.in_place():
        figures = learner.task.judge_held_out() or {}
    if figures and recipe.schedule == "plateau":
        state.judged(next(iter(figures.values())), recipe.patience)
    if figures and metrics is not None:
        metrics.write("held_out", state.step, **figures)
    return figures


def _progress(
    recipe: Training, state: State, figures: Mapping[str, float], lr: float, held_out: Mapping[str, float]
) -> Progress:
    return Progress(
        step=state.step,
        steps=recipe.steps,
        lr=lr,
        loss=figures["loss"],
        error=figures["error"],
        held_out=held_out,
        images_per_second=figures["images_per_second"],
        seconds_left=state.seconds / state.step * (recipe.steps - state.step),
    )
