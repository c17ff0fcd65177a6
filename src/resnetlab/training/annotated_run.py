"""Preparation and final evaluation of a run, shared by detection and segmentation."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from resnetlab.data import sources
from resnetlab.data.annotated_dataset import AnnotatedDataset, AnnotatedItem
from resnetlab.data.prefetch import default_workers
from resnetlab.device import DeviceConfig
from resnetlab.models.cost import count_parameters
from resnetlab.run_folder import RunFolder
from resnetlab.training import recipes
from resnetlab.training.annotated_recipes import AnnotatedRecipe
from resnetlab.training.checkpoint import RunState
from resnetlab.training.result import TrainResult
from resnetlab.training.tasks.annotated import AnnotatedTask, Plan

P = TypeVar("P", bound=AnnotatedItem)
E = TypeVar("E", bound=TrainResult)


def plan_annotated_task(
    recipe: AnnotatedRecipe,
    data: AnnotatedDataset[P],
    device_config: DeviceConfig,
    workers: int | None,
    started_in: Path,
) -> Plan[P]:
    """What the task is prepared from; paths in the recipe are relative to `started_in`."""
    return Plan(
        data=data,
        name=sources.short_name(recipe.data),
        net=recipe.net,
        specification=recipe.specification,
        init=recipe.init,
        start_from=started_in / recipe.start_from if recipe.start_from else None,
        sides=recipe.sides,
        flips=recipe.flips,
        val_images=recipe.val_images,
        batch=recipe.batch,
        bn_batch=recipe.bn_batch,
        seed=recipe.seed,
        device_config=device_config,
        workers=default_workers(device_config) if workers is None else workers,
    )


def report_plan(
    task: AnnotatedTask[Any, Any], recipe: AnnotatedRecipe, what: str, report: Callable[[str], None]
) -> None:
    """Reports what is trained (`what` begins the sentence), and for how many epochs."""
    report(
        f"{what} to train on, {len(task.held_out):,} held out, {len(task.test):,} to test on ({task.evaluated_split}); "
        f"{count_parameters(task.net):,} parameters"
    )
    epochs = recipe.steps * recipe.batch / len(task.train)
    report(f"{recipe.steps:,} steps of {recipe.batch:,} images are {epochs:,.1f} epochs (--steps changes that)")


def evaluate_and_save(
    task: Any, recipe: AnnotatedRecipe, run: RunFolder, state: RunState, kind: type[E], figures: Sequence[str]
) -> tuple[E, Any]:
    """Evaluates the last iterate on the test split, once, and writes the model; returns the result and the metrics.

    Args:
        kind, figures: the task's result type, and the metrics that it has.
    """
    start = time.perf_counter()
    held_out = task.evaluate(task.held_out).to_json() if task.held_out else None
    metrics = task.evaluate(task.test)
    values = metrics.to_json()
    measured = {task.evaluated_split: values} | ({"held_out": held_out} if held_out else {})
    if task.device_config.world.is_first:
        task.annotated_model(recipe.to_json(), measured).save(run.model)
    state.seconds += time.perf_counter() - start
    result = kind(
        run=str(run.path),
        model=str(run.model),
        report=str(run.report),
        split=task.evaluated_split,
        n=values["n"],
        steps=state.step,
        seconds=round(state.seconds, 3),
        images_per_second=round(recipe.batch * state.step / state.step_seconds, 1),
        parameters=count_parameters(task.net),
        budget=recipes.describe_budget(recipe),
        **{key: values[key] for key in figures},
    )
    return result, metrics
