"""The one loop: it reads like the sentence "for every step: batch, step, and now and then record, judge, save"."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from residuum.data import sources
from residuum.data.augment import Augmentation
from residuum.data.crops import Crop
from residuum.data.decode import decoder
from residuum.data.reading import spare_processes
from residuum.data.stored import Reading
from residuum.errors import DivergedError, ResiduumError, RunError, UsageError
from residuum.evaluation.calibration import fit_temperature
from residuum.models.accounting import parameters
from residuum.models.bundle import load_bundle
from residuum.records import Metrics, Run, read_metrics, write_atomically
from residuum.runtime import automatic_precision, environment, own_process_state, pick_engine, seed_for
from residuum.tasks import classify
from residuum.tasks.classify import Classify
from residuum.training import recipes, report
from residuum.training.checkpoint import State, restore, save_checkpoint
from residuum.training.optim import SGD
from residuum.training.recipe import Recipe
from residuum.training.result import Progress, Result
from residuum.training.schedule import learning_rate
from residuum.training.step import train_step
from residuum.training.stopping import Request, Stopped, stop_requests


def _silent(_: Any) -> None:
    return None


def train(
    recipe: Recipe | str | None = None,
    *,
    data: str | None = None,
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

    Raises:
        UsageError, DataError, RunError, DivergedError: see residuum.errors.
        Stopped: SIGINT or SIGTERM, after a checkpoint.
    """
    chosen = recipe if isinstance(recipe, Recipe) else resolve(recipe, data=data)
    chosen = adapt(chosen, data=data, net=net, steps=steps, seed=seed, values={k: _text(v) for k, v in values.items()})
    return start(chosen, Path(out) if out else None, Path(data_dir), device, progress, say, workers)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def resolve(name: str | None, *, data: str | None) -> Recipe:
    """The recipe of a name, or the data's own where none is given."""
    return recipes.recipe(name or recipes.DEFAULTS.get(data or "digits", "photos"))


def adapt(
    recipe: Recipe, *, data: str | None, net: str | None, steps: int | None, seed: int | None, values: Mapping[str, str]
) -> Recipe:
    """The recipe with the command line's values; `steps` shrinks or stretches the whole schedule."""
    named: dict[str, Any] = {"data": data, "net": net, "seed": seed}
    recipe = replace(recipe, **{k: v for k, v in named.items() if v is not None})
    if steps is not None:
        if steps < 1:
            raise UsageError(f"--steps must be 1 or more, not {steps}.")
        recipe = recipe.shrunk(steps)
    return recipe.with_values(values)


def start(
    recipe: Recipe,
    out: Path | None,
    data_dir: Path,
    device: str = "auto",
    progress: Callable[[Progress], None] = _silent,
    say: Callable[[str], None] = _silent,
    workers: int | None = None,
) -> Result:
    """Trains a complete recipe into a new run folder; nothing is made before data and network are known to be good."""
    with own_process_state():
        task, recipe = prepare_task(recipe, data_dir, device, say, workers)
        run = Run.create(out, sources.short_name(recipe.data))
        with run.held():
            run.refuse_unless_empty()  # another process may have been quicker
            write_atomically(run.path / "recipe.toml", recipe.to_toml())
            places = {"data_dir": str(data_dir.resolve()), "started_in": str(Path.cwd())}
            here = environment() | {"device": task.engine.device.type, "decoder": decoder()}
            run.write_json("environment.json", here | places)
            if task.drawn:
                run.write_json("drawn.json", {split: list(names) for split, names in task.drawn.items()})
            return _run(task, recipe, run, progress, say)


def resume(
    path: Path,
    *,
    data_dir: Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    progress: Callable[[Progress], None] = _silent,
    say: Callable[[str], None] = _silent,
    expect: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> Result:
    """Goes on with a run where its last checkpoint stands, to the same bits as if it had not been interrupted.

    The same bits need the same kind of device, processor and torch; where one differs from the run's record, `say` is told.

    Args:
        device: None takes the kind of device that the run began on.
        expect: what the caller's own values make of the run's recipe; a difference is an error.

    Raises:
        RunError: no run there, another recipe or other data, every checkpoint damaged, or another process trains in it.
    """
    run = Run.open(path)
    recipe = Recipe.from_values(run.read_recipe())
    asked = expect(recipe)
    if asked.precision == "auto":
        asked = replace(asked, precision=recipe.precision)
    if changed := replace(asked, threads=asked.threads or recipe.threads).differences(recipe):
        raise RunError(
            f"{path} was started with another recipe: you ask for {'; '.join(changed)}. Resume without it, or start anew."
        )
    with run.held(), own_process_state():
        run.remove_leftovers()
        if (done := _finished(run)) is not None:
            say(f"{path} is finished; nothing to do.")
            return done
        recorded = run.read_json("environment.json") or {}
        if data_dir is None:
            data_dir = Path(str(recorded.get("data_dir", "data")))
        kind, place = device or str(recorded.get("device", "auto")), Path(str(recorded.get("started_in", "")))
        task, _ = prepare_task(recipe, data_dir, kind, say, workers, place)
        here = environment() | {"device": task.engine.device.type}
        if other := [
            f"{k} {recorded[k]} (now {here[k]})"
            for k in ("device", "cpu", "gpu", "torch")
            if recorded.get(k) != here[k]
        ]:
            say(f"the run began on another machine or version, so its last bits may differ: {', '.join(other)}")
        return _run(task, recipe, run, progress, say)


def _finished(run: Run) -> Result | None:
    """The result of a run that has all its parts; None where one is missing or cannot be read, and is to be made again."""
    try:
        done = run.read_json("result.json") or {}
        load_bundle(run.model)
        paths = {"run": str(run.path), "model": str(run.model), "report": str(run.report)}
        result = Result(**done | paths | {"top1_interval": tuple(done["top1_interval"])})
    except (ResiduumError, KeyError, TypeError):
        return None
    return result if run.report.is_file() else None


def prepare_task(
    recipe: Recipe,
    data_dir: Path,
    device: str,
    say: Callable[[str], None],
    workers: int | None = None,
    started_in: Path = Path(),
) -> tuple[Classify, Recipe]:
    """The task of a recipe, and the recipe with nothing left open.

    Args:
        started_in: the folder that paths in the recipe start from.
    """
    engine = pick_engine(recipe.precision, device, recipe.threads)
    quarantine = str(started_in / recipe.quarantine) if recipe.quarantine else ""
    task = classify.prepare(
        data=sources.located(recipe.data, started_in),
        data_dir=data_dir,
        reading=Reading(recipe.on_bad_image, quarantine, spare_processes(engine) if workers is None else workers),
        net=recipe.net,
        specification_changes=recipe.specification,
        init=recipe.init,
        size=recipe.size,
        resize=recipe.resize,
        normalise=recipe.normalise,
        held_out=recipe.held_out,
        crop=Crop(recipe.crop, recipe.scale, recipe.area),
        augmentation=Augmentation(recipe.pad, recipe.pad_with, recipe.flip, recipe.colour),
        batch=recipe.batch,
        seed=recipe.seed,
        engine=engine,
    )
    recipe = replace(recipe, precision=engine.precision, threads=engine.threads)
    judged = "" if task.judged == "test" else f" ({task.judged})"
    say(f"{recipe.net} on {recipe.data}: {len(task.loader.split):,} pictures to train on, {len(task.held_out):,} held out, "
        f"{len(task.test):,} to test on{judged}; {parameters(task.net):,} parameters")  # fmt: skip
    say(f"engine: {engine}")
    if not sources.is_name(recipe.data):
        passes = recipe.steps * recipe.batch / len(task.loader.split)
        say(f"{recipe.steps:,} steps of {recipe.batch:,} show every picture {passes:,.1f} times (--steps changes that)")
    if changed := recipes.changes(recipe, automatic_precision(engine.device)):
        say(f"recipe {recipe.name}, with {'; '.join(changed)}")
    if label := recipes.budget(recipe):
        say(f"budget: {label}")
    return task, recipe


def _run(
    task: Classify, recipe: Recipe, run: Run, progress: Callable[[Progress], None], say: Callable[[str], None]
) -> Result:
    """Trains from the latest checkpoint to the end, then judges, saves and reports."""
    identity = f"{recipe.key}/{task.data['fingerprint']}"
    optimizer = SGD(task.net, recipe)
    state, passed_over = restore(run, task.net, optimizer, identity)
    for sentence in passed_over:
        say(sentence)
    if state.step:
        say(f"going on from step {state.step:,}")
    metrics = Metrics(run, state.step)
    try:
        with stop_requests() as request:
            _train(task, recipe, run, optimizer, state, metrics, identity, request, progress)
    finally:
        metrics.close()
        task.loader.close()
        _note_skipped(task, run, say)
    return _finish(task, recipe, run, state, say)


def _train(
    task: Classify,
    recipe: Recipe,
    run: Run,
    optimizer: SGD,
    state: State,
    metrics: Metrics,
    identity: str,
    request: Request,
    progress: Callable[[Progress], None],
) -> None:
    """The steps."""
    began, saved = time.perf_counter() - state.seconds, time.monotonic()
    held_out: float | None = None
    task.net.train()
    while state.step < recipe.steps:
        started = time.perf_counter()
        torch.manual_seed(seed_for(recipe.seed, "network", state.step))  # dropout in the network, if any
        lr = learning_rate(recipe, state.step, state.warm_since)
        loss, wrong = train_step(task, optimizer, task.batch(state.step), lr)
        state.step += 1
        state.losses.append(loss)
        state.errors.append(wrong)
        stop = request.signum  # read once: a signal that comes later in the step waits for the next
        last = state.step == recipe.steps
        recording = last or state.step % recipe.record_every == 0
        saving = last or stop is not None or time.monotonic() - saved >= 60 * recipe.checkpoint_minutes
        if recording or saving or task.engine.device.type == "cpu":
            _check_finite(state, lr)  # on a GPU this waits for the device, so only where something does anyway
        state.step_seconds += time.perf_counter() - started
        state.seconds = time.perf_counter() - began
        if recording:
            figures = _record(recipe, state, metrics, lr)
        if len(task.held_out) and (last or state.step % recipe.judge_every == 0):
            judgement = task.judge(task.held_out)
            held_out = judgement.top1_error
            metrics.write("held_out", state.step, top1_error=held_out, loss=judgement.loss)
        if recording:
            progress(_progress(recipe, state, figures, lr, held_out))
        if saving:
            metrics.sync()
            save_checkpoint(run, task.net, optimizer, state, identity)
            saved = time.monotonic()
        if stop is not None and not last:
            message = f"stopped at step {state.step:,}, which is saved; go on with: residuum train --resume {run.path}"
            raise Stopped(stop, message)


def _check_finite(state: State, lr: float) -> None:
    """Raises DivergedError, naming the step, where a loss since the last record is not finite."""
    finite = torch.stack(state.losses).isfinite().tolist()
    if all(finite):
        return
    step = state.step - len(finite) + finite.index(False)
    raise DivergedError(
        f"the loss is not finite at step {step:,} (learning rate {lr:g}); try a tenth of the learning rate "
        f"(--set lr={lr / 10:g}), a warm-up (--set warmup=steps) or --set precision=fp32."
    )


def _record(recipe: Recipe, state: State, metrics: Metrics, lr: float) -> dict[str, float]:
    """Writes the means since the last record, and ends the warm-up of 2015 §4.2 where they say so."""
    loss, error = (float(torch.stack(values).mean()) for values in (state.losses, state.errors))
    if recipe.warmup == "train-error" and state.warm_since is None and error < recipe.warmup_error:
        state.warm_since = state.step
    state.losses.clear()
    state.errors.clear()
    rate = recipe.batch * state.step / state.step_seconds
    figures = {"loss": loss, "error": error, "lr": lr, "images_per_second": rate, "seconds": state.seconds}
    metrics.write("train", state.step, **figures)
    return figures


def _progress(
    recipe: Recipe, state: State, figures: Mapping[str, float], lr: float, held_out: float | None
) -> Progress:
    return Progress(
        step=state.step,
        steps=recipe.steps,
        lr=lr,
        loss=figures["loss"],
        error=figures["error"],
        held_out_error=held_out,
        images_per_second=figures["images_per_second"],
        seconds_left=state.seconds / state.step * (recipe.steps - state.step),
    )


def _note_skipped(task: Classify, run: Run, say: Callable[[str], None]) -> None:
    """Lists in the run folder the pictures that were left out because they could not be read; nothing where there are none."""
    before = run.read_json("skipped.json") or {}
    if new := {name: why for name, why in task.skipped.items() if name not in before}:
        run.write_json("skipped.json", before | new)
        say(
            f"{len(before) + len(new):,} pictures could not be read and were left out; {run.path / 'skipped.json'} lists them"
        )


def _finish(task: Classify, recipe: Recipe, run: Run, state: State, say: Callable[[str], None]) -> Result:
    """Touches the test split, once, with the last iterate; writes model, result and report."""
    began = time.perf_counter()
    kept = task.judge(task.held_out) if len(task.held_out) else None
    temperature = fit_temperature(kept.log_scores, kept.labels) if kept else 1.0
    held_out = kept.at(temperature).to_json() if kept else None
    judgement = task.judge(task.test).at(temperature)
    _note_skipped(task, run, say)
    measured = {task.judged: judgement.to_json()} | ({"held_out": held_out} if held_out else {})
    replace(task.bundle(recipe.to_json(), measured), temperature=temperature).save(run.model)
    state.seconds += time.perf_counter() - began
    result = Result(
        run=str(run.path),
        model=str(run.model),
        report=str(run.report),
        split=task.judged,
        n=judgement.n,
        top1_error=judgement.top1_error,
        top1_interval=tuple(measured[task.judged]["top1_interval"]),
        top5_error=judgement.top5_error,
        held_out_error=held_out["top1_error"] if held_out else None,
        steps=state.step,
        seconds=round(state.seconds, 3),
        images_per_second=round(recipe.batch * state.step / state.step_seconds, 1),
        parameters=parameters(task.net),
        budget=recipes.budget(recipe),
    )
    page = report.render(
        title=f"{recipe.net} on {sources.short_name(recipe.data)}",
        recipe=recipe.to_json(),
        differences=recipes.changes(recipe, automatic_precision(task.engine.device)),
        budget=result.budget,
        metrics=read_metrics(run),
        judgement=judgement,
        images=task.views(task.test),
        environment=run.read_json("environment.json") or {},
        result=result.to_json(),
    )
    write_atomically(run.report, page)
    run.write_json("result.json", result.to_json())
    say(f"report: {run.report}")
    return result
