"""What differs in a classifier's run where an image has several classes, or none: loss, figures, thresholds, report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional as F

from resnetlab.data.dataset import Dataset, Split
from resnetlab.data.label_sets import find_classes
from resnetlab.device import DeviceConfig
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation.calibration import MIN_IMAGES
from resnetlab.evaluation.multi_label import DEFAULT_THRESHOLD, MultiLabelMetrics, evaluate_label_sets, fit_thresholds
from resnetlab.formatting import format_list
from resnetlab.models.cost import count_parameters
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.own_network import Network
from resnetlab.models.reference_images import ReferenceImages
from resnetlab.preprocessing import Preprocessing
from resnetlab.run_folder import RunFolder, write_atomically
from resnetlab.training import recipes, report
from resnetlab.training.recipe import Recipe
from resnetlab.training.result import MultiLabelResult
from resnetlab.training.run_state import RunState


class MultiLabelTask(Protocol):
    """What is needed of a classification task (tasks.classification)."""

    @property
    def recipe(self) -> Recipe: ...

    @property
    def net(self) -> Network: ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    @property
    def held_out(self) -> Split: ...

    @property
    def test(self) -> Split: ...

    @property
    def data(self) -> Mapping[str, str]: ...

    @property
    def device_config(self) -> DeviceConfig: ...

    @property
    def evaluated_split(self) -> str: ...

    @property
    def label_sets(self) -> Tensor | None: ...

    def trained_model(self, metrics: Mapping[str, Mapping[str, Any]]) -> TrainedModel: ...

    def reference_images(self) -> ReferenceImages | None: ...

    def describe_run(self, run: RunFolder) -> report.RunDescription: ...


def check_label_sets(recipe: Recipe, source: Dataset, train: Split) -> list[str]:
    """A sentence on the data; raises UsageError for a value of one class per image, DataError for a class without an image."""
    single = {
        f"class_weights={recipe.class_weights}": recipe.class_weights != "none",
        "sampling=balanced": recipe.sampling == "balanced",
        "none_share": recipe.none_share > 0,
        f"fold={recipe.fold}": bool(recipe.fold),
    }
    if wrong := [value for value, is_set in single.items() if is_set]:
        raise UsageError(f"{wrong[0]} is for data with one class per image, these give several; leave it out.")
    if missing := sorted(set(range(len(source.classes))) - find_classes(train.labels, source.label_sets)):
        names = format_list([source.classes[i] for i in missing])
        raise DataError(f"no image to train on has the class {names}; add some, or leave the class out.")
    assert source.label_sets is not None
    counts = source.label_sets.sum(1)[train.labels]
    sentence = (
        f"several classes per image: {float(counts.mean()):.2f} of {len(source.classes):,} on average, none in "
        f"{int((counts == 0).sum()):,} of the images to train on"
    )
    return [sentence]


def multi_label_loss(logits: Tensor, targets: Tensor, label_sets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mean binary cross entropy in nats over images and classes, and the share of decisions that are wrong; scalars.

    Args:
        logits: float32 (B, classes).
        targets: positions in `label_sets`, int64 (B,), or shares of these where images are mixed, (B, sets).
        label_sets: float32 (sets, classes).
        smoothing: targets are this much nearer to one half.
    """
    truth = label_sets[targets] if targets.ndim == 1 else targets.float() @ label_sets  # (B, classes)
    error = ((logits.detach() > 0) != (truth > DEFAULT_THRESHOLD)).float().mean()
    return F.binary_cross_entropy_with_logits(logits, truth * (1 - smoothing) + smoothing / 2), error


def held_out_figures(task: MultiLabelTask) -> dict[str, float]:
    """1 - mAP, by which weights are chosen, and label error and loss at a threshold of one half."""
    metrics = _evaluate_split(task, task.held_out)
    return {"map_error": 1 - metrics.mean_ap, "label_error": metrics.label_error, "loss": metrics.loss}


def finish_multi_label(task: MultiLabelTask, run: RunFolder, state: RunState) -> MultiLabelResult:
    """Fits the thresholds on the held-out images, evaluates the test split, once; writes model and report."""
    start, recipe = time.perf_counter(), task.recipe
    val = _evaluate_split(task, task.held_out) if len(task.held_out) else None
    thresholds, fitted = (DEFAULT_THRESHOLD,) * len(task.classes), {}
    if val is not None and val.n >= MIN_IMAGES:
        thresholds = fit_thresholds(val.scores, val.truth)
        fitted = {"data": task.data["name"], "split": "held_out", "n": val.n, "protocol": "1crop"}
        val = replace(val, thresholds=thresholds)
    evaluation = replace(_evaluate_split(task, task.test), thresholds=thresholds)
    measured = {task.evaluated_split: evaluation.to_json()} | ({"held_out": val.to_json()} if val else {})
    state.seconds += time.perf_counter() - start
    result = MultiLabelResult(
        run=str(run.path),
        model=str(run.model),
        report=str(run.report),
        split=task.evaluated_split,
        n=evaluation.n,
        mean_ap=evaluation.mean_ap,
        f1=evaluation.macro("f1"),
        micro_f1=evaluation.micro_f1,
        label_error=evaluation.label_error,
        held_out_mean_ap=val.mean_ap if val else None,
        steps=state.step,
        seconds=round(state.seconds, 3),
        images_per_second=round(recipe.batch * state.step / state.step_seconds, 1),
        parameters=count_parameters(task.net),
        budget=recipes.describe_run_budget(run, recipe),
    )
    if task.device_config.world.is_first:
        model = task.trained_model(measured)
        model.thresholds, model.calibration = thresholds, fitted
        model.reference_images = task.reference_images()
        model.save(run.model)
        page = report.render_multi_label_report(
            task.describe_run(run), result, evaluation, model.describe_images(), model.calibration
        )
        write_atomically(run.report, page)
    return result


def _evaluate_split(task: MultiLabelTask, split: Split) -> MultiLabelMetrics:
    assert task.label_sets is not None
    truth = (task.label_sets.cpu() > 0)[split.labels]
    return evaluate_label_sets(task.net, split, truth, task.preprocessing, task.classes, task.device_config)
