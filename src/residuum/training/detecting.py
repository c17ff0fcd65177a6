"""A detector's run before its first step and after its last one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from residuum.data import boxes, sources
from residuum.evaluation import drawing
from residuum.records import Run, write_atomically
from residuum.runtime import Engine
from residuum.tasks import detect
from residuum.tasks.detect import Detect
from residuum.training import dense, dense_report
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
    values = {key: getattr(recipe, key) for key in ("size", "longest", "bn", "frozen", "form", "context", "pyramid")}
    plan = dense.plan(recipe, data, recipe.on_bad_box, engine, workers, started_in)
    task = detect.prepare(plan, values, recipe.anchors, recipe.regions)
    count, classes = sum(len(p.boxes) for p in task.train), len(task.classes)
    pictures = f"{len(task.train):,} pictures, {count:,} boxes of {classes} classes"
    say(f"anchors {', '.join(map(str, task.values.anchors))} px")
    dense.tell(task, recipe, f"{recipe.net} ({recipe.form}) on {recipe.data}: {pictures}", say)
    return task, recipe


def finish(task: Detect, recipe: DetectRecipe, run: Run, state: State) -> BoxResult:
    """Touches the test split, once, with the last iterate; writes model and report."""
    figures = ("map", "map_50", "voc_map", "per_class")
    result, judgement = dense.ended(task, recipe, run, state, BoxResult, figures)
    if not task.engine.world.first:
        return result
    count = sum(row["n"] for row in result.per_class)
    scope = f"On the {task.judged} split, {result.n:,} pictures with {count:,} boxes"
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
