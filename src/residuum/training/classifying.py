"""A classifier's run before its first step and after its last one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from residuum.data import sources
from residuum.data.augment import Augmentation
from residuum.data.crops import Crop
from residuum.data.mixing import Mixing
from residuum.data.reading import spare_processes
from residuum.data.stored import Reading
from residuum.errors import UsageError
from residuum.evaluation.calibration import fit_temperature
from residuum.evaluation.heat import looks
from residuum.models.accounting import parameters
from residuum.nn.sync import synchronise
from residuum.records import Run, read_metrics, write_atomically
from residuum.runtime import Engine, automatic_precision
from residuum.tasks import classify
from residuum.tasks.classify import Classify
from residuum.tasks.network import Network, described
from residuum.training import recipes, report
from residuum.training.average import precise_statistics
from residuum.training.checkpoint import State
from residuum.training.compiling import compiling
from residuum.training.parts import parts_of
from residuum.training.recipe import Recipe
from residuum.training.result import Result


def prepare(
    recipe: Recipe, engine: Engine, data_dir: Path, workers: int | None, started_in: Path, say: Callable[[str], None]
) -> tuple[Classify, Recipe]:
    """Reads the data and builds the network."""
    parts = parts_of(recipe, engine.world)  # before anything takes time
    network = Network(
        name=recipe.net,
        changes=recipe.specification,
        init=recipe.init,
        zero_last_bn=recipe.zero_init_last_bn,
        stochastic_depth=recipe.stochastic_depth,
        recompute=recipe.recompute,
        start_from=str(started_in / recipe.start_from) if recipe.start_from else "",
        frozen_bn=recipe.frozen_bn,
        seed=recipe.seed,
    )
    quarantine = str(started_in / recipe.quarantine) if recipe.quarantine else ""
    task = classify.prepare(
        data=sources.located(recipe.data, started_in),
        data_dir=data_dir,
        reading=Reading(recipe.on_bad_image, quarantine, spare_processes(engine) if workers is None else workers),
        network=network,
        size=recipe.size,
        resize=recipe.resize,
        normalise=recipe.normalise,
        held_out=recipe.held_out,
        crop=Crop(recipe.crop, recipe.scale, recipe.area),
        augmentation=Augmentation(
            recipe.pad, recipe.pad_with, recipe.flip, recipe.colour, recipe.trivial_augment, recipe.erasing
        ),
        mixing=Mixing(recipe.mixup, recipe.cutmix),
        label_smoothing=recipe.label_smoothing,
        batch=recipe.batch,
        shares=parts,
        seed=recipe.seed,
        engine=engine,
    )
    if recipe.schedule == "plateau" and not len(task.held_out):
        raise UsageError(
            "schedule=plateau watches the held-out error, but nothing is held out; add --set held_out=1000."
        )
    name, changes = (recipe.net, recipe.specification) if recipe.net else described(task.net.spec)
    recipe = replace(recipe, net=name, specification=changes)
    task = replace(task, engine=compiling(engine, recipe, task.net.spec))
    if not task.engine.graphs:  # which "auto" finds again when the run goes on
        recipe = replace(recipe, compile="on" if task.engine.compiled else "off")
    if recipe.bn_sync:
        synchronise(task.net, engine.world)
    for sentence in task.notes:
        say(sentence)
    judged = "" if task.judged == "test" else f" ({task.judged})"
    data = sources.unsigned(recipe.data)
    say(f"{recipe.net} on {data}: {len(task.loader.split):,} pictures to train on, {len(task.held_out):,} held out, "
        f"{len(task.test):,} to test on{judged}; {parameters(task.net):,} parameters")  # fmt: skip
    if not sources.is_name(recipe.data):
        passes = recipe.steps * recipe.batch / len(task.loader.split)
        say(f"{recipe.steps:,} steps of {recipe.batch:,} show every picture {passes:,.1f} times (--steps changes that)")
    return task, recipe


def finish(task: Classify, recipe: Recipe, run: Run, state: State) -> Result:
    """Touches the test split, once, with the last iterate (or the average, where one is kept); writes model and report."""
    began = time.perf_counter()
    if recipe.precise_bn:
        precise_statistics(task, recipe)
    kept = task.judge(task.held_out) if len(task.held_out) else None
    temperature = fit_temperature(kept.log_scores, kept.labels) if kept else 1.0
    held_out = kept.at(temperature).to_json() if kept else None
    judgement = task.judge(task.test).at(temperature)
    measured = {task.judged: judgement.to_json()} | ({"held_out": held_out} if held_out else {})
    fitted = {"data": task.data["name"], "split": "held_out", "n": kept.n, "protocol": "1crop"} if kept else {}
    if task.engine.world.first:
        bundle = task.bundle(_unsigned(recipe).to_json(), measured)
        replace(bundle, temperature=temperature, calibration=fitted, samples=task.samples()).save(run.model)
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
    if not task.engine.world.first:
        return result
    views = task.views(task.test)
    page = report.render(
        title=f"{recipe.net} on {sources.short_name(recipe.data)}",
        recipe=_unsigned(recipe).to_json(),
        differences=recipes.changes(_unsigned(recipe), automatic_precision(task.engine.device)),
        budget=result.budget,
        metrics=read_metrics(run),
        judgement=judgement,
        images=views,
        looks=looks(task.net, judgement, views, task.preprocessing, task.engine, report.LOOKS),
        environment=run.read_json("environment.json") or {},
        result=result.to_json(),
    )
    write_atomically(run.report, page)
    return result


def _unsigned(recipe: Recipe) -> Recipe:
    """The recipe for files that are given away: the address of its data without a signature. recipe.toml has it whole."""
    return replace(recipe, data=sources.unsigned(recipe.data))


def running(task: Classify, recipe: Recipe, run: Run) -> None:
    """Writes the report of a run that goes on: its curves so far, and its recipe."""
    page = report.render_running(
        title=f"{recipe.net} on {sources.short_name(recipe.data)}",
        recipe=_unsigned(recipe).to_json(),
        differences=recipes.changes(_unsigned(recipe), automatic_precision(task.engine.device)),
        budget=recipes.budget(recipe),
        metrics=read_metrics(run),
        environment=run.read_json("environment.json") or {},
        run=str(run.path),
    )
    write_atomically(run.report, page)
