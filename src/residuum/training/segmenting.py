"""A segmenter's run before its first step and after its last one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from residuum.data import masks, sources
from residuum.evaluation import drawing
from residuum.evaluation.masks import segment
from residuum.records import Run, write_atomically
from residuum.runtime import Engine
from residuum.tasks import segment as task_of
from residuum.tasks.segment import Segment
from residuum.training import dense, dense_report
from residuum.training.checkpoint import State
from residuum.training.dense_recipe import SegmentRecipe
from residuum.training.result import MaskResult

COLUMNS = (("class", "class"), ("pixels", "pixels"), ("iou", "IoU"))


def prepare(
    recipe: SegmentRecipe,
    engine: Engine,
    data_dir: Path,
    workers: int | None,
    started_in: Path,
    say: Callable[[str], None],
) -> tuple[Segment, SegmentRecipe]:
    """Reads the data and builds the network."""
    data = masks.load(started_in / recipe.data, recipe.on_bad_mask)
    values = {key: getattr(recipe, key) for key in ("size", "longest", "bn", "frozen", "head", "output_stride")}
    task = task_of.prepare(dense.plan(recipe, data, recipe.on_bad_mask, engine, workers, started_in), values)
    pictures = f"{len(task.train):,} pictures of {len(task.classes)} classes"
    dense.tell(task, recipe, f"{recipe.net} ({recipe.head}) on {recipe.data}: {pictures}", say)
    return task, recipe


def finish(task: Segment, recipe: SegmentRecipe, run: Run, state: State) -> MaskResult:
    """Touches the test split, once, with the last iterate; writes model and report."""
    figures = ("mean_iou", "pixel_error", "per_class")
    result, judgement = dense.ended(task, recipe, run, state, MaskResult, figures)
    if not task.engine.world.first:
        return result
    pictures = []
    for picture in judgement.pictures[: dense_report.PICTURES]:
        pixels = picture.read()[0]
        drawn = drawing.mask_on(pixels, segment(task.net, pixels, task.values, task.engine))
        pictures.append((picture.name, drawing.page_uri(drawn)))
    page = dense_report.render(
        task,
        recipe,
        run,
        result,
        title=f"{recipe.net} ({recipe.head}) on {sources.short_name(recipe.data)}",
        merit=f"{result.mean_iou:.3f} mean IoU",
        lead=f"On the {task.judged} split, {result.n:,} pictures; {100 * result.pixel_error:.2f} % of the pixels are wrong.",
        columns=COLUMNS,
        pictures=pictures,
        curve=None,
        caption="Each class in its colour, the background as it is; the split's first pictures.",
    )
    write_atomically(run.report, page)
    return result
