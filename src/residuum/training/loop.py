"""Runs from the outside: a new one, and one that goes on where its last checkpoint stands."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from residuum.data import sources
from residuum.data.decode import decoder
from residuum.errors import ResiduumError, RunError, UsageError
from residuum.records import Run, write_atomically
from residuum.runtime import environment, own_process_state
from residuum.tasks.classify import Classify
from residuum.tasks.task import Task
from residuum.training import jobs, recipes
from residuum.training.fitting import in_fitting_parts
from residuum.training.recipe import Recipe, Training
from residuum.training.result import Ended, Progress, Result
from residuum.training.running import prepare_task, run_to_end
from residuum.world import World, processes, restarted

R = TypeVar("R", bound=Training)


def _silent(_: Any) -> None:
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
    progress: Callable[[Progress], None] = _silent,
    say: Callable[[str], None] = _silent,
    **values: Any,
) -> Result:
    """Trains a network from the start, into a new run folder.

    Args:
        recipe: a Recipe, the name of one, or None for the data's own ("quick" for digits, "paper-cifar" for CIFAR, "photos"
            for a folder).
        data, net, seed: change the recipe's values.
        steps: brings the whole schedule to this length, in proportion.
        out: the run folder; None takes runs/<data>, or the next that is free.
        data_dir: where archives lie.
        workers: processes that decode pictures on disk; None takes what the machine has. The result is the same.
        progress: called at every record of metrics.jsonl.
        say: called with sentences for a person.
        **values: any other value of the recipe or of the network's specification, such as batch=64 or shortcut="C".

    Returns:
        Paths of the run, the model and the report; errors as fractions, times in seconds (docs/json.md, `train`).

    Raises:
        UsageError, DataError, RunError, DivergedError: see residuum.errors.
        Stopped: SIGINT or SIGTERM, after a checkpoint.
    """
    name = None if data is None else str(data)
    chosen = recipe if isinstance(recipe, Recipe) else resolve(recipe, data=name)
    chosen = adapt(chosen, data=name, net=net, steps=steps, seed=seed, values={k: _text(v) for k, v in values.items()})
    return cast(Result, start(chosen, Path(out) if out else None, Path(data_dir), device, progress, say, workers))


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def resolve(name: str | None, *, data: str | None) -> Recipe:
    """The recipe of a name, or the data's own where none is given."""
    return recipes.recipe(name or recipes.DEFAULTS.get(data or "digits", "photos"))


def adapt(
    recipe: R, *, data: str | None, net: str | None, steps: int | None, seed: int | None, values: Mapping[str, str]
) -> R:
    """The recipe with the command line's values; `steps` shrinks or stretches the whole schedule."""
    named: dict[str, Any] = {"data": data, "net": net, "seed": seed}
    recipe = replace(recipe, **{k: v for k, v in named.items() if v is not None})
    if steps is not None:
        if steps < 1:
            raise UsageError(f"--steps must be 1 or more, not {steps}.")
        recipe = recipe.shrunk(steps)
    return recipe.with_values(values)


def start(
    recipe: Training,
    out: Path | None,
    data_dir: Path,
    device: str = "auto",
    progress: Callable[[Progress], None] = _silent,
    say: Callable[[str], None] = _silent,
    workers: int | None = None,
    fit: bool = False,
) -> Ended:
    """Trains a complete recipe into a new run folder; nothing is made before data and network are known to be good.

    Args:
        fit: takes a step's pictures in as large parts as fit into memory; the recipe records them (`bn_batch`).
    """
    with own_process_state(), processes() as world:
        say = say if world.first else _silent
        if restarted() and out is None:
            raise UsageError("a job that is started again needs --out, the folder that it goes on in.")
        if world.from_first(restarted() and out is not None and (out / "recipe.toml").is_file()):
            return _resume(
                world,
                cast(Path, out),
                recipe.task,
                data_dir,
                device,
                workers,
                progress,
                say,
                partial(_as_begun, recipe),
            )
        task, recipe = prepare_task(recipe, data_dir, device, say, workers, world=world)
        if fit and isinstance(task, Classify) and isinstance(recipe, Recipe):
            task, recipe, size = in_fitting_parts(task, recipe)
            say(f"batch auto: {f'parts of {size:,} pictures fit' if size else 'it fits as it is'}")
        place = Run.create(out, sources.short_name(recipe.data)).path if world.first else None
        run = Run(world.from_first(place) or Path())
        with run.held() if world.first else contextlib.nullcontext():
            if world.first:
                _begin(run, task, recipe, data_dir)
            return run_to_end(task, recipe, run, progress if world.first else _silent, say)


def _as_begun(recipe: Training, recorded: Training) -> Training:
    """The recipe that is asked for, in the parts that were found to fit when the run began."""
    if isinstance(recipe, Recipe) and isinstance(recorded, Recipe):
        return replace(recipe, bn_batch=recorded.bn_batch)
    return recipe


def _begin(run: Run, task: Task, recipe: Training, data_dir: Path) -> None:
    """Writes what a run folder holds from the start."""
    run.refuse_unless_empty()  # another process may have been quicker
    write_atomically(run.path / "recipe.toml", recipe.to_toml())
    places = {"data_dir": str(data_dir.resolve()), "started_in": str(Path.cwd())}
    run.write_json("environment.json", _here(task) | {"decoder": decoder()} | places)
    if task.drawn:
        run.write_json("drawn.json", {split: list(names) for split, names in task.drawn.items()})


def _here(task: Task) -> dict[str, object]:
    """Versions and hardware of this machine."""
    device = task.engine.device
    return environment(device) | {"device": device.type, "processes": task.engine.world.size}


def resume(
    path: Path,
    *,
    task: str = "classify",
    data_dir: Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] = _silent,
    say: Callable[[str], None] = _silent,
    expect: Callable[[Any], Training] = lambda recipe: recipe,
) -> Ended:
    """Goes on with a run where its last checkpoint stands, to the same bits as if it had not been interrupted.

    The same bits need the same kind of device, processor and torch; where one differs from the run's record, `say` is told.

    Args:
        task: what the run is to be a run of, a name of training.jobs.
        device: None takes the kind of device that the run began on.
        expect: what the caller's own values make of the run's recipe; a difference is an error.

    Raises:
        RunError: no run there, another recipe or other data, every checkpoint damaged, or another process trains in it.
    """
    with own_process_state(), processes() as world:
        return _resume(world, path, task, data_dir, device, workers, progress, say if world.first else _silent, expect)


def _resume(
    world: World,
    path: Path,
    task: str,
    data_dir: Path | None,
    device: str | None,
    workers: int | None,
    progress: Callable[[Progress], None],
    say: Callable[[str], None],
    expect: Callable[[Any], Training],
) -> Ended:
    run = Run.open(path) if world.first else Run(path)
    with run.held() if world.first else contextlib.nullcontext():
        known = _recorded(run, task, expect) if world.first else None
        done, recipe, recorded = cast(tuple[Ended | None, Training, dict[str, Any]], world.from_first(known))
        if done is not None:
            say(f"{path} is finished; nothing to do.")
            return done
        if data_dir is None:
            data_dir = Path(str(recorded.get("data_dir", "data")))
        kind, place = device or str(recorded.get("device", "auto")), Path(str(recorded.get("started_in", "")))
        prepared, _ = prepare_task(recipe, data_dir, kind, say, workers, place, world)
        _tell_apart(recorded, _here(prepared), recipe, say)
        return run_to_end(prepared, recipe, run, progress if world.first else _silent, say)


def _recorded(run: Run, task: str, expect: Callable[[Any], Training]) -> tuple[Ended | None, Training, dict[str, Any]]:
    """The result (None where the run is not at its end), the recipe and the environment of a run."""
    values = run.read_recipe()
    job = jobs.named(values.get("task", task), run.path)
    if job is not jobs.JOBS[task]:
        raise RunError(f"{run.path} is a run of another task; go on with: {job.command} --resume {run.path}")
    recipe: Training = job.recipe.from_values(values)
    asked = expect(recipe)
    if isinstance(recipe, Recipe) and isinstance(asked, Recipe) and asked.on_bad_image == "skip" != recipe.on_bad_image:
        recipe = replace(recipe, on_bad_image="skip")  # a run that a picture stopped may go on without it
    open_ones = {key: getattr(recipe, key) for key in ("precision", "compile") if getattr(asked, key, "") == "auto"}
    asked = replace(asked, **open_ones)
    if changed := replace(asked, threads=asked.threads or recipe.threads).differences(recipe):
        raise RunError(
            f"{run.path} was started with another recipe: you ask for {'; '.join(changed)}. Resume without it, or start anew."
        )
    if recipe.to_json() != job.recipe.from_values(values).to_json():
        write_atomically(run.path / "recipe.toml", recipe.to_toml())
    run.remove_leftovers()
    return _finished(run, job), recipe, run.read_json("environment.json") or {}


def _tell_apart(
    recorded: Mapping[str, Any], here: Mapping[str, Any], recipe: Training, say: Callable[[str], None]
) -> None:
    """Says where the run goes on under other circumstances than it began in."""
    places = ("device", "cpu", "gpu", "torch")
    if other := [f"{k} {recorded.get(k)} (now {here[k]})" for k in places if recorded.get(k) != here[k]]:
        say(f"the run began on another machine or version, so its last bits may differ: {', '.join(other)}")
    alike = getattr(recipe, "bn_batch", 0) or getattr(recipe, "bn_sync", False)
    if (before := recorded.get("processes", 1)) != here["processes"] and not alike:
        say(
            f"the run began in {before} process{'es' * (before > 1)} (now {here['processes']}): BN sees each one's share "
            "of a step, so the result will differ; the pictures and their order do not."
        )


def _finished(run: Run, job: jobs.Job) -> Ended | None:
    """The result of a run that has all its parts; None where one is missing or cannot be read, and is to be made again."""
    try:
        done = run.read_json("result.json") or {}
        job.load(run.model)
        result = job.result(**done | {"run": str(run.path), "model": str(run.model), "report": str(run.report)})
    except (ResiduumError, KeyError, TypeError):
        return None
    return result if run.report.is_file() else None
