"""A segmenter's run before its first step and after its last one."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from residuum.data import masks, sources
from residuum.data.reading import spare_processes
from residuum.evaluation import drawing
from residuum.evaluation.masks import segment
from residuum.models.accounting import parameters
from residuum.records import Run, write_atomically
from residuum.runtime import Engine
from residuum.tasks import segment as task_of
from residuum.tasks.segment import Segment
from residuum.training import dense_report, recipes
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
    task = task_of.prepare(
        data=masks.load(started_in / recipe.data, recipe.on_bad_mask),
        name=sources.short_name(recipe.data),
        net=recipe.net,
        specification_changes=recipe.specification,
        init=recipe.init,
        start_from=started_in / recipe.start_from if recipe.start_from else None,
        values={key: getattr(recipe, key) for key in ("size", "longest", "bn", "frozen", "head", "output_stride")},
        sides=recipe.sides,
        flips=recipe.flips,
        held=recipe.held_out,
        on_bad=recipe.on_bad_mask,
        batch=recipe.batch,
        seed=recipe.seed,
        engine=engine,
        workers=spare_processes(engine) if workers is None else workers,
    )
    say(f"{recipe.net} ({recipe.head}) on {recipe.data}: {len(task.train):,} pictures of {len(task.classes)} classes, "
        f"{len(task.held_out):,} held out, {len(task.test):,} to test on ({task.judged}); "
        f"{parameters(task.net):,} parameters")  # fmt: skip
    passes = recipe.steps * recipe.batch / len(task.train)
    say(f"{recipe.steps:,} steps of {recipe.batch:,} show every picture {passes:,.1f} times (--steps changes that)")
    return task, recipe


def finish(task: Segment, recipe: SegmentRecipe, run: Run, state: State) -> MaskResult:
    """Touches the test split, once, with the last iterate; writes model and report."""
    began = time.perf_counter()
    held_out = task.judge(task.held_out).to_json() if task.held_out else None
    judgement = task.judge(task.test)
    figures = judgement.to_json()
    if task.engine.world.first:
        task.bundle(recipe.to_json(), {task.judged: figures} | ({"held_out": held_out} if held_out else {})).save(
            run.model
        )
    state.seconds += time.perf_counter() - began
    result = MaskResult(
        run=str(run.path),
        model=str(run.model),
        report=str(run.report),
        split=task.judged,
        n=figures["n"],
        mean_iou=figures["mean_iou"],
        pixel_error=figures["pixel_error"],
        per_class=figures["per_class"],
        steps=state.step,
        seconds=round(state.seconds, 3),
        images_per_second=round(recipe.batch * state.step / state.step_seconds, 1),
        parameters=parameters(task.net),
        budget=recipes.budget(recipe),
    )
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
