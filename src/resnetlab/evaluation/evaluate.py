"""One model or several on one split: every image once, by one protocol."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.data import sources
from resnetlab.data.dataset import Dataset, MemorySplit, Split
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.objects import dataset_from_object
from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.data.shared_loading import share_loading
from resnetlab.device import DeviceConfig, select_device, standard_torch_state
from resnetlab.distributed import World, join_process_group, leave_if_imported_again
from resnetlab.errors import AnsweredAttributes, DataError, UsageError, public, unknown_name_error
from resnetlab.evaluation.calibration import (
    choose_none_below,
    describe_calibration,
    describe_few_images,
    fit_temperature,
)
from resnetlab.evaluation.comparison import Comparison, compare_models
from resnetlab.evaluation.corruptions import CorruptionErrors
from resnetlab.evaluation.metrics import ClassificationMetrics, describe_wide_columns
from resnetlab.evaluation.multi_label import MultiLabelMetrics, describe_thresholds
from resnetlab.evaluation.protocols import ONE_CROP, Protocol, parse_protocol
from resnetlab.evaluation.published import find_published
from resnetlab.evaluation.scores import (
    Member,
    ScoreSummary,
    average_scores,
    drop_skipped,
    predict_scores,
    take_logarithms,
)
from resnetlab.evaluation.split_selection import (
    common_pixel_format,
    describe_overlap,
    pick_split,
    select_calibration_images,
)
from resnetlab.formatting import HtmlFigures, format_count, format_list, format_split
from resnetlab.models.model_file import TrainedModel, load_trained_model
from resnetlab.peer_words import EVALUATION_ATTRIBUTES
from resnetlab.preprocessing import Preprocessing

Model = TrainedModel | str | Path
SCOPES = ("all", "data")  # of the scores where the data have only some of a model's classes


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(AnsweredAttributes, HtmlFigures):
    """The result of one model, or of several as an ensemble, on a split.

    Attributes:
        metrics: of the model, or of the ensemble.
        weights: of the models in the ensemble; they add up to 1.
        members: the metrics of each model where there are several.
        protocol_options: every option of the protocol, as applied to each model.
        trained_models: the models with the temperatures that were used.
        corruptions: errors on corrupted images, where they were evaluated (evaluation.robustness).
        scope: which classes the scores are over, where the data have only some of the models'; "" where they have all.
        notes: sentences on evaluated images that a model saw in training, or may have seen.
    """

    metrics: ClassificationMetrics
    models: tuple[str, ...]
    weights: tuple[float, ...]
    members: tuple[ClassificationMetrics, ...]
    data: str
    split: str
    protocol: Protocol
    protocol_options: tuple[dict[str, Any], ...]
    trained_models: tuple[TrainedModel, ...]
    images: Split
    scope: str = ""
    corruptions: CorruptionErrors | None = None
    notes: tuple[str, ...] = ()
    attribute_answers = EVALUATION_ATTRIBUTES

    @property
    def n(self) -> int:
        return self.metrics.n

    @property
    def top1_error(self) -> float:
        return self.metrics.top1_error

    @property
    def top5_error(self) -> float:
        return self.metrics.top5_error

    def __repr__(self) -> str:
        images = format_count(self.n, "image")
        return f"Evaluation({self.data}, {format_split(self.split)} split, {images}, {self.protocol}: {self.metrics})"

    def _setting(self) -> dict[str, Any]:
        """What was evaluated, on what and how, for `to_json`."""
        return {
            "model": self.models[0] if len(self.models) == 1 else list(self.models),
            "data": self.data,
            "split": self.split,
            "protocol": str(self.protocol),
            "protocol_options": list(self.protocol_options),
            "classes": self.scope or "all",
            "notes": list(self.notes),
        } | ({"decode_on": "device"} if getattr(self.images, "decode_on", "") == "device" else {})

    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary; keys as in docs/json.md."""
        scaling = {
            "temperature": [model.temperature for model in self.trained_models],
            "calibration": [dict(model.calibration) or None for model in self.trained_models],
        }
        figures = self._setting() | self.metrics.to_json() | scaling
        n = self.n + len(self.metrics.skipped)
        known = None
        if len(self.models) == 1:
            known = find_published(self.trained_models[0], self.data, self.split, self.protocol, n)
        if self.metrics.skipped:
            figures["skipped"] = dict(self.metrics.skipped)
        figures["published"] = known.to_json() if known else None
        if self.none_of_these:
            figures["none_of_these"] = self.none_of_these
        if by_column := self.metrics.errors_by_column(self.images.columns):
            figures["by_column"] = by_column
        if self.corruptions:
            figures["corruptions"] = self.corruptions.to_json()
        if self.members:
            keys = ("top1_error", "top1_interval", "top5_error", "loss", "calibration_error")
            members = zip(self.models, self.weights, (each.to_json() for each in self.members), strict=True)
            figures["members"] = [
                {"model": name, "weight": weight} | {key: values[key] for key in keys}
                for name, weight, values in members
            ]
            figures["comparisons"] = [each.to_json() for each in self.comparisons]
        return figures

    to_dict = to_json

    @property
    def none_of_these(self) -> dict[str, float | None] | None:
        """What a model's lowest score does here (`metrics.with_none_below`); None if it has none, or for an ensemble."""
        below = self.trained_models[0].none_below if len(self.models) == 1 else 0.0
        return self.metrics.with_none_below(below) if below else None

    @property
    def calibration(self) -> list[str]:
        """Of each model, a sentence on how its scores were calibrated."""
        return [
            describe_calibration(each.temperature, each.calibration, str(self.protocol)) for each in self.trained_models
        ]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every two members, and every member with the ensemble."""
        results = [*zip(self.models, self.members, strict=True), ("ensemble", self.metrics)] if self.members else []
        return [compare_models(a, b, name_a, name_b) for (name_a, a), (name_b, b) in combinations(results, 2)]


@dataclass(frozen=True, eq=False, repr=False)
class MultiLabelEvaluation(Evaluation):
    """The result of one model that gives an image several classes, or none: `metrics` have no top-1 error, but mAP and F1."""

    metrics: MultiLabelMetrics  # type: ignore[assignment]

    @property
    def top1_error(self) -> float:
        """Raises UsageError: there is none."""
        raise UsageError("several classes per image have no top-1 error; see metrics.mean_ap and metrics.per_class.")

    top5_error = top1_error

    @property
    def calibration(self) -> list[str]:
        return [f"thresholds: {describe_thresholds(self.trained_models[0].calibration)}"]

    def to_json(self) -> dict[str, Any]:
        figures = self._setting() | self.metrics.to_json()
        if self.metrics.skipped:
            figures["skipped"] = dict(self.metrics.skipped)
        return figures | {"calibration": dict(self.trained_models[0].calibration) or None}

    to_dict = to_json


def prepare_split(split: Split, preprocessing: Preprocessing) -> Split:
    """A split in memory with its images resized and cropped for the network; a split on disk as it is."""
    shape = (*preprocessing.size, preprocessing.channels)
    if not isinstance(split, MemorySplit) or tuple(split.images.shape[1:]) == shape:
        return split
    pixels = [pixels for pixels, _ in PreprocessedSplit(split, preprocessing).batches(256)]
    return replace(split, images=torch.cat(pixels)) if pixels else split


@public
@standard_torch_state()
def evaluate(
    model: Model | Sequence[Model],
    data: Any,
    *,
    protocol: str = "1crop",
    weights: Sequence[float] | None = None,
    split: str = "test",
    fit_on: str | int | None = None,
    classes: str = "all",
    names: Sequence[str] | None = None,
    data_dir: str | Path = "data",
    on_bad_image: str = "stop",
    quarantine: str | Path = "",
    decode_on: str = "cpu",
    precision: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluates a model, or several as an ensemble, on a data set; `.to_json()` of the result gives its figures.
    Under torchrun the processes share the images, and each returns the same.

    Args:
        model: what `resnetlab.load` returned, or a path of a model file or run folder; or several, whose scores are averaged.
        data: a data set's name ("digits", "cifar10"), a folder of class folders, a table, a pattern of tar shards, or Python
            objects, as `resnetlab.train` takes them.
        protocol: the views of each image, see resnetlab.evaluation.protocols ("10crop", "multiscale:224,256,384,480,640").
        weights: of the members, in proportion; None for equal ones.
        split: "train", or "test": the split that the data are evaluated on, whatever its name (`Evaluation.split`); of a folder
            without val/ and test/, the images that the models' own runs held out.
        fit_on: fit each model's temperature first, on this split, or on so many images of the evaluated split (1000), which
            are then not evaluated; `Evaluation.trained_models` have it.
        classes: where the data have only some of the models' classes, "all" for scores over all outputs, or "data" for scores
            over the data's classes alone.
        names: of the models; by default their paths.
        data_dir: folder of the archives.
        on_bad_image: "stop" at an image that cannot be read, or "skip" it (`Evaluation.metrics.skipped` lists it).
        quarantine: a file that lists images to leave out, as in training.
        decode_on: "device" lets a GPU decode JPEGs and resize images; scores differ a little from those of "cpu".
        progress: called with images done and images in all.

    Raises:
        DataError: the data name a class that a model lacks, the models name different ones, the split is empty or without
            labels, or the archive is missing or damaged.
        ModelFileError: a model file is missing or damaged.
        UsageError: an unknown data set, split or protocol; weights that are not one a model; a crop larger than the image; a
            temperature fitted on images that are evaluated, or that the model was trained on.
    """
    leave_if_imported_again()
    given, parsed = _collect_models(model, data), parse_protocol(protocol)
    weights = _normalise_weights(weights, len(given))
    fit_on = None if fit_on is None else str(fit_on)
    trained = [each if isinstance(each, TrainedModel) else load_trained_model(Path(each)) for each in given]
    options = tuple(parsed.to_json(model.preprocessing) for model in trained)
    names = _choose_names(given, names)
    if classes not in SCOPES:
        raise unknown_name_error("choice of classes", classes, SCOPES)
    reading = ReadOptions(on_bad_image, str(quarantine), multi_label=True, one_class=True)
    with join_process_group() as world:
        source, data = _load_source(data, Path(data_dir), reading, trained, world)
        source = source.with_decode_on(decode_on)
        _check_multi_label(trained, names, source, fit_on)
        scored, scope = _select_classes(trained, names, source.classes, classes)
        columns = [torch.tensor([each.classes.index(name) for name in scored]) for each in trained]
        split, images = pick_split(source, split, trained)
        _require_labels(images)
        if fit_on is not None:
            images, held_out, about = select_calibration_images(fit_on, source, split, images, trained)
        labels = _find_truth(source, images, scored, trained[0].multi_label)
        notes = describe_overlap(source, images, trained, names)
        device_config = replace(select_device(precision, device), world=world)
        if fit_on is not None:
            truth, about = _find_truth(source, held_out, scored, multi_label=False), {"data": data} | about
            notes += describe_few_images(len(truth))
            trained = fit_temperatures(trained, columns, held_out, truth, device_config, about)
        nets = _make_members(trained, columns, [each.temperature for each in trained], device_config)
        summary = None if trained[0].multi_label else ScoreSummary.if_many(labels, len(scored), weights)
        scores = predict_scores(nets, images, device_config, parsed, lambda n: progress(n, len(labels)), summary)
    results, skipped = drop_skipped(images, labels, scores)
    if skipped:
        images = images.subset(torch.tensor([i for i, name in enumerate(images.names) if name not in skipped]))
    if not trained[0].multi_label:
        notes += describe_wide_columns(images.columns)
    kind, metrics, members = _measure(trained[0], columns[0], scored, weights, results, summary is not None)
    return kind(
        metrics=replace(metrics, split=split, skipped=skipped),
        models=tuple(names),
        weights=weights,
        members=members,
        data=data,
        split=split,
        protocol=parsed,
        protocol_options=options,
        trained_models=tuple(trained),
        images=images,
        scope=scope,
        notes=tuple(notes),
    )


def _measure(
    model: TrainedModel,
    columns: Tensor,
    classes: tuple[str, ...],
    weights: Sequence[float],
    results: Sequence[tuple[Tensor, Tensor]],
    summarised: bool,
) -> tuple[type[Evaluation], Any, tuple[ClassificationMetrics, ...]]:
    """The kind of evaluation, its metrics, and those of each member of an ensemble; `results` are (truth, scores) of each.

    With `summarised` they are `summarise_scores` of each, and then of the ensemble, in place of scores.
    """
    if summarised:
        *alone, last = [ClassificationMetrics(classes, rows, truth) for truth, rows in results]
        return Evaluation, last, tuple(alone)
    if model.multi_label:
        ((truth, scores),) = results
        thresholds = tuple(model.thresholds[i] for i in columns.tolist())
        return MultiLabelEvaluation, MultiLabelMetrics(classes, scores, truth, thresholds), ()
    members = tuple(ClassificationMetrics.from_scores(classes, scores, truth) for truth, scores in results)
    if len(members) == 1:
        return Evaluation, members[0], ()
    mean = average_scores([scores for _, scores in results], weights)
    return Evaluation, ClassificationMetrics.from_scores(classes, mean, results[0][0]), members


def _load_source(
    data: Any, data_dir: Path, reading: ReadOptions, models: Sequence[TrainedModel], world: World
) -> tuple[Dataset, str]:
    """The data set of a name, or of Python objects, read as the models need it, and its name for figures that are shared."""
    if isinstance(data, str | Path):
        with share_loading(world) as load_once:
            source = load_once(partial(sources.load_dataset, str(data), data_dir, reading))
        name = sources.strip_signature(str(data))
    else:
        source = dataset_from_object(data, reading)
        name = sources.strip_signature(source.name)
    return source.with_pixel_format(common_pixel_format(models)), name


def fit_temperatures(
    models: Sequence[TrainedModel],
    columns: Sequence[Tensor],
    split: Split,
    labels: Tensor,
    device_config: DeviceConfig,
    about: dict[str, Any],
) -> list[TrainedModel]:
    """Copies of the models with the temperatures that fit a split best, one crop for each image."""
    members = _make_members(models, columns, [1.0] * len(models), device_config)
    results, skipped = drop_skipped(split, labels, predict_scores(members, split, device_config))
    calibrated = []
    for model, (truth, scores) in zip(models, results, strict=True):
        log_scores = take_logarithms(scores)
        temperature = fit_temperature(log_scores, truth)
        calibration = about | {"n": len(split) - len(skipped), "protocol": str(ONE_CROP)}
        if share := model.calibration.get("none_share"):
            none_below = choose_none_below((log_scores / temperature).softmax(1), share)
            calibration |= {"none_below": none_below, "none_share": share}
        calibrated.append(copy.copy(model))  # which may be a Model, with its backend
        calibrated[-1].temperature, calibrated[-1].calibration = temperature, calibration
    return calibrated


def _make_members(
    models: Sequence[TrainedModel],
    columns: Sequence[Tensor],
    temperatures: Sequence[float],
    device_config: DeviceConfig,
) -> list[Member]:
    return [
        Member.from_network(
            model.net,
            model.preprocessing,
            device_config,
            columns=order,
            temperature=temperature,
            multi_label=model.multi_label,
        )
        for model, order, temperature in zip(models, columns, temperatures, strict=True)
    ]


def _collect_models(model: Any, data: object) -> list[Model]:
    """One model or several as a list; raises UsageError for what is none, and for data before the model."""
    if isinstance(data, TrainedModel) or (isinstance(data, str | Path) and str(data).endswith(".safetensors")):
        raise UsageError("the model comes first, then the data: evaluate(model, data).")
    models = list(model) if isinstance(model, Iterable) and not isinstance(model, str | nn.Module) else [model]
    if wrong := [type(each).__name__ for each in models if not isinstance(each, Model)]:
        raise UsageError(f"a model is a model file, a run folder or what load returned, not {wrong[0]}.")
    return models


def _normalise_weights(weights: Sequence[float] | None, n: int) -> tuple[float, ...]:
    """Weights that add up to 1."""
    if n == 0:
        raise UsageError("evaluate needs at least one model.")
    weights = [1] * n if weights is None else list(weights) if isinstance(weights, Iterable) else [weights]
    if len(weights) != n or not all(0 < w < float("inf") for w in weights):
        raise UsageError(f"weights are {n} numbers above 0, one for each model, not {', '.join(map(str, weights))}.")
    return tuple(w / sum(weights) for w in weights)


def _choose_names(models: Sequence[Model], names: Sequence[str] | None) -> list[str]:
    """The names that are given, or the models' paths."""
    if names is None:
        return [f"model {i}" if isinstance(each, TrainedModel) else str(each) for i, each in enumerate(models, 1)]
    if len(names) != len(models):
        raise UsageError(f"names are {len(models)}, one for each model, not {len(names)}.")
    return list(names)


def _select_classes(
    models: Sequence[TrainedModel], names: Sequence[str], data: tuple[str, ...], scope: str
) -> tuple[tuple[str, ...], str]:
    """The classes to score, in the first model's order, and a sentence on them where the data have only some.

    Raises DataError where a model lacks one of the data's classes, or the members of an ensemble name different ones.
    """
    classes = models[0].classes
    if missing := sorted(set(data) - set(classes)):
        only = sorted(set(classes) - set(data))
        raise DataError(
            f"the data and the model name different classes: only in the data {format_list(missing)}, only in the model "
            f"{format_list(only)}; evaluate on data with the model's classes, or some of them."
        )
    scored = classes if scope == "all" else tuple(name for name in classes if name in set(data))
    for model, name in zip(models, names, strict=True):
        one, other = set(model.classes), set(classes)
        if (scope == "all" and one != other) or set(scored) - one:
            raise DataError(
                f"the members of an ensemble name different classes: only in {name} {format_list(sorted(one - other))}, only "
                f"in {names[0]} {format_list(sorted(other - one))}; take models of the same classes."
            )
    if len(set(data)) == len(classes):
        return scored, ""
    if scope == "all":
        return scored, f"all {len(classes):,} outputs, of which the data have {format_count(len(data), 'class')}"
    return scored, f"the data's {format_count(len(data), 'class')} alone, of {len(classes):,} outputs"


def _check_multi_label(
    models: Sequence[TrainedModel], names: Sequence[str], source: Dataset, fit_on: str | None
) -> None:
    """Raises UsageError for what makes no sense where a model, or the data, have several classes per image."""
    several = [name for model, name in zip(models, names, strict=True) if model.multi_label]
    if source.label_sets is not None and not several:
        raise UsageError(
            f"{source.name} gives several classes per image, but {names[0]} was trained on data with one; train on such data."
        )
    if several and len(models) > 1:
        raise UsageError(f"{several[0]} gives an image several classes, and is evaluated alone; give one such model.")
    if several and fit_on is not None:
        raise UsageError(
            f"{several[0]} gives an image several classes and has thresholds, which its training fitted on held-out images; it "
            "has no temperature to fit."
        )


def _find_truth(source: Dataset, images: Split, scored: tuple[str, ...], multi_label: bool) -> Tensor:
    """The images' classes as positions in the scored ones, int64 (N,), or whether they have each of these, bool (N, classes).

    Classes are matched by name. Raises DataError as `_require_labels`.
    """
    _require_labels(images)
    positions = torch.tensor([scored.index(name) for name in source.classes])
    if not multi_label:
        return positions[images.labels]
    # the data may have one class per image
    own = torch.eye(len(source.classes)) if source.label_sets is None else source.label_sets
    sets = torch.zeros(len(own), len(scored), dtype=torch.bool)
    sets[:, positions] = own > 0
    return sets[images.labels]


def _require_labels(split: Split) -> None:
    """Raises DataError where an image has no label, or there is no image."""
    if not len(split):
        raise DataError("there is no image to evaluate; give a split that holds some.")
    if len(split.labels) != len(split) or int(split.labels.min()) < 0:
        raise DataError(
            "the images have no labels and cannot be evaluated; `resnetlab predict` takes images without labels."
        )
