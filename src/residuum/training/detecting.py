"""A detector's run before its first step and after its last one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from residuum.data import boxes, sources
from residuum.data.reading import spare_processes
from residuum.evaluation import drawing
from residuum.models.accounting import parameters
from residuum.records import Run, write_atomically
from residuum.runtime import Engine
from residuum.tasks import detect
from residuum.tasks.detect import Detect
from residuum.training import dense_report, recipes
from residuum.training.checkpoint import State
from residuum.training.dense_recipe import DetectRecipe
from residuum.training.result import BoxResult

COLUMNS = (("class", "class"), ("n", "boxes"), ("ap_50", "AP@.5"), ("ap", "AP@[.5:.95]"), ("voc_ap", "VOC AP"))
SURE = 0.5  # score of the boxes that the report shows


def prepare(
    recipe: DetectRecipe,
    engine: Engine,
    data_dir: Path,
    workers: int | None,
    started_in: Path,
    say: Callable[[str], None],
) -> tuple[Detect, DetectRecipe]:
    """Reads the data and builds the network."""
    data = boxes.load(started_in / recipe.data, recipe.on_bad_box)
    task = detect.prepare(
        data=data,
        name=sources.short_name(recipe.data),
        net=recipe.net,
        specification_changes=recipe.specification,
        init=recipe.init,
        start_from=started_in / recipe.start_from if recipe.start_from else None,
        values={key: getattr(recipe, key) for key in ("size", "longest", "bn", "frozen", "form", "context", "pyramid")},
        anchors=recipe.anchors,
        sides=recipe.sides,
        regions=recipe.regions,
        flips=recipe.flips,
        held=recipe.held_out,
        on_bad=recipe.on_bad_box,
        batch=recipe.batch,
        seed=recipe.seed,
        engine=engine,
        workers=spare_processes(engine) if workers is None else workers,
    )
    count, classes = sum(len(p.boxes) for p in task.train), len(task.classes)
    say(f"{recipe.net} ({recipe.form}) on {recipe.data}: {len(task.train):,} pictures, {count:,} boxes of {classes} classes "
        f"to train on, {len(task.held_out):,} held out, {len(task.test):,} to test on ({task.judged}); "
        f"{parameters(task.net):,} parameters; anchors {', '.join(map(str, task.values.anchors))} px")  # fmt: skip
    passes = recipe.steps * recipe.batch / len(task.train)
    say(f"{recipe.steps:,} steps of {recipe.batch:,} show every picture {passes:,.1f} times (--steps changes that)")
    return task, recipe


def finish(task: Detect, recipe: DetectRecipe, run: Run, state: State) -> BoxResult:
    """Touches the test split, once, with the last iterate; writes model and report."""
    began = time.perf_counter()
    held_out = task.judge(task.held_out).to_json() if task.held_out else None
    judgement = task.judge(task.test)
    figures = judgement.to_json()
    measured = {task.judged: figures} | ({"held_out": held_out} if held_out else {})
    if task.engine.world.first:
        task.bundle(recipe.to_json(), measured).save(run.model)
    state.seconds += time.perf_counter() - began
    result = BoxResult(
        run=str(run.path),
        model=str(run.model),
        report=str(run.report),
        split=task.judged,
        n=figures["n"],
        map=figures["map"],
        map_50=figures["map_50"],
        voc_map=figures["voc_map"],
        per_class=figures["per_class"],
        steps=state.step,
        seconds=round(state.seconds, 3),
        images_per_second=round(recipe.batch * state.step / state.step_seconds, 1),
        parameters=parameters(task.net),
        budget=recipes.budget(recipe),
    )
    if not task.engine.world.first:
        return result
    scope = f"On the {task.judged} split, {result.n:,} pictures with {figures['boxes']:,} boxes"
    shown = list(zip(judgement.truth, judgement.found, strict=True))[: dense_report.PICTURES]
    page = dense_report.render(
        task,
        recipe,
        run,
        result,
        title=f"{recipe.net} ({recipe.form}) on {sources.short_name(recipe.data)}",
        merit=f"{result.map_50:.3f} mAP@.5, {result.map:.3f} mAP",
        lead=f"{scope}; Pascal VOC's mAP is {result.voc_map:.3f}.",
        columns=COLUMNS,
        pictures=[
            (t.name, drawing.page_uri(drawing.boxes_on(t.pixels(), f.at_least(SURE), task.classes, t)))
            for t, f in shown
        ],
        curve=drawing.precision_recall(judgement),
        caption=f"Boxes of a score of {SURE:g} or more in their class's colour, true boxes thin and white; the first pictures.",
    )
    write_atomically(run.report, page)
    return result
