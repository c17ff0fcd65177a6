"""Errors on corrupted images, and the mean corruption error relative to a baseline (Hendrycks & Dietterich 2019, §4)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import cast

import torch
from torch import Tensor

from resnetlab.data import imagenet
from resnetlab.data.dataset import Split
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.prefetch import preprocess_image
from resnetlab.device import DeviceConfig, select_device, standard_torch_state
from resnetlab.distributed import join_process_group
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    CorruptionChoice,
    CorruptionErrors,
    Errors,
    corrupt,
)
from resnetlab.evaluation.evaluate import Evaluation, MultiLabelEvaluation
from resnetlab.evaluation.metrics import ClassificationMetrics
from resnetlab.evaluation.protocols import ONE_CROP
from resnetlab.evaluation.scores import Member, ScoreSummary, drop_skipped, predict_scores
from resnetlab.formatting import format_list
from resnetlab.models.model_file import TrainedModel
from resnetlab.preprocessing import Preprocessing

ALEXNET = "alexnet"
EVERY_CORRUPTION = CorruptionChoice()


@dataclass(frozen=True, eq=False)
class _CorruptedSplit:
    """What `predict_scores` needs of a split: its images resized and cropped for a network, then corrupted."""

    split: Split
    preprocessing: Preprocessing
    kind: str
    severity: int
    seed: int

    @property
    def errors(self) -> ErrorPolicy:
        return self.split.errors

    @property
    def workers(self) -> int:
        return self.split.workers

    def __len__(self) -> int:
        return len(self.split)

    def name_of(self, i: int) -> str:
        return self.split.name_of(i)

    def read_image(self, i: int) -> Tensor:
        pixels = preprocess_image(self.preprocessing, self.split.read_image(i))
        return corrupt(pixels, self.kind, self.severity, self.seed, self.split.name_of(i))


@standard_torch_state()
def evaluate_corruptions(
    evaluation: Evaluation,
    choice: CorruptionChoice = EVERY_CORRUPTION,
    *,
    baseline: TrainedModel | str | None = None,
    precision: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """The evaluation with the model's errors on corrupted copies of the same images, one crop each.

    Args:
        baseline: a model of the same classes, whose errors are measured too; "alexnet" for its published errors on ImageNet-C;
            None for AlexNet's where the data have all of ImageNet's classes, and otherwise none.
        progress: called with corrupted images done and in all.

    Raises:
        UsageError: several models, another protocol than one crop, or AlexNet's errors for other data or severities.
        DataError: the baseline lacks a class.
    """
    if isinstance(evaluation, MultiLabelEvaluation):
        raise UsageError("corruptions are evaluated for models of one class per image; leave out --corruptions.")
    if evaluation.trained_models[0].preprocessing.dtype:
        raise UsageError("corruptions are defined on grey and RGB of 8 bits; leave out --corruptions.")
    if len(evaluation.trained_models) > 1 or evaluation.protocol != ONE_CROP:
        raise UsageError(
            "corruptions are evaluated for one model with one crop; leave out other models and --protocol."
        )
    names = tuple(imagenet.imagenet_class_names().values())
    is_imagenet = set(evaluation.metrics.classes) == set(names) and choice.severities == SEVERITIES
    if baseline == ALEXNET and not is_imagenet:
        raise UsageError(
            "AlexNet's errors are for ImageNet's 1,000 classes and all severities; give a model as --baseline."
        )
    if isinstance(baseline, str) and baseline != ALEXNET:
        raise UsageError(f"the baseline {baseline!r} is neither a loaded model nor {ALEXNET!r}.")
    if baseline is None and is_imagenet and not evaluation.scope:
        baseline = ALEXNET
    device_config = select_device(precision, device)
    models = [evaluation.trained_models[0], *([baseline] if isinstance(baseline, TrainedModel) else [])]
    total = len(models) * len(choice.kinds) * len(choice.severities) * evaluation.n
    measured: list[Errors] = []
    for i, model in enumerate(models):

        def on_progress(done: int, before: int = i * total // len(models)) -> None:
            progress(before + done, total)

        measured.append(_measure(model, evaluation, choice, device_config, on_progress))
    means = None
    if isinstance(baseline, TrainedModel):
        means = {kind: fmean(errors) for kind, errors in measured[1].items()}
    elif baseline == ALEXNET:
        means = {kind: CORRUPTIONS[kind].alexnet_error for kind in choice.kinds}
    name = "AlexNet (published)" if baseline == ALEXNET else "the given model" if baseline is not None else ""
    errors = CorruptionErrors(choice.severities, measured[0], evaluation.top1_error, choice.seed, name, means)
    return replace(evaluation, corruptions=errors)


def _measure(
    model: TrainedModel,
    evaluation: Evaluation,
    choice: CorruptionChoice,
    device_config: DeviceConfig,
    on_progress: Callable[[int], None],
) -> Errors:
    """The errors of a model on the images of an evaluation, for each kind and severity."""
    classes, preprocessing = evaluation.metrics.classes, model.preprocessing
    if missing := [name for name in classes if name not in model.classes]:
        raise DataError(f"the baseline lacks classes that are evaluated: {format_list(missing)}; give another model.")
    if len(set(preprocessing.size)) > 1:
        raise UsageError("corruptions are for networks of square images.")
    columns = torch.tensor([model.classes.index(name) for name in classes])
    cropped = replace(preprocessing, resize=max(preprocessing.size))  # the images are resized before they are corrupted
    member = Member.from_network(model.net, cropped, device_config, columns=columns, temperature=model.temperature)
    errors: dict[str, tuple[float, ...]] = {}
    done, summary = 0, ScoreSummary(evaluation.metrics.labels)
    with join_process_group() as world:
        device_config = replace(device_config, world=world)
        for kind in choice.kinds:
            row = []
            for severity in choice.severities:
                split = cast(Split, _CorruptedSplit(evaluation.images, preprocessing, kind, severity, choice.seed))
                scores = predict_scores(
                    [member],
                    split,
                    device_config,
                    on_progress=lambda n, d=done: on_progress(d + n),  # type: ignore[misc]
                    summary=summary,
                )
                ((labels, kept),), _ = drop_skipped(split, evaluation.metrics.labels, scores)
                row.append(ClassificationMetrics(classes, kept, labels).top1_error)
                done += len(split)
            errors[kind] = tuple(row)
    return errors
