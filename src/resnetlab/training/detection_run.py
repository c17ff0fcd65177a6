"""Preparation, final evaluation and report of a detector's run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resnetlab.data import box_dataset, sources
from resnetlab.device import DeviceConfig
from resnetlab.evaluation import overlays
from resnetlab.run_folder import RunFolder, write_atomically
from resnetlab.training import annotated_report, annotated_run
from resnetlab.training.annotated_recipes import DetectionRecipe
from resnetlab.training.checkpoint import RunState
from resnetlab.training.result import DetectionResult
from resnetlab.training.tasks.detection import DetectionTask, prepare_detection_task

COLUMNS = (("class", "class"), ("n", "boxes"), ("ap_50", "AP@.5"), ("ap", "AP@[.5:.95]"), ("voc_ap", "VOC AP"))
MIN_SCORE = 0.5  # of the boxes that the report shows


def prepare_detection_run(
    recipe: DetectionRecipe,
    device_config: DeviceConfig,
    data_dir: Path,
    workers: int | None,
    started_in: Path,
    report: Callable[[str], None],
) -> tuple[DetectionTask, DetectionRecipe]:
    """Reads the data and builds the network."""
    data = box_dataset.load_boxes(started_in / recipe.data, recipe.on_bad_box)
    values = {
        key: getattr(recipe, key) for key in ("image_size", "longest", "bn", "frozen", "form", "context", "pyramid")
    }
    plan = annotated_run.plan_annotated_task(recipe, data, device_config, workers, started_in)
    task = prepare_detection_task(plan, values, recipe.anchors, recipe.regions)
    count, classes = sum(len(p.boxes) for p in task.train), len(task.classes)
    images = f"{len(task.train):,} images, {count:,} boxes of {classes} classes"
    report(f"anchors {', '.join(map(str, task.head_spec.anchors))} px")
    annotated_run.report_plan(task, recipe, f"{recipe.net} ({recipe.form}) on {recipe.data}: {images}", report)
    return task, recipe


def finish_detection_run(
    task: DetectionTask, recipe: DetectionRecipe, run: RunFolder, state: RunState
) -> DetectionResult:
    """Evaluates the last iterate on the test split, once; writes model and report."""
    figures = ("map", "map_50", "voc_map", "per_class")
    result, metrics = annotated_run.evaluate_and_save(task, recipe, run, state, DetectionResult, figures)
    if not task.device_config.world.is_first:
        return result
    count = sum(row["n"] for row in result.per_class)
    scope = f"On the {task.evaluated_split} split, {result.n:,} images with {count:,} boxes"
    examples = list(zip(metrics.truth, metrics.detections, strict=True))[: annotated_report.MAX_IMAGES]
    images = [
        (t.name, overlays.jpeg_data_uri(overlays.draw_boxes(t.read_pixels(), d.at_least(MIN_SCORE), task.classes, t)))
        for t, d in examples
    ]
    page = annotated_report.render_annotated_report(
        task,
        recipe,
        run,
        result,
        title=f"{recipe.net} ({recipe.form}) on {sources.short_name(recipe.data)}",
        merit=f"{result.map_50:.3f} mAP@.5, {result.map:.3f} mAP",
        lead=f"{scope}; Pascal VOC's mAP is {result.voc_map:.3f}.",
        columns=COLUMNS,
        images=images,
        curve=overlays.precision_recall_svg(metrics),
        caption=f"Boxes of score {MIN_SCORE:g} or more in their class's colour, true boxes thin and white; the first images.",
    )
    write_atomically(run.report, page)
    return result
