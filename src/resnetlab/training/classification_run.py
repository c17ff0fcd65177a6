"""A classifier's run before its first step and after its last one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from resnetlab.data import sources
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.mixing import Mixing
from resnetlab.data.prefetch import default_workers
from resnetlab.device import DeviceConfig, default_precision
from resnetlab.errors import UsageError
from resnetlab.evaluation.calibration import fit_temperature
from resnetlab.evaluation.gradcam import make_cam_overlays
from resnetlab.models.cost import count_parameters
from resnetlab.nn.batchnorm import convert_sync_batchnorm
from resnetlab.run_folder import RunFolder, read_metrics, write_atomically
from resnetlab.training import recipes, report
from resnetlab.training.average import reestimate_bn_statistics
from resnetlab.training.checkpoint import RunState
from resnetlab.training.compilation import choose_compilation
from resnetlab.training.micro_batches import count_micro_batches
from resnetlab.training.recipe import Recipe
from resnetlab.training.result import ClassificationResult
from resnetlab.training.tasks import classification
from resnetlab.training.tasks.classification import ClassificationTask
from resnetlab.training.tasks.starting_network import NetworkOptions, nearest_name


def prepare(
    recipe: Recipe,
    device_config: DeviceConfig,
    data_dir: Path,
    workers: int | None,
    started_in: Path,
    report: Callable[[str], None],
) -> tuple[ClassificationTask, Recipe]:
    """Reads the data and builds the network."""
    parts = count_micro_batches(recipe, device_config.world)  # before anything takes time
    network = NetworkOptions(
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
    task = classification.prepare(
        data=sources.resolve_data_path(recipe.data, started_in),
        data_dir=data_dir,
        reading=ReadOptions(
            recipe.on_bad_image, quarantine, default_workers(device_config) if workers is None else workers
        ),
        network=network,
        size=recipe.image_size,
        resize=recipe.eval_resize,
        normalise=recipe.normalise,
        held_out=recipe.val_images,
        crop=Crop(recipe.crop, recipe.scale, recipe.area),
        augmentation=Augmentation(
            recipe.pad, recipe.pad_with, recipe.flip, recipe.colour, recipe.trivial_augment, recipe.erasing
        ),
        mixing=Mixing(recipe.mixup, recipe.cutmix),
        label_smoothing=recipe.label_smoothing,
        batch=recipe.batch,
        num_micro_batches=parts,
        seed=recipe.seed,
        device_config=device_config,
    )
    if recipe.schedule == "plateau" and not len(task.held_out):
        raise UsageError(
            "schedule=plateau watches the held-out error, but nothing is held out; add --set val_images=1000."
        )
    name, changes = (recipe.net, recipe.specification) if recipe.net else nearest_name(task.net.spec)
    recipe = replace(recipe, net=name, specification=changes)
    task = replace(task, device_config=choose_compilation(device_config, recipe, task.net.spec))
    if not task.device_config.cuda_graph:  # which "auto" finds again when the run goes on
        recipe = replace(recipe, compile="on" if task.device_config.compiled else "off")
    if recipe.bn_sync:
        convert_sync_batchnorm(task.net, device_config.world)
    for sentence in task.notes:
        report(sentence)
    evaluated = "" if task.evaluated_split == "test" else f" ({task.evaluated_split})"
    data = sources.strip_signature(recipe.data)
    report(f"{recipe.net} on {data}: {len(task.loader.split):,} images to train on, {len(task.held_out):,} held out, "
        f"{len(task.test):,} to test on{evaluated}; {count_parameters(task.net):,} parameters")  # fmt: skip
    if not sources.is_builtin(recipe.data):
        passes = recipe.steps * recipe.batch / len(task.loader.split)
        report(
            f"{recipe.steps:,} steps of {recipe.batch:,} show every image {passes:,.1f} times (--steps changes that)"
        )
    return task, recipe


def finish(task: ClassificationTask, recipe: Recipe, run: RunFolder, state: RunState) -> ClassificationResult:
    """Touches the test split, once, with the last iterate (or the average, where one is kept); writes model and report."""
    began = time.perf_counter()
    if recipe.precise_bn:
        reestimate_bn_statistics(task, recipe)
    kept = task.evaluate(task.held_out) if len(task.held_out) else None
    temperature = fit_temperature(kept.log_scores, kept.labels) if kept else 1.0
    held_out = kept.with_temperature(temperature).to_json() if kept else None
    evaluation = task.evaluate(task.test).with_temperature(temperature)
    measured = {task.evaluated_split: evaluation.to_json()} | ({"held_out": held_out} if held_out else {})
    fitted = {"data": task.data["name"], "split": "held_out", "n": kept.n, "protocol": "1crop"} if kept else {}
    if task.device_config.world.is_first:
        bundle = task.trained_model(_unsigned(recipe).to_json(), measured)
        replace(bundle, temperature=temperature, calibration=fitted, reference_images=task.reference_images()).save(
            run.model
        )
    state.seconds += time.perf_counter() - began
    result = ClassificationResult(
        run=str(run.path),
        model=str(run.model),
        report=str(run.report),
        split=task.evaluated_split,
        n=evaluation.n,
        top1_error=evaluation.top1_error,
        top1_interval=tuple(measured[task.evaluated_split]["top1_interval"]),
        top5_error=evaluation.top5_error,
        held_out_error=held_out["top1_error"] if held_out else None,
        steps=state.step,
        seconds=round(state.seconds, 3),
        images_per_second=round(recipe.batch * state.step / state.step_seconds, 1),
        parameters=count_parameters(task.net),
        budget=recipes.describe_budget(recipe),
    )
    if not task.device_config.world.is_first:
        return result
    views = task.evaluated_images(task.test)
    page = report.render_report(
        title=f"{recipe.net} on {sources.short_name(recipe.data)}",
        recipe=_unsigned(recipe).to_json(),
        differences=recipes.describe_changes(_unsigned(recipe), default_precision(task.device_config.device)),
        budget=result.budget,
        metrics=read_metrics(run),
        evaluation=evaluation,
        images=views,
        overlays=make_cam_overlays(
            task.net, evaluation, views, task.preprocessing, task.device_config, report.OVERLAYS
        ),
        environment=run.read_json("environment.json") or {},
        result=result.to_json(),
    )
    write_atomically(run.report, page)
    return result


def _unsigned(recipe: Recipe) -> Recipe:
    """The recipe for files that are given away: the address of its data without a signature. recipe.toml has it whole."""
    return replace(recipe, data=sources.strip_signature(recipe.data))


def running(task: ClassificationTask, recipe: Recipe, run: RunFolder) -> None:
    """Writes the report of a run that goes on: its curves so far, and its recipe."""
    page = report.render_progress(
        title=f"{recipe.net} on {sources.short_name(recipe.data)}",
        recipe=_unsigned(recipe).to_json(),
        differences=recipes.describe_changes(_unsigned(recipe), default_precision(task.device_config.device)),
        budget=recipes.describe_budget(recipe),
        metrics=read_metrics(run),
        environment=run.read_json("environment.json") or {},
        run=str(run.path),
    )
    write_atomically(run.report, page)
