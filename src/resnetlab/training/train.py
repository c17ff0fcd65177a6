"""Starts a new run, or resumes one from its last checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from resnetlab.data import sources
from resnetlab.data.decode import jpeg_decoder
from resnetlab.device import environment, preserve_process_state
from resnetlab.distributed import World, join_process_group, was_restarted
from resnetlab.errors import ResNetLabError, RunError, UsageError
from resnetlab.run_folder import RunFolder, write_atomically
from resnetlab.training import recipes, task_table
from resnetlab.training.checkpoint import upgrade_run
from resnetlab.training.memory import fit_micro_batches
from resnetlab.training.recipe import BaseRecipe, Recipe
from resnetlab.training.result import ClassificationResult, Progress, TrainResult
from resnetlab.training.run import prepare_task, run_to_end
from resnetlab.training.tasks.base import Task
from resnetlab.training.tasks.classification import ClassificationTask

R = TypeVar("R", bound=BaseRecipe)


def _ignore(_: Any) -> None:
    return None


def train(
    recipe: Recipe | str | None = None,
    *,
    data: str | Path | None = None,
    net: str | None = None,
    steps: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    data_dir: str | Path = "data",
    device: str = "auto",
    workers: int | None = None,
    progress: Callable[[Progress], None] = _ignore,
    report: Callable[[str], None] = _ignore,
    **values: Any,
) -> ClassificationResult:
    """Trains a network into a new run folder.

    Args:
        recipe: a Recipe, the name of one, or None for the default of the data ("quick" for digits, "paper-cifar" for CIFAR,
            "photos" for a folder).
        data, net, seed: change the recipe's values.
        steps: length of the run; the schedule is rescaled to it.
        out: the run folder; None takes runs/<data>, or the next free name.
        data_dir: the folder of the archives.
        workers: processes that decode images on disk; None decides by the machine. The result does not depend on it.
        progress: called at every line of metrics.jsonl.
        report: called with sentences on what happens.
        **values: any other value of the recipe or of the network's specification, such as batch=64 or shortcut="C".

    Returns:
        Paths of the run, the model and the report; errors as fractions, times in seconds (docs/json.md, `train`).

    Raises:
        UsageError, DataError, RunError, DivergedError: see resnetlab.errors.
        StopSignal: SIGINT or SIGTERM, after a checkpoint.
    """
    name = None if data is None else str(data)
    chosen = recipe if isinstance(recipe, Recipe) else choose_recipe(recipe, data=name)
    chosen = override_recipe(
        chosen, data=name, net=net, steps=steps, seed=seed, values={k: _text(v) for k, v in values.items()}
    )
    return cast(
        ClassificationResult,
        start_run(chosen, Path(out) if out else None, Path(data_dir), device, progress, report, workers),
    )


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def choose_recipe(name: str | None, *, data: str | None) -> Recipe:
    """The recipe of a name, or the default of the data."""
    return recipes.find_classification_recipe(name or recipes.DEFAULT_RECIPES.get(data or "digits", "photos"))


def override_recipe(
    recipe: R, *, data: str | None, net: str | None, steps: int | None, seed: int | None, values: Mapping[str, str]
) -> R:
    """The recipe with the given values; `steps` rescales the schedule."""
    named: dict[str, Any] = {"data": data, "net": net, "seed": seed}
    recipe = replace(recipe, **{k: v for k, v in named.items() if v is not None})
    if steps is not None:
        if steps < 1:
            raise UsageError(f"--steps must be 1 or more, not {steps}.")
        recipe = recipe.rescale(steps)
    return recipe.with_values(values)


def start_run(
    recipe: BaseRecipe,
    out: Path | None,
    data_dir: Path,
    device: str = "auto",
    on_progress: Callable[[Progress], None] = _ignore,
    report: Callable[[str], None] = _ignore,
    workers: int | None = None,
    fit: bool = False,
) -> TrainResult:
    """Trains a complete recipe into a new run folder, which is created only after data and network are ready.

    Args:
        fit: take the largest micro-batch that fits into memory; the recipe records it as `bn_batch`.
    """
    with preserve_process_state(), join_process_group() as world:
        report = report if world.is_first else _ignore
        if was_restarted() and out is None:
            raise UsageError("a job that is started again needs --out, the folder that it goes on in.")
        if world.broadcast(was_restarted() and out is not None and (out / "recipe.toml").is_file()):
            return _resume(
                world,
                cast(Path, out),
                recipe.task,
                data_dir,
                device,
                workers,
                on_progress,
                report,
                partial(_as_begun, recipe),
            )
        task, recipe = prepare_task(recipe, data_dir, device, report, workers, world=world)
        if fit and isinstance(task, ClassificationTask) and isinstance(recipe, Recipe):
            task, recipe, size = fit_micro_batches(task, recipe)
            report(f"batch auto: {f'micro-batches of {size:,} images fit' if size else 'the batch fits as it is'}")
        place = RunFolder.create(out, sources.short_name(recipe.data)).path if world.is_first else None
        run = RunFolder(world.broadcast(place) or Path())
        with run.lock() if world.is_first else contextlib.nullcontext():
            if world.is_first:
                _begin(run, task, recipe, data_dir)
            return run_to_end(task, recipe, run, on_progress if world.is_first else _ignore, report)


def _as_begun(recipe: BaseRecipe, recorded: BaseRecipe) -> BaseRecipe:
    """The requested recipe with the `bn_batch` that was found when the run began."""
    if isinstance(recipe, Recipe) and isinstance(recorded, Recipe):
        return replace(recipe, bn_batch=recorded.bn_batch)
    return recipe


def _begin(run: RunFolder, task: Task, recipe: BaseRecipe, data_dir: Path) -> None:
    """Writes the files that a run folder has from the start."""
    run.check_empty()  # another process may have been faster
    write_atomically(run.path / "recipe.toml", recipe.to_toml())
    places = {"data_dir": str(data_dir.resolve()), "started_in": str(Path.cwd())}
    run.write_json("environment.json", _describe_machine(task) | {"decoder": jpeg_decoder()} | places)
    if task.holdout:
        run.write_json("holdout.json", {split: list(names) for split, names in task.holdout.items()})


def _describe_machine(task: Task) -> dict[str, object]:
    """Versions and hardware of this machine."""
    device = task.device_config.device
    return environment(device) | {"device": device.type, "processes": task.device_config.world.size}


def resume(
    path: Path,
    *,
    task: str = "classify",
    data_dir: Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    on_progress: Callable[[Progress], None] = _ignore,
    report: Callable[[str], None] = _ignore,
    expect: Callable[[Any], BaseRecipe] = lambda recipe: recipe,
) -> TrainResult:
    """Resumes a run from its last checkpoint; the result is bit-identical to that of an uninterrupted run.

    This needs the same kind of device, processor and torch version; `report` is called if one differs from the run's record.

    Args:
        task: the expected task of the run, a key of training.task_table.
        device: None takes the kind of device that the run started on.
        expect: applies the caller's values to the run's recipe; a difference is an error.

    Raises:
        RunError: not a run folder, another recipe or other data, every checkpoint damaged, or another process trains in it.
    """
    with preserve_process_state(), join_process_group() as world:
        return _resume(
            world, path, task, data_dir, device, workers, on_progress, report if world.is_first else _ignore, expect
        )


def _resume(
    world: World,
    path: Path,
    task: str,
    data_dir: Path | None,
    device: str | None,
    workers: int | None,
    on_progress: Callable[[Progress], None],
    report: Callable[[str], None],
    expect: Callable[[Any], BaseRecipe],
) -> TrainResult:
    run = RunFolder.open(path) if world.is_first else RunFolder(path)
    with run.lock() if world.is_first else contextlib.nullcontext():
        known = _recorded(run, task, expect) if world.is_first else None
        done, recipe, recorded = cast(tuple[TrainResult | None, BaseRecipe, dict[str, Any]], world.broadcast(known))
        if done is not None:
            report(f"{path} is finished; nothing to do.")
            return done
        if data_dir is None:
            data_dir = Path(str(recorded.get("data_dir", "data")))
        kind, place = device or str(recorded.get("device", "auto")), Path(str(recorded.get("started_in", "")))
        prepared, _ = prepare_task(recipe, data_dir, kind, report, workers, place, world)
        _report_differences(recorded, _describe_machine(prepared), recipe, report)
        return run_to_end(prepared, recipe, run, on_progress if world.is_first else _ignore, report)


def _recorded(
    run: RunFolder, task: str, expect: Callable[[Any], BaseRecipe]
) -> tuple[TrainResult | None, BaseRecipe, dict[str, Any]]:
    """The result (None if unfinished), the recipe and the environment of a run."""
    values = run.read_recipe()
    job = task_table.find_job(values.get("task", task), run.path)
    if job is not task_table.JOBS[task]:
        raise RunError(f"{run.path} is a run of another task; go on with: {job.command} --resume {run.path}")
    recipe: BaseRecipe = job.recipe.from_values(values)
    asked = expect(recipe)
    if isinstance(recipe, Recipe) and isinstance(asked, Recipe) and asked.on_bad_image == "skip" != recipe.on_bad_image:
        recipe = replace(recipe, on_bad_image="skip")  # a run that an unreadable image stopped may continue without it
    open_ones = {key: getattr(recipe, key) for key in ("precision", "compile") if getattr(asked, key, "") == "auto"}
    asked = replace(asked, **open_ones)
    if changed := replace(asked, threads=asked.threads or recipe.threads).differences(recipe):
        raise RunError(
            f"{run.path} was started with another recipe: you ask for {'; '.join(changed)}. Resume without it, "
            "or start a new run."
        )
    done = _read_result(run, job)
    if done is None:
        upgrade_run(run, recipe)
    if recipe.to_json() != job.recipe.from_values(values).to_json():
        write_atomically(run.path / "recipe.toml", recipe.to_toml())
    run.remove_temporary_files()
    return done, recipe, run.read_json("environment.json") or {}


def _report_differences(
    recorded: Mapping[str, Any], here: Mapping[str, Any], recipe: BaseRecipe, report: Callable[[str], None]
) -> None:
    """Reports differences between this machine and the one that the run started on."""
    places = ("device", "cpu", "gpu", "torch")
    if other := [f"{k} {recorded.get(k)} (now {here[k]})" for k in places if recorded.get(k) != here[k]]:
        report(f"the run started on another machine or version, so its last bits may differ: {', '.join(other)}")
    alike = getattr(recipe, "bn_batch", 0) or getattr(recipe, "bn_sync", False)
    if (before := recorded.get("processes", 1)) != here["processes"] and not alike:
        report(
            f"the run started in {before} process{'es' * (before > 1)} (now {here['processes']}): BN sees each one's share "
            "of a step, so the result will differ; the images and their order do not."
        )


def _read_result(run: RunFolder, job: task_table.Job) -> TrainResult | None:
    """The result of a finished run; None if one of its files is missing or cannot be read, so that it is written again."""
    try:
        done = run.read_json("result.json") or {}
        job.load(run.model)
        result = job.result(**done | {"run": str(run.path), "model": str(run.model), "report": str(run.report)})
    except (ResNetLabError, KeyError, TypeError):
        return None
    return result if run.report.is_file() else None
