"""One run: prepares its task, trains from the latest checkpoint to the end, then evaluates and writes the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from resnetlab.device import default_precision, select_device
from resnetlab.distributed import World
from resnetlab.errors import RunError, UsageError
from resnetlab.run_folder import MetricsLog, RunFolder
from resnetlab.training import recipes, task_table
from resnetlab.training.checkpoint import TrainState, restore_checkpoint
from resnetlab.training.cuda_graph import GraphStep
from resnetlab.training.loop import Throttle, train_steps
from resnetlab.training.memory import is_out_of_memory, largest_micro_batch
from resnetlab.training.recipe import BaseRecipe, Recipe
from resnetlab.training.result import Progress, TrainResult
from resnetlab.training.step import TrainStep, train_step
from resnetlab.training.stopping import StopRequest, catch_stop_signals
from resnetlab.training.tasks.base import Task
from resnetlab.training.tasks.classification import ClassificationTask

R = TypeVar("R", bound=BaseRecipe)


def prepare_task(
    recipe: R,
    data_dir: Path,
    device: str,
    report: Callable[[str], None],
    workers: int | None = None,
    started_in: Path = Path(),
    world: World | None = None,
) -> tuple[Task, R]:
    """The task of a recipe, and the recipe with all "auto" values resolved.

    Args:
        started_in: the folder that paths in the recipe are relative to.
    """
    device_config = replace(select_device(recipe.precision, device, recipe.threads), world=world or World())
    if device_config.world.size > 1 and device_config.device.index is not None:
        raise UsageError(
            f"several processes take one device each; give its kind, not {device!r}: --device {device_config.device.type}."
        )
    recipe = replace(recipe, precision=device_config.precision, threads=device_config.threads)
    with device_config.world.first_process_first():  # what one downloads the others find
        task, recipe = task_table.JOBS[recipe.task].prepare(
            recipe, device_config, data_dir, workers, started_in, report
        )
    report(f"device: {task.device_config}")
    if changed := recipes.describe_changes(recipe, default_precision(device_config.device)):
        report(f"recipe {recipe.name}, with {'; '.join(changed)}")
    if label := recipes.describe_budget(recipe):
        report(f"budget: {label}")
    return task, recipe


def run_to_end(
    task: Task,
    recipe: BaseRecipe,
    run: RunFolder,
    on_progress: Callable[[Progress], None],
    report: Callable[[str], None],
) -> TrainResult:
    """Trains from the latest checkpoint to the end, then evaluates, saves and reports."""
    job, first = task_table.JOBS[recipe.task], task.device_config.world.is_first
    train_state = TrainState.create(task, recipe)
    for sentence in restore_checkpoint(run, train_state):
        report(sentence)
    if train_state.state.step:
        report(f"going on from step {train_state.state.step:,}")
    metrics = MetricsLog(run, train_state.state.step) if first else None
    page = task_table.JOBS[recipe.task].running
    refresh = Throttle(partial(page, task, recipe, run)) if first and page is not None else None
    again = f"go on with: {job.command} --resume {run.path}"
    with catch_stop_signals() as request:
        try:
            _train(train_state, run, metrics, request, on_progress, again, refresh, report)
        finally:
            task.close()
            if metrics is not None:
                metrics.close()
                _note_skipped(task.skipped, run, report, job)
        request.stop_immediately(f"stopped while evaluating, after the last step, which is saved; {again}")
        with train_state.average.swap_in():
            result = job.finish(task, recipe, run, train_state.state)
        skipped = task.device_config.world.merge_dicts(task.skipped)
        if first:
            _note_skipped(skipped, run, report, job)
            run.write_json("result.json", result.to_json())
            report(f"report: {run.report}")
    return result


def _train(
    train_state: TrainState,
    run: RunFolder,
    metrics: MetricsLog | None,
    request: StopRequest,
    on_progress: Callable[[Progress], None],
    again: str,
    refresh: Callable[[], None] | None,
    report: Callable[[str], None],
) -> None:
    """Runs the steps; if memory runs out, raises RunError with the micro-batch that would fit."""

    def report_graph(sentence: str) -> None:
        report(sentence)
        run.write_json("environment.json", (run.read_json("environment.json") or {}) | {"steps": sentence})

    def step() -> (
        TrainStep
    ):  # not kept in a local: a recording would hold memory while smaller micro-batches are tried below
        return (
            GraphStep(report_graph) if train_state.task.device_config.cuda_graph else train_step
        )  # with one process only

    try:
        return train_steps(train_state, run, metrics, request, on_progress, again, refresh, step())
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # the memory that the error holds is free only here
    task, recipe = train_state.task, train_state.recipe
    if not isinstance(task, ClassificationTask) or not isinstance(recipe, Recipe):
        raise RunError("this batch does not fit into memory; take a smaller one: --set batch=…")
    train_state.optimizer.zero_grad()
    now = recipe.batch // task.device_config.world.size // task.num_micro_batches
    size = (
        largest_micro_batch(task, recipe, below=now) if task.device_config.world.size == 1 else None
    )  # several processes do not try
    fits = (
        f"{size:,} would fit: start again with --set bn_batch={size} (or --batch auto)" if size else "take --batch auto"
    )
    raise RunError(
        f"{now:,} images at once do not fit into memory; {fits}, which keeps the batch of {recipe.batch:,}; or with "
        "--set recompute=true."
    )


def _note_skipped(
    skipped: Mapping[str, str], run: RunFolder, report: Callable[[str], None], job: task_table.Job
) -> None:
    """Lists in the run folder what was skipped because it could not be used."""
    before = run.read_json("skipped.json") or {}
    if new := {name: why for name, why in skipped.items() if name not in before}:
        run.write_json("skipped.json", before | new)
        place = run.path / "skipped.json"
        report(f"{len(before) + len(new):,} {job.unusable} and were left out; {place} lists them")
