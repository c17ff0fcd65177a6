"""The training loop: a batch and a step at a time, with records, evaluations and checkpoints in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from resnetlab.distributed import PROCESS_GONE, World
from resnetlab.errors import DivergedError, RunError
from resnetlab.run_folder import MetricsLog, RunFolder
from resnetlab.training.average import set_train_mode
from resnetlab.training.checkpoint import RunState, TrainState, save_checkpoint
from resnetlab.training.recipe import BaseRecipe
from resnetlab.training.result import Progress
from resnetlab.training.schedule import learning_rate
from resnetlab.training.step import StepOutput, TrainStep
from resnetlab.training.stopping import StopRequest, StopSignal


def train_steps(
    train_state: TrainState,
    run: RunFolder,
    metrics: MetricsLog | None,
    request: StopRequest,
    on_progress: Callable[[Progress], None],
    again: str,
    refresh: Callable[[], None] | None,
    step: TrainStep,
) -> None:
    """Trains from the state's step to the recipe's last.

    Args:
        metrics: None in all processes but the first, which writes.
        again: how to resume the run after a stop.
        refresh: called after each checkpoint, to update the report of the running run.
        step: `train_step`, or a bit-identical replacement.
    """
    task, recipe, state, world = (
        train_state.task,
        train_state.recipe,
        train_state.state,
        train_state.task.device_config.world,
    )
    clock, saved = _StepTimer(state), time.monotonic()
    held_out: Mapping[str, float] = {}
    set_train_mode(task.net)
    while state.step < recipe.steps:
        clock.start()
        lr = learning_rate(recipe, state.step, state.warmup_end, state.lr_drops)
        micro_batches = task.micro_batches(state.step)
        clock.batch_ready()
        output = step(train_state, micro_batches, lr)
        state.losses.append(output.loss)
        state.errors.append(output.error)
        last = state.step == recipe.steps
        recording = last or state.step % recipe.log_every == 0
        due = world.is_first and time.monotonic() - saved >= 60 * recipe.checkpoint_minutes
        asked = request.signum or 0  # read once: a later signal waits for the next step
        signum, saving = world.all_reduce_max(asked, int(last or asked > 0 or due))  # so that all stop at the same step
        if recording or saving or task.device_config.device.type == "cpu":
            _check_finite(state, lr, world)  # on a GPU this synchronises, so only when something else does
        clock.stop()
        if recording:
            figures = _record(recipe, state, output, lr, clock.share_waiting(), metrics)
        if last or state.step % recipe.eval_every == 0:
            held_out = _evaluate(train_state, metrics)
        if recording:
            on_progress(_progress(recipe, state, figures, lr, held_out))
        if saving and metrics is not None:
            metrics.sync()
            save_checkpoint(run, train_state)
            saved = time.monotonic()
            if refresh is not None and not last:
                refresh()
        if signum and not last:
            raise StopSignal(signum, f"stopped at step {state.step:,}, which is saved; {again}")


class Throttle:
    """Calls a function at most every `pause` seconds, and so rarely that it takes at most 2 % of the time."""

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


class _StepTimer:
    """Measures the time of steps and of waiting for data; adds to the totals of the run state."""

    def __init__(self, state: RunState) -> None:
        self._state, self._began = state, time.perf_counter() - state.seconds
        self._started = self._recorded = time.perf_counter()
        self._waited = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    def batch_ready(self) -> None:
        """Marks that the step's batch is ready."""
        self._waited += time.perf_counter() - self._started

    def stop(self) -> None:
        """Marks the end of the step."""
        now = time.perf_counter()
        self._state.step_seconds += now - self._started
        self._state.seconds = now - self._began

    def share_waiting(self) -> float:
        """The share of time spent waiting for images since the last call."""
        now = time.perf_counter()
        share = self._waited / max(now - self._recorded, 1e-9)
        self._waited, self._recorded = 0.0, now
        return min(1.0, share)


def _check_finite(state: RunState, lr: float, world: World) -> None:
    """Raises DivergedError, naming the step, if a loss since the last record is not finite; RunError in other processes."""
    finite = torch.stack(state.losses).isfinite().tolist()
    if all(finite):
        return
    if not world.is_first:
        raise RunError(f"{PROCESS_GONE}: the loss is not finite.")
    step = state.step - len(finite) + finite.index(False)
    raise DivergedError(
        f"the loss is not finite at step {step:,} (learning rate {lr:g}); try a tenth of the learning rate "
        f"(--set lr={lr / 10:g}), a warm-up (--set warmup=steps) or --set precision=fp32."
    )


def _record(
    recipe: BaseRecipe, state: RunState, output: StepOutput, lr: float, waiting: float, metrics: MetricsLog | None
) -> dict[str, float]:
    """Writes the means since the last record; ends the warm-up of 2015 §4.2 if the error is below its bound."""
    loss, error = (float(torch.stack(values).mean()) for values in (state.losses, state.errors))
    if recipe.warmup == "train-error" and state.warmup_end is None and error < recipe.warmup_error:
        state.warmup_end = state.step
    state.losses.clear()
    state.errors.clear()
    figures = {
        "loss": loss,
        "error": error,
        "lr": lr,
        "gradient_norm": float(output.grad_norm),
        "images_per_second": recipe.batch * state.step / state.step_seconds,
        "share_waiting": waiting,
        "seconds": state.seconds,
    }
    if metrics is not None:
        metrics.write("train", state.step, **figures)
    return figures


def _evaluate(train_state: TrainState, metrics: MetricsLog | None) -> Mapping[str, float]:
    """Evaluates the held-out images with the weights that would be saved; updates the schedule "plateau"."""
    state, recipe = train_state.state, train_state.recipe
    with train_state.average.swap_in():
        figures = train_state.task.evaluate_held_out() or {}
    if figures and recipe.schedule == "plateau":
        state.update_plateau(next(iter(figures.values())), recipe.patience)
    if figures and metrics is not None:
        metrics.write("held_out", state.step, **figures)
    return figures


def _progress(
    recipe: BaseRecipe, state: RunState, figures: Mapping[str, float], lr: float, held_out: Mapping[str, float]
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
