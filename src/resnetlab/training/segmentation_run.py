"""Preparation, final evaluation and report of a segmenter's run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resnetlab.data import mask_dataset, sources
from resnetlab.device import DeviceConfig
from resnetlab.evaluation import overlays
from resnetlab.evaluation.segmentation import segment_image
from resnetlab.run_folder import RunFolder, write_atomically
from resnetlab.training import annotated_report, annotated_run
from resnetlab.training.annotated_recipes import SegmentationRecipe
from resnetlab.training.checkpoint import RunState
from resnetlab.training.result import SegmentationResult
from resnetlab.training.tasks.segmentation import SegmentationTask, prepare_segmentation_task

COLUMNS = (("class", "class"), ("pixels", "pixels"), ("iou", "IoU"))


def prepare_segmentation_run(
    recipe: SegmentationRecipe,
    device_config: DeviceConfig,
    data_dir: Path,
    workers: int | None,
    started_in: Path,
    report: Callable[[str], None],
) -> tuple[SegmentationTask, SegmentationRecipe]:
    """Reads the data and builds the network."""
    data = mask_dataset.load_masks(started_in / recipe.data, recipe.on_bad_mask)
    values = {key: getattr(recipe, key) for key in ("image_size", "longest", "bn", "frozen", "head", "output_stride")}
    plan = annotated_run.plan_annotated_task(recipe, data, device_config, workers, started_in)
    task = prepare_segmentation_task(plan, values)
    images = f"{len(task.train):,} images of {len(task.classes)} classes"
    annotated_run.report_plan(task, recipe, f"{recipe.net} ({recipe.head}) on {recipe.data}: {images}", report)
    return task, recipe


def finish_segmentation_run(
    task: SegmentationTask, recipe: SegmentationRecipe, run: RunFolder, state: RunState
) -> SegmentationResult:
    """Evaluates the last iterate on the test split, once; writes model and report."""
    figures = ("mean_iou", "pixel_error", "per_class")
    result, metrics = annotated_run.evaluate_and_save(task, recipe, run, state, SegmentationResult, figures)
    if not task.device_config.world.is_first:
        return result
    images = []
    for image in metrics.images[: annotated_report.MAX_IMAGES]:
        pixels = image.read_pixels()
        overlay = overlays.draw_mask(pixels, segment_image(task.net, pixels, task.head_spec, task.device_config))
        images.append((image.name, overlays.jpeg_data_uri(overlay)))
    page = annotated_report.render_annotated_report(
        task,
        recipe,
        run,
        result,
        title=f"{recipe.net} ({recipe.head}) on {sources.short_name(recipe.data)}",
        merit=f"{result.mean_iou:.3f} mean IoU",
        lead=f"On the {task.evaluated_split} split, {result.n:,} images; {100 * result.pixel_error:.2f} % of pixels are wrong.",
        columns=COLUMNS,
        images=images,
        curve=None,
        caption="Each class in its colour, the background unchanged; the first images of the split.",
    )
    write_atomically(run.report, page)
    return result
