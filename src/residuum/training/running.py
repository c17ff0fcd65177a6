"""A run from the inside: its task, its steps from the latest checkpoint to the last, what is judged and written then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from residuum.errors import RunError, UsageError
from residuum.records import Metrics, Run
from residuum.runtime import automatic_precision, pick_engine
from residuum.tasks.classify import Classify
from residuum.tasks.task import Task
from residuum.training import jobs, recipes
from residuum.training.checkpoint import Learner, restore
from residuum.training.cuda_graph import GraphStep
from residuum.training.fitting import is_short, largest_part
from residuum.training.recipe import Recipe, Training
from residuum.training.result import Ended, Progress
from residuum.training.step import Step, train_step
from residuum.training.steps import Rarely, train_steps
from residuum.training.stopping import Request, stop_requests
from residuum.world import World

R = TypeVar("R", bound=Training)


def prepare_task(
    recipe: R,
    data_dir: Path,
    device: str,
    say: Callable[[str], None],
    workers: int | None = None,
    started_in: Path = Path(),
    world: World | None = None,
) -> tuple[Task, R]:
    """The task of a recipe, and the recipe with nothing left open.

    Args:
        started_in: the folder that paths in the recipe start from.
    """
    engine = replace(pick_engine(recipe.precision, device, recipe.threads), world=world or World())
    if engine.world.size > 1 and engine.device.index is not None:
        raise UsageError(
            f"several processes take a device each; give its kind, not {device!r}: --device {engine.device.type}."
        )
    recipe = replace(recipe, precision=engine.precision, threads=engine.threads)
    with engine.world.in_turn():  # what one fetches the others find
        task, recipe = jobs.JOBS[recipe.task].prepare(recipe, engine, data_dir, workers, started_in, say)
    say(f"engine: {task.engine}")
    if changed := recipes.changes(recipe, automatic_precision(engine.device)):
        say(f"recipe {recipe.name}, with {'; '.join(changed)}")
    if label := recipes.budget(recipe):
        say(f"budget: {label}")
    return task, recipe


def run_to_end(
    task: Task, recipe: Training, run: Run, progress: Callable[[Progress], None], say: Callable[[str], None]
) -> Ended:
    """Trains from the latest checkpoint to the end, then judges, saves and reports."""
    job, first = jobs.JOBS[recipe.task], task.engine.world.first
    learner = Learner.fresh(task, recipe)
    for sentence in restore(run, learner):
        say(sentence)
    if learner.state.step:
        say(f"going on from step {learner.state.step:,}")
    metrics = Metrics(run, learner.state.step) if first else None
    page = jobs.JOBS[recipe.task].running
    refresh = Rarely(partial(page, task, recipe, run)) if first and page is not None else None
    again = f"go on with: {job.command} --resume {run.path}"
    with stop_requests() as request:
        try:
            _train(learner, run, metrics, request, progress, again, refresh, say)
        finally:
            task.close()
            if metrics is not None:
                metrics.close()
                _note_skipped(task.skipped, run, say, job)
        request.at_once(f"stopped while judging, after the last step, which is saved; {again}")
        with learner.average.in_place():
            result = job.finish(task, recipe, run, learner.state)
        skipped = task.engine.world.union(task.skipped)
        if first:
            _note_skipped(skipped, run, say, job)
            run.write_json("result.json", result.to_json())
            say(f"report: {run.report}")
    return result


def _train(
    learner: Learner,
    run: Run,
    metrics: Metrics | None,
    request: Request,
    progress: Callable[[Progress], None],
    again: str,
    refresh: Callable[[], None] | None,
    say: Callable[[str], None],
) -> None:
    """The steps; where memory is too short for them, a sentence says what would fit."""

    def told(sentence: str) -> None:
        say(sentence)
        run.write_json("environment.json", (run.read_json("environment.json") or {}) | {"steps": sentence})

    def step() -> Step:  # not kept here, where a recording's memory would be missing from what is tried below
        return GraphStep(told) if learner.task.engine.graphs else train_step  # of one process alone

    try:
        return train_steps(learner, run, metrics, request, progress, again, refresh, step())
    except (RuntimeError, MemoryError) as error:
        if not is_short(error):
            raise
    # what the error holds is free only here
    task, recipe = learner.task, learner.recipe
    if not isinstance(task, Classify) or not isinstance(recipe, Recipe):
        raise RunError("memory is too short for this batch; take a smaller one: --set batch=…")
    learner.optimizer.forget()
    now = recipe.batch // task.engine.world.size // task.shares
    size = largest_part(task, recipe, below=now) if task.engine.world.size == 1 else None  # the others do not try
    fits = (
        f"{size:,} would fit: start anew with --set bn_batch={size} (or --batch auto)" if size else "take --batch auto"
    )
    raise RunError(
        f"memory is too short for {now:,} pictures at once; {fits}, which keeps the batch of {recipe.batch:,}; or with "
        "--set recompute=true."
    )


def _note_skipped(skipped: Mapping[str, str], run: Run, say: Callable[[str], None], job: jobs.Job) -> None:
    """Lists in the run folder what was left out because it could not be used; nothing where there is none."""
    before = run.read_json("skipped.json") or {}
    if new := {name: why for name, why in skipped.items() if name not in before}:
        run.write_json("skipped.json", before | new)
        place = run.path / "skipped.json"
        say(f"{len(before) + len(new):,} {job.unusable} and were left out; {place} lists them")
