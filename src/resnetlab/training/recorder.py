"""What happens around the steps of a run: logging, evaluations of held-out images, checkpoints, progress, stops."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from resnetlab.data.sources import strip_signature
from resnetlab.device import count_cores, preserve_settings
from resnetlab.distributed import World
from resnetlab.errors import PROCESS_GONE, DivergedError, ResNetLabError, RunError
from resnetlab.formatting import format_split
from resnetlab.run_folder import MetricsLog, RunFolder
from resnetlab.stopping import StopRequest, StopSignal
from resnetlab.training.checkpoint import CheckpointWriter, TrainState, save_best
from resnetlab.training.memory import peak_memory
from resnetlab.training.recipe import Recipe
from resnetlab.training.result import Progress, TrainResult
from resnetlab.training.run_options import RunOptions
from resnetlab.training.run_state import RunState
from resnetlab.training.step import StepOutput
from resnetlab.training.trackers import Trackers

SHARE_OF_OTHERS = 0.25  # of the CPU time that training could have; more is reported
MIN_COMPUTING = 10.0  # seconds of steps before the share is evaluated


@dataclass(frozen=True)
class RunContext:
    """The folder of a run, and what its caller wants of it."""

    run: RunFolder
    options: RunOptions


class RunStopped(ResNetLabError):
    """A run that the function `on_evaluate` has stopped; it is saved and can be resumed.

    Attributes:
        run: its folder.
        step: the step that is saved.
        figures: those of the last evaluation.
    """

    def __init__(self, run: Path, step: int, figures: Mapping[str, float]) -> None:
        super().__init__(
            f"on_evaluate stopped the run at step {step:,}, which is saved; go on with train(resume={str(run)!r})."
        )
        self.run, self.step, self.figures = run, step, figures


class Recorder:
    """Records a run step by step; only the first process writes files.

    Attributes:
        timer: to be told when a step starts and when its batch is ready.
    """

    def __init__(self, train_state: TrainState, context: RunContext, request: StopRequest) -> None:
        self._train_state, self._context, self._request = train_state, context, request
        self._task, self._world = train_state.task, train_state.task.device_config.world
        self._metrics = MetricsLog(context.run, train_state.state.step) if self._world.is_first else None
        self._trackers = None
        if self._world.is_first:
            recipe = train_state.recipe
            step, config = train_state.state.step, recipe.to_json() | {"data": strip_signature(recipe.data)}
            self._trackers = Trackers(context.run, step, config, context.options.report)
        self.timer, self._saved = StepTimer(train_state.state), time.monotonic()
        self._checkpoints = CheckpointWriter(context.run)
        self._agreed: Future[tuple[int, ...]] | None = None
        self._reported_others = False
        self._held_out: Mapping[str, float] = {}
        self._evaluation_seconds = 0.0  # of the last one
        self._refresh_report = Throttle(partial(self._task.write_running_report, context.run))

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Stops the task's processes and closes the files on exit."""
        try:
            yield
        finally:
            self._task.close()
            self._checkpoints.close()
            if self._metrics is not None:
                self._metrics.close()
                self.note_skipped(self._task.skipped)

    def close(self) -> None:
        """Closes the trackers, which stay open for `record_result`."""
        if self._trackers is not None:
            self._trackers.close()

    def record_result(self, result: TrainResult) -> None:
        """Sends the figures of the test split to the trackers; metrics.jsonl has those of the steps alone."""
        others = ("seconds", "images_per_second", "held_out_error", "held_out_mean_ap")
        figures = {
            k: v for k, v in asdict(result).items() if isinstance(v, float) and k not in others and math.isfinite(v)
        }
        if self._trackers is not None:
            self._trackers.write(format_split(result.split), result.steps, figures)

    def end_step(self, output: StepOutput, lr: float) -> None:
        """Logs, evaluates, saves and stops where it is time to; `TrainState.is_done` says whether the run ends here.

        Raises:
            StopSignal: a stop was requested; the step is saved.
            DivergedError, RunError: the loss is not finite; a file cannot be written.
        """
        self.timer.computed()
        self._checkpoints.check()
        train_state, recipe, world = self._train_state, self._train_state.recipe, self._world
        state = train_state.state
        state.losses.append(output.loss)
        state.errors.append(output.error)
        last = state.step == recipe.steps
        logging = last or state.step % recipe.log_every == 0
        signum, saving = self._agree()
        saving = saving or last
        evaluating, stop = last or state.step % recipe.eval_every == 0, 0
        if logging or saving or evaluating or self._task.device_config.device.type == "cpu":
            # on a GPU this waits for the queued steps, whose time then counts as theirs: only where something else waits
            _check_finite(state, lr, world)
        self.timer.stop()
        if logging:
            figures = self._log(output, lr)
        if evaluating:
            self._held_out = self._evaluate()
            # a run that went on from before its best weights, on a GPU say, might not come to them again
            saving = saving or (getattr(recipe, "keep", "") == "best" and state.best_step == state.step)
            if not last and train_state.is_done:
                saving, last = 1, True
                figures = figures if logging else self._log(output, lr)
                logging = True
            stop = world.all_reduce_max(int(self._asks_to_stop()))[0] * (not last)
            saving = saving or stop
        if logging:
            self._context.options.on_progress(self._progress(figures, lr))
        if saving and self._metrics is not None:
            self.save(wait=bool(last or signum or stop))
            self._record_machine()
            self._saved = time.monotonic()
            if not last:
                self._refresh_report()
        if signum and not last:
            how_to_resume = self._task.how_to_resume(self._context.run)
            raise StopSignal(signum, f"stopped at step {state.step:,}, which is saved; {how_to_resume}")
        if stop:
            raise RunStopped(self._context.run.path, state.step, self._held_out)

    def save(self, *, wait: bool = True) -> None:
        """Saves the run as it is, in the first process; `wait` until the checkpoint is written."""
        if self._metrics is not None:
            self._metrics.sync()
            self._checkpoints.save(self._train_state)
            if wait:
                self._checkpoints.wait()

    def _agree(self) -> tuple[int, ...]:
        """The signal to stop at this step, and whether to save, the same in all processes.

        Several processes agree beside the next step, at the end of which they stop, so that none waits for the others.
        """
        due = (
            self._world.is_first and time.monotonic() - self._saved >= 60 * self._train_state.recipe.checkpoint_minutes
        )
        if due:
            self._saved = time.monotonic()
        requested = self._request.signum or 0  # read once: a later signal waits for the next step
        before, self._agreed = self._agreed, self._world.start_all_reduce_max(requested, int(requested > 0 or due))
        if self._world.size == 1:
            return self._agreed.result()
        return (0, 0) if before is None else before.result()

    def note_skipped(self, skipped: Mapping[str, str]) -> None:
        """Lists in the run folder what was skipped because it could not be used."""
        run = self._context.run
        before = run.read_json("skipped.json") or {}
        if new := {name: why for name, why in skipped.items() if name not in before}:
            run.write_json("skipped.json", before | new)
            n, file = len(before) + len(new), run.path / "skipped.json"
            what = f"1 {self._task.skipped_one} and was" if n == 1 else f"{n:,} {self._task.skipped_many} and were"
            self._context.options.report(f"{what} left out; {file} lists {'it' if n == 1 else 'them'}")

    def report_graph(self, sentence: str) -> None:
        """Reports and records how the first process executes its steps."""
        if self._world.is_first:
            self._context.options.report(sentence)
            self._add_to_environment({"steps": sentence})

    def record_launches(self, launches: float) -> None:
        """Records how many kernels, or graphs of kernels, a traced step launched on a GPU."""
        self._add_to_environment({"launches_per_step": round(launches, 1)})

    def _add_to_environment(self, values: Mapping[str, object]) -> None:
        run = self._context.run
        run.write_json("environment.json", (run.read_json("environment.json") or {}) | dict(values))

    def _record_machine(self) -> None:
        """Records peak memory, how many steps were replayed from a CUDA graph, and fp16's loss scale."""
        config, before = self._task.device_config, self._context.run.read_json("environment.json") or {}
        peak = max(peak_memory(config.device), before.get("peak_memory_bytes", 0))
        replayed = {"replayed_steps": self._train_state.state.replayed_steps} if config.cuda_graph else {}
        state = self._train_state.state
        scaled = {"loss_scale": state.loss_scale, "skipped_updates": state.skipped_updates} if state.loss_scale else {}
        self._add_to_environment({"peak_memory_bytes": peak} | replayed | scaled)

    def _log(self, output: StepOutput, lr: float) -> dict[str, float]:
        """Writes the means since the last line; ends the warm-up of 2015 §4.2 if the error is below its bound."""
        state, recipe = self._train_state.state, self._train_state.recipe
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
            "share_waiting": self.timer.share_waiting(
                None if self._task.device_config.device.type == "cpu" else self._task.seconds_reading
            ),
            "seconds": state.seconds,
        }
        self._write("train", figures)
        self._report_other_programs()
        return figures

    def _report_other_programs(self) -> None:
        """Reports, once, that other programs take much of the CPU time that training could have."""
        device_config, threads = self._task.device_config, min(self._task.busy_threads, count_cores())
        if self._reported_others or device_config.device.type != "cpu" or self.timer.computing < MIN_COMPUTING:
            return
        if (taken := 1 - self.timer.cpu_seconds / (threads * self.timer.computing)) > SHARE_OF_OTHERS:
            self._reported_others = True
            self._context.options.report(
                f"other programs take {taken:.0%} of the CPU time that this run could have; the time left counts with that"
            )

    def _evaluate(self) -> Mapping[str, float]:
        """Evaluates the held-out images with the weights that would be saved; updates the schedule "plateau"."""
        state, recipe, start = self._train_state.state, self._train_state.recipe, time.perf_counter()
        with self._train_state.average.swap_in():
            figures = self._task.evaluate_held_out() or {}
            if figures and isinstance(recipe, Recipe) and (recipe.keep == "best" or recipe.early_stop):
                best = state.is_best(next(iter(figures.values())))
                if best and recipe.keep == "best" and self._world.is_first:
                    save_best(self._context.run, self._train_state)
        self._evaluation_seconds = time.perf_counter() - start
        if figures and recipe.schedule == "plateau":
            state.update_plateau(next(iter(figures.values())), recipe.patience)
        if figures:
            self._write("held_out", figures)
        return figures

    def _asks_to_stop(self) -> bool:
        """Whether the caller's function, which sees the figures, asks to stop the run."""
        ask, state, recipe = self._context.options.on_evaluate, self._train_state.state, self._train_state.recipe
        if ask is None:
            return False
        with preserve_settings():  # it may load and evaluate models
            return ask({"step": state.step, "steps": recipe.steps, **self._held_out}) is True

    def _write(self, kind: str, figures: Mapping[str, float]) -> None:
        """Writes a line of metrics.jsonl, and sends it to the trackers."""
        step = self._train_state.state.step
        if self._metrics is not None and self._trackers is not None:
            self._metrics.write(kind, step, **figures)
            self._trackers.write(kind, step, figures)

    def _progress(self, figures: Mapping[str, float], lr: float) -> Progress:
        state, recipe = self._train_state.state, self._train_state.recipe
        steps, evaluations = recipe.steps, recipe.steps // recipe.eval_every - state.step // recipe.eval_every
        held_out = len(self._task.held_out)
        evaluated = held_out * evaluations + len(self._task.test)  # images, from here on
        return Progress(
            step=state.step,
            steps=steps,
            lr=lr,
            loss=figures["loss"],
            error=figures["error"],
            held_out=self._held_out,
            images_per_second=figures["images_per_second"],
            # a first step that compiled tells nothing about the others
            seconds_left=math.nan
            if self.timer.count == 1 and self._task.device_config.compiled
            else self.timer.seconds_per_step() * (steps - state.step) + evaluated * self._seconds_per_evaluated_image(),
        )

    def _seconds_per_evaluated_image(self) -> float:
        """As in the last evaluation; before the first, a third of an image's share of a step."""
        if self._evaluation_seconds and len(self._task.held_out):
            return self._evaluation_seconds / len(self._task.held_out)
        return self.timer.seconds_per_step() / self._train_state.recipe.batch / 3


def _check_finite(state: RunState, lr: float, world: World) -> None:
    """Raises DivergedError, naming the step, if a loss since the last line is not finite; RunError in other processes."""
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


class Throttle:
    """Calls a function at most every PAUSE seconds, and so rarely that it takes at most 2 % of the time."""

    PAUSE = 30.0

    def __init__(self, function: Callable[[], None]) -> None:
        self._function, self._next = function, time.monotonic() + self.PAUSE

    def __call__(self) -> None:
        start = time.monotonic()
        if start < self._next:
            return
        self._function()
        now = time.monotonic()
        self._next = now + max(self.PAUSE, 50 * (now - start))


class StepTimer:
    """Measures the time of steps and of waiting for data; adds to the totals of the run state.

    Attributes:
        count: steps of this process.
        computing: seconds in which steps computed, without waiting for data.
        cpu_seconds: CPU time of this process, over all its threads, in that time.
    """

    WARMUP = 3  # steps of a process that are no measure of the others: memory, kernels and workers are made ready

    def __init__(self, state: RunState) -> None:
        self._steps: deque[float] = deque(maxlen=100)  # seconds of the latest
        self.count = 0
        self._state, self._began = state, time.perf_counter() - state.seconds
        self._started = self._logged = time.perf_counter()
        self._waited = self._read = 0.0
        self._ready = self._cpu = self.computing = self.cpu_seconds = 0.0

    def start(self) -> None:
        """Marks the start of a step."""
        self._started = time.perf_counter()

    def batch_ready(self) -> None:
        """Marks that the step's batch is ready."""
        self._ready, self._cpu = time.perf_counter(), time.process_time()
        self._waited += self._ready - self._started

    def computed(self) -> None:
        """Marks that the step is computed."""
        self.computing += time.perf_counter() - self._ready
        self.cpu_seconds += time.process_time() - self._cpu

    def stop(self) -> None:
        """Marks the end of the step."""
        now = time.perf_counter()
        self._state.step_seconds += now - self._started
        self.count += 1
        if self.count <= self.WARMUP + 1:
            self._steps.clear()
        self._steps.append(now - self._started)
        self._state.seconds = now - self._began

    def seconds_per_step(self) -> float:
        """The mean of the latest steps of this process, without its first ones."""
        return sum(self._steps) / max(len(self._steps), 1)

    def share_waiting(self, seconds_reading: float | None = None) -> float:
        """The share of time spent waiting for images since the last call.

        Args:
            seconds_reading: of this process so far, for a GPU: making a batch also waits until its queue has room.
        """
        now = time.perf_counter()
        waited = self._waited if seconds_reading is None else seconds_reading - self._read
        share = waited / max(now - self._logged, 1e-9)
        self._waited, self._logged, self._read = 0.0, now, seconds_reading or 0.0
        return min(1.0, share)
