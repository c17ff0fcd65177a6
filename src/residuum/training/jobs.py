"""The tasks that the loop can train: for each its recipe, how it is made ready, and what becomes of it after the last step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from residuum.errors import RunError
from residuum.models.bundle import load_bundle
from residuum.models.dense_file import load_dense
from residuum.records import Run
from residuum.runtime import Engine
from residuum.tasks.task import Task
from residuum.training import classifying, detecting, segmenting
from residuum.training.checkpoint import State
from residuum.training.dense_recipe import DetectRecipe, SegmentRecipe
from residuum.training.recipe import Recipe, Training
from residuum.training.result import BoxResult, Ended, MaskResult, Result

# recipe, engine, data_dir, workers (None: what the machine has), started_in (where paths in the recipe start), say; what it
# returns is the task, and the recipe with nothing left open
Prepare = Callable[[Any, Engine, Path, int | None, Path, Callable[[str], None]], tuple[Task, Any]]
# task, recipe, run, state: judges the test split, once, with the last iterate; writes model and report
Finish = Callable[[Any, Any, Any, State], Ended]


class Job(NamedTuple):
    """One of the tasks."""

    command: str  # what a person types to train it
    recipe: type[Training]
    result: type[Ended]
    load: Callable[[Path], object]  # its model file; raises ModelFileError
    prepare: Prepare
    finish: Finish
    unusable: str = "pictures could not be read"  # how what is skipped is called
    running: Callable[[Any, Any, Run], None] | None = None  # task, recipe, run: writes the report of a run that goes on


JOBS = {
    "classify": Job(
        "residuum train",
        Recipe,
        Result,
        load_bundle,
        classifying.prepare,
        classifying.finish,
        running=classifying.running,
    ),
    "detect": Job(
        "residuum detect train",
        DetectRecipe,
        BoxResult,
        partial(load_dense, task="detect"),
        detecting.prepare,
        detecting.finish,
        "boxes or pictures could not be right",
    ),
    "segment": Job(
        "residuum segment train",
        SegmentRecipe,
        MaskResult,
        partial(load_dense, task="segment"),
        segmenting.prepare,
        segmenting.finish,
        "masks or pictures could not be right",
    ),
}


def named(task: object, run: Path) -> Job:
    """The job of a run's task; raises RunError where this version knows none of that name."""
    if task not in JOBS:
        raise RunError(f"{run} is a run of the task {task!r}, which this version of residuum does not know.")
    return JOBS[str(task)]
