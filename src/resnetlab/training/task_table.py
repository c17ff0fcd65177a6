"""The tasks that the loop can train: for each its recipe, how it is made ready, and what becomes of it after the last step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from resnetlab.device import DeviceConfig
from resnetlab.errors import RunError
from resnetlab.models.annotated_model import load_annotated
from resnetlab.models.model_file import load_trained_model
from resnetlab.run_folder import RunFolder
from resnetlab.training import classification_run, detection_run, segmentation_run
from resnetlab.training.annotated_recipes import DetectionRecipe, SegmentationRecipe
from resnetlab.training.checkpoint import RunState
from resnetlab.training.recipe import BaseRecipe, Recipe
from resnetlab.training.result import ClassificationResult, DetectionResult, SegmentationResult, TrainResult
from resnetlab.training.tasks.base import Task

# recipe, engine, data_dir, workers (None: what the machine has), started_in (where paths in the recipe start), say; what it
# returns is the task, and the recipe with nothing left open
Prepare = Callable[[Any, DeviceConfig, Path, int | None, Path, Callable[[str], None]], tuple[Task, Any]]
# task, recipe, run, state: evaluates the test split, once, with the last iterate; writes model and report
Finish = Callable[[Any, Any, Any, RunState], TrainResult]


class Job(NamedTuple):
    """One of the tasks."""

    command: str  # what a person types to train it
    recipe: type[BaseRecipe]
    result: type[TrainResult]
    load: Callable[[Path], object]  # its model file; raises ModelFileError
    prepare: Prepare
    finish: Finish
    unusable: str = "images could not be read"  # how what is skipped is called
    running: Callable[[Any, Any, RunFolder], None] | None = (
        None  # task, recipe, run: writes the report of a run that goes on
    )


JOBS = {
    "classify": Job(
        "resnetlab train",
        Recipe,
        ClassificationResult,
        load_trained_model,
        classification_run.prepare,
        classification_run.finish,
        running=classification_run.running,
    ),
    "detect": Job(
        "resnetlab detect train",
        DetectionRecipe,
        DetectionResult,
        partial(load_annotated, task="detect"),
        detection_run.prepare_detection_run,
        detection_run.finish_detection_run,
        "boxes or images were invalid",
    ),
    "segment": Job(
        "resnetlab segment train",
        SegmentationRecipe,
        SegmentationResult,
        partial(load_annotated, task="segment"),
        segmentation_run.prepare_segmentation_run,
        segmentation_run.finish_segmentation_run,
        "masks or images were invalid",
    ),
}


def find_job(task: object, run: Path) -> Job:
    """The job of a run's task; raises RunError where this version knows none of that name."""
    if task not in JOBS:
        raise RunError(f"{run} is a run of the task {task!r}, which this version of resnetlab does not know.")
    return JOBS[str(task)]
