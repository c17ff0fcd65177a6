"""Classification: one label per image, cross entropy, top-1 error."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.data import sources
from resnetlab.data.dataset import Dataset, MemorySplit, Split
from resnetlab.data.disk_split import DiskSplit
from resnetlab.data.fingerprints import match_fingerprints, record_fingerprints
from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.data.sampler import Batch, TrainLoader
from resnetlab.device import DeviceConfig
from resnetlab.distributed import World
from resnetlab.errors import DataError, RunError, UsageError
from resnetlab.evaluation.calibration import MIN_IMAGES, choose_none_below, fit_temperature
from resnetlab.evaluation.gradcam import make_cam_overlays
from resnetlab.evaluation.metrics import ClassificationMetrics, evaluate_errors, evaluate_network
from resnetlab.evaluation.multi_label import DEFAULT_THRESHOLD, MultiLabelMetrics, evaluate_label_sets, fit_thresholds
from resnetlab.evaluation.split_selection import limit_fitted
from resnetlab.formatting import format_count
from resnetlab.inference.start import PRETRAINED, resolve_start
from resnetlab.models.cost import count_parameters
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.own_network import OWN, Network
from resnetlab.models.reference_images import MAX_CHECK, ReferenceImages, spread_positions
from resnetlab.models.resnet import ResNet, warn_small_image
from resnetlab.models.spec import nearest_name
from resnetlab.nn.batchnorm import convert_sync_batchnorm
from resnetlab.preprocessing import Preprocessing
from resnetlab.process_place import read_process_place
from resnetlab.run_folder import RunFolder, write_atomically
from resnetlab.training import report
from resnetlab.training.average import reestimate_bn_statistics
from resnetlab.training.class_balance import describe_imbalance, parse_class_weights
from resnetlab.training.compilation import choose_compilation, count_gradient_bytes
from resnetlab.training.memory import largest_micro_batch
from resnetlab.training.micro_batches import count_micro_batches
from resnetlab.training.recipe import Recipe
from resnetlab.training.result import ClassificationResult, MultiLabelResult
from resnetlab.training.run_state import RunState
from resnetlab.training.tasks.base import Task, TaskSetup
from resnetlab.training.tasks.classification_data import (
    add_statistics,
    choose_augmentation,
    choose_sample,
    describe_view,
    divide_images,
    load_source,
    name_own_transform,
    plan_preprocessing,
    require_held_out,
    resolve_order,
    resolve_shards,
    resolve_size,
    resolve_val_images,
    size_of,
)
from resnetlab.training.tasks.multi_label import check_label_sets, multi_label_loss
from resnetlab.training.tasks.starting_network import build_network

FEW_IMAGES = 100  # of a class: fewer are better learned from other weights
NORMALISATIONS = ("per-pixel mean", "per-channel mean and std", "as start_from")


@dataclass(frozen=True, eq=False)
class ClassificationTask(Task):
    """A classifier, its training data and the images it is evaluated on.

    Attributes:
        held_out: images evaluated during training and never trained on; may be empty.
        test: evaluated once, at the end.
        evaluated_split: the name of `test`: "test", "val" or "held-out".
        label_sets: where images have several classes, or none: float32 (sets, classes) on the device, in which labels are
            positions; None where each has one.
        class_weights: of the loss, float32 (classes,) on the device; None for ones.
        start_fingerprints: of the images that the model was trained on which training started from.
    """

    name = "classify"
    command = "resnetlab train"
    recipe_type = Recipe
    result_type = ClassificationResult

    recipe: Recipe
    net: Network
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    loader: TrainLoader
    held_out: Split
    test: Split
    data: Mapping[str, str]
    device_config: DeviceConfig
    evaluated_split: str = "test"
    holdout: Mapping[str, Sequence[str]] = field(default_factory=dict)
    start_fingerprints: Mapping[str, Tensor] = field(default_factory=dict)
    start_size: Mapping[str, int] | None = None
    class_weights: Tensor | None = None
    label_sets: Tensor | None = None

    @classmethod
    def build(cls, recipe: Recipe, setup: TaskSetup) -> Self:
        """Loads the data, holds images out, computes the training images' statistics, and builds the network."""
        device_config, world = setup.device_config, setup.device_config.world
        if recipe.normalise not in NORMALISATIONS:
            raise UsageError(f"unknown normalise {recipe.normalise!r}; known: {', '.join(map(repr, NORMALISATIONS))}.")
        recipe, source = load_source(recipe, setup)
        pixel_format = source.train.pixel_format
        start_from = resolve_start(recipe.start_from, setup.started_in)
        net, begun, notes = build_network(recipe, start_from, pixel_format.channels, source.classes, setup.options.net)
        start, origin = (begun.model, {"start_from": begun.digest}) if begun else (None, {})
        recipe = resolve_size(recipe, start)
        shape = plan_preprocessing(recipe, pixel_format)
        recipe = name_own_transform(resolve_val_images(resolve_shards(recipe, source, world), source), setup)
        train, held_out, test, holdout = divide_images(recipe, source, shape)
        for split in (held_out, test) if read_process_place().is_first_here else ():
            if isinstance(split, DiskSplit):
                split.require_readable()
        recipe = setup.rescale(resolve_order(recipe, len(train)), len(train))
        preprocessing = add_statistics(recipe.normalise, choose_sample(recipe, train), shape, start)
        fingerprints, trained_on = (start.fingerprints, start.data.get("fingerprint", "")) if start else ({}, "")
        if n := int(match_fingerprints(fingerprints, trained_on, source, source.test).seen.sum()):
            notes.append(
                f"{n:,} of the {format_count(len(source.test), 'image')} to test on were seen in the training of {start_from}"
            )
        device_config.place(net)
        if isinstance(train, MemorySplit):  # a CPU crops and augments these too, where the recipe does that per image
            train = replace(train, workers=setup.num_workers)
        require_held_out(recipe, held_out, len(train))
        weights, targets, sentences = _choose_targets(recipe, source, train)
        notes += describe_view(recipe) + sentences
        loader = TrainLoader(
            train,
            preprocessing,
            choose_augmentation(recipe, targets),
            recipe.batch,
            recipe.seed,
            device_config,
            recipe.sampling,
            setup.options.transform,
            recipe.shard_groups,
            setup.options.shard_space,
            recipe.sampling_version,
        )
        if not recipe.net and isinstance(net, ResNet):
            name, changes = nearest_name(net.spec)
            recipe = replace(recipe, net=name, specification=changes)
        device_config = choose_compilation(device_config, recipe, net.spec, count_gradient_bytes(net))
        if recipe.compile == "auto" and not device_config.cuda_graph:  # a graph is chosen again at a resume
            recipe = replace(recipe, compile="on" if device_config.compiled else "off")
        if recipe.bn_sync:
            convert_sync_batchnorm(net, world)
        task = cls(
            recipe=recipe,
            net=net,
            classes=source.classes,
            preprocessing=preprocessing,
            loader=loader,
            held_out=held_out,
            test=test,
            data={"name": sources.short_name(recipe.data), "fingerprint": source.fingerprint} | origin,
            device_config=device_config,
            evaluated_split=source.evaluated_split,
            holdout=holdout,
            start_fingerprints=fingerprints,
            start_size=size_of(start) if start else None,
            class_weights=None if weights is None else weights.to(device_config.device),
            label_sets=None if source.label_sets is None else source.label_sets.to(device_config.device),
        )
        for sentence in [*notes, *task._describe()]:
            setup.options.report(sentence)
        return task

    @classmethod
    def count_micro_batches(cls, recipe: Recipe, world: World) -> int:
        return count_micro_batches(recipe, world)

    @property
    def num_train_images(self) -> int:
        return len(self.loader.split)

    def _describe(self) -> list[str]:
        """Sentences on data, network and length of the run."""
        recipe, n = self.recipe, self.num_train_images
        data = sources.strip_signature(recipe.data)
        watched = f"{len(self.held_out):,} held out{' to watch the error of' if len(self.held_out) else ''}"
        counts = f"{format_count(n, 'image')} to train on, {watched}, {len(self.test):,} to test on{self.test_origin}"
        size = f"{self.preprocessing.size[0]}x{self.preprocessing.size[1]} pixels"
        sentences = [f"{self._network} on {data}: {counts}; {size}; {count_parameters(self.net):,} parameters"]
        if not sources.is_builtin(recipe.data):
            sentences.append(self.describe_length())
        if not recipe.start_from and recipe.net in PRETRAINED and n < FEW_IMAGES * len(self.classes):
            sentences.append(
                f"fewer than {FEW_IMAGES} images a class are few to learn from alone; ImageNet's weights to begin with: "
                f"--net {recipe.net} --pretrained"
            )
        return sentences

    @property
    def _network(self) -> str:
        """The network's name, for people."""
        return self.recipe.net.removeprefix(OWN)

    def micro_batches(self, step: int) -> list[Batch]:
        """The micro-batches of this process's share of step `step`."""
        batch = self.loader.batch(step)
        if len(batch.labels) < 2 * self.num_micro_batches:  # BN needs two images
            raise DataError(f"too few of the images of step {step:,} can be read; fix them: resnetlab data check.")
        if self.num_micro_batches == 1:
            return [batch]
        return [Batch(*xs) for xs in zip(*(x.tensor_split(self.num_micro_batches) for x in batch), strict=True)]

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy in nats, weighted by `class_weights`, and the share of images whose highest score is another
        class; both scalars. A mixed image counts as the class with the largest share. For several classes: `multi_label_loss`.
        """
        logits = self._forward(batch.images).float()  # (B, classes)
        if self.label_sets is not None:
            return multi_label_loss(logits, batch.targets, self.label_sets, self.recipe.label_smoothing)
        error = (logits.detach().argmax(1) != batch.labels).float().mean()
        weights, smoothing = self.class_weights, self.recipe.label_smoothing
        if weights is None:
            return F.cross_entropy(logits, batch.targets, label_smoothing=smoothing), error
        # divided by the images, not by their weights, so that it does not depend on which images share a micro-batch
        total = F.cross_entropy(logits, batch.targets, weights, label_smoothing=smoothing, reduction="sum")
        return total / len(batch.labels), error

    @cached_property
    def _forward(self) -> Callable[[Tensor], Tensor]:
        if self.device_config.compiled and isinstance(self.net, ResNet):  # a compiled network does not warn itself
            warn_small_image(self.net, self.preprocessing.size)
        return self.device_config.forward_fn(self.net)

    def evaluate(self, split: Split, temperature: float | None = None) -> ClassificationMetrics:
        """Evaluates the network with its current weights (`evaluate_network`)."""
        return evaluate_network(self.net, split, self.preprocessing, self.classes, self.device_config, temperature)

    def _evaluate_label_sets(self, split: Split) -> MultiLabelMetrics:
        """The same where images have several classes, at thresholds of one half."""
        assert self.label_sets is not None
        truth = (self.label_sets.cpu() > 0)[split.labels]
        return evaluate_label_sets(self.net, split, truth, self.preprocessing, self.classes, self.device_config)

    def evaluate_held_out(self) -> dict[str, float] | None:
        """Top-1 error and loss on the held-out images; of several classes 1 - mAP, label error and loss."""
        if not len(self.held_out):
            return None
        if self.label_sets is not None:
            metrics = self._evaluate_label_sets(self.held_out)
            return {"map_error": 1 - metrics.mean_ap, "label_error": metrics.label_error, "loss": metrics.loss}
        return evaluate_errors(self.net, self.held_out, self.preprocessing, self.device_config)

    def fit_micro_batch(self, report: Callable[[str], None]) -> Self:
        """The task with the largest micro-batch that fits into memory; its recipe records it as `bn_batch`."""
        size = self._largest_micro_batch()
        if size is None or size == self._micro_batch_size:
            report("batch auto: the batch fits as it is")
            return self
        world = self.device_config.world
        recipe = replace(self.recipe, bn_batch=size * world.size if self.recipe.bn_sync else size)
        report(f"batch auto: micro-batches of {format_count(size, 'image')} fit")
        return replace(self, recipe=recipe)

    def out_of_memory_error(self) -> RunError:
        """The error for a step that does not fit into memory, with the micro-batch that would fit."""
        # several processes do not try
        size = self._largest_micro_batch(smaller=True) if self.device_config.world.size == 1 else None
        fits = "take --batch auto"
        if size:
            fits = f"{size:,} would fit: start again with --set bn_batch={size} (or --batch auto)"
        return RunError(
            f"{format_count(self._micro_batch_size, 'image')} at once do not fit into memory; {fits}, which keeps the "
            "batch of "
            f"{self.recipe.batch:,}; or with --set recompute=true."
        )

    @property
    def _micro_batch_size(self) -> int:
        return self.recipe.batch // self.device_config.world.size // self.num_micro_batches

    def _largest_micro_batch(self, smaller: bool = False) -> int | None:
        """The largest micro-batch, no larger (or smaller) than the current one, that fits into memory; None if none does."""
        share, limit = self.recipe.batch // self.device_config.world.size, self._micro_batch_size - smaller
        shape = (self.preprocessing.channels, *self.preprocessing.size)
        sizes = [size for size in range(limit, 1, -1) if share % size == 0]
        return largest_micro_batch(self.net, self.device_config, shape, share, sizes)

    def reference_images(self) -> ReferenceImages | None:
        """The images that the model file keeps (models.reference_images); None if none of them can be read."""
        keep = self.recipe.keep_images
        if not keep:
            return None
        train, check_split = choose_sample(self.recipe, self.loader.split), self.held_out
        blank = self.preprocessing.blank_image(*self.preprocessing.size)
        if len(check_split):
            training_positions = spread_positions(len(train), keep, blank.nbytes)
            check_positions = spread_positions(len(check_split), min(keep, MAX_CHECK), blank.nbytes)
        else:  # alternately, from one split
            check_split, both = train, spread_positions(len(train), 2 * min(keep, MAX_CHECK), blank.nbytes // 2)
            training_positions, check_positions = both[::2], both[1::2]
        check, training = self._read(check_split, check_positions), self._read(train, training_positions)
        if not check:
            return None
        labels = check_split.labels[torch.tensor([i for i, _ in check])]
        if self.label_sets is not None:
            labels = self.label_sets.cpu().argmax(1)[labels]  # the first of several, or of all where there is none
        images = torch.stack([x for _, x in training]) if training else blank[None][:0]
        return ReferenceImages(torch.stack([x for _, x in check]), labels.to(torch.int64), images)

    def _read(self, split: Split, positions: Sequence[int]) -> list[tuple[int, Tensor]]:
        """(position, pixels (h, w, C)) of the images that can be read."""
        images, readable = PreprocessedSplit(split, self.preprocessing), []
        for i in positions:
            with contextlib.suppress(DataError):
                readable.append((i, images[i].clone()))
        return readable

    @property
    def skipped(self) -> Mapping[str, str]:
        """name -> reason, of the images skipped so far because they could not be read."""
        splits = (self.loader.split, self.held_out, self.test)
        return {name: why for split in splits for name, why in split.errors.skipped.items()}

    def trained_model(self, metrics: Mapping[str, Mapping[str, Any]]) -> TrainedModel:
        """The content of the model file."""
        seen = [self.loader.split, *([self.held_out] if "evaluated while training" in self.holdout else [])]
        held_out = [self.test] if self.evaluated_split in self.holdout else []
        return TrainedModel(
            net=self.net,
            classes=self.classes,
            preprocessing=self.preprocessing,
            recipe=self._shared_recipe.to_json(),
            metrics=metrics,
            data=self.data,
            versions=self.versions,
            fingerprints=record_fingerprints(seen, held_out, self.start_fingerprints),
        )

    def finish(self, run: RunFolder, state: RunState) -> ClassificationResult | MultiLabelResult:
        """Evaluates the final weights (or their average) on the test split, once; writes model and report."""
        start, recipe, model = time.perf_counter(), self.recipe, None
        if recipe.precise_bn:
            reestimate_bn_statistics(self, recipe.precise_bn)
        if self.label_sets is not None:
            return self._finish_multi_label(run, state, start)
        fitted_on = limit_fitted(self.held_out, len(self.classes))
        val = self.evaluate(fitted_on) if len(fitted_on) else None
        enough = val is not None and val.n >= MIN_IMAGES
        temperature = fit_temperature(val.log_scores, val.labels) if val and enough else 1.0
        scaled = val and val.with_temperature(temperature)
        if scaled and fitted_on is not self.held_out:
            scaled = self.evaluate(self.held_out, temperature)
        held_out = scaled.to_json() if scaled else None
        evaluation = self.evaluate(self.test, temperature)
        measured = {self.evaluated_split: evaluation.to_json()} | ({"held_out": held_out} if held_out else {})
        fitted = self._describe_fit(val.n) if val and enough else {}
        none = None
        if recipe.none_share and val:
            below = choose_none_below(val.with_temperature(temperature).scores, recipe.none_share)
            fitted |= {"none_below": below, "none_share": recipe.none_share}
            none = evaluation.with_none_below(below)
        if self.device_config.world.is_first:
            model = self._save_model(run, measured, temperature=temperature, calibration=fitted)
        state.seconds += time.perf_counter() - start
        result = ClassificationResult(
            **self.result_values(run, state, evaluation.n),
            top1_error=evaluation.top1_error,
            top1_interval=tuple(measured[self.evaluated_split]["top1_interval"]),
            top5_error=evaluation.top5_error,
            held_out_error=held_out["top1_error"] if held_out else None,
            none_of_these=none,
            balanced_error=evaluation.balanced_error,
        )
        if model is not None:
            images = PreprocessedSplit(self.test.without_skipped(), self.preprocessing)  # in the evaluation's order
            overlays = []
            if isinstance(self.net, ResNet):
                overlays = make_cam_overlays(
                    self.net, evaluation, images, self.preprocessing, self.device_config, report.OVERLAYS
                )
            describe = self.describe_run(run)
            page = report.render_report(describe, result, evaluation, images, overlays, model.describe_images())
            write_atomically(run.report, page)
        return result

    def _finish_multi_label(self, run: RunFolder, state: RunState, start: float) -> MultiLabelResult:
        """`finish`, begun at `start`, where images have several classes: fits a threshold for each, not a temperature."""
        val = self._evaluate_label_sets(self.held_out) if len(self.held_out) else None
        thresholds, fitted, model = (DEFAULT_THRESHOLD,) * len(self.classes), {}, None
        if val is not None and val.n >= MIN_IMAGES:
            thresholds, fitted = fit_thresholds(val.scores, val.truth), self._describe_fit(val.n)
            val = replace(val, thresholds=thresholds)
        evaluation = replace(self._evaluate_label_sets(self.test), thresholds=thresholds)
        measured = {self.evaluated_split: evaluation.to_json()} | ({"held_out": val.to_json()} if val else {})
        if self.device_config.world.is_first:
            model = self._save_model(run, measured, thresholds=thresholds, calibration=fitted)
        state.seconds += time.perf_counter() - start
        result = MultiLabelResult(
            **self.result_values(run, state, evaluation.n),
            mean_ap=evaluation.mean_ap,
            f1=evaluation.macro("f1"),
            micro_f1=evaluation.micro_f1,
            label_error=evaluation.label_error,
            held_out_mean_ap=val.mean_ap if val else None,
        )
        if model is not None:
            notes = model.describe_images(), model.calibration
            write_atomically(
                run.report, report.render_multi_label_report(self.describe_run(run), result, evaluation, *notes)
            )
        return result

    def _describe_fit(self, n: int) -> dict[str, Any]:
        """What a temperature or thresholds were fitted on, for the model file."""
        return {"data": self.data["name"], "split": "held_out", "n": n, "protocol": "1crop"}

    def _save_model(self, run: RunFolder, metrics: Mapping[str, Mapping[str, Any]], **fitted: Any) -> TrainedModel:
        """Writes the model file, with what was fitted on held-out images."""
        model = replace(self.trained_model(metrics), reference_images=self.reference_images(), **fitted)
        model.save(run.model)
        return model

    def write_running_report(self, run: RunFolder) -> None:
        """Writes the report of a run that is still training: its curves so far, and its recipe."""
        write_atomically(run.report, report.render_progress(self.describe_run(run), str(run.path)))

    def describe_run(self, run: RunFolder) -> report.RunDescription:
        """What the page of the run shows, finished or not."""
        title = f"{self._network} on {sources.short_name(self.recipe.data)}"
        config, start_size = self.device_config, self.start_size
        return report.RunDescription.from_run(run, title, self._shared_recipe, config, start_size)

    @property
    def _shared_recipe(self) -> Recipe:
        """The recipe for files to give away: the address of its data has no signature (recipe.toml has the full one).

        It does not have the number of threads either, which does not change the model.
        """
        return replace(self.recipe, data=sources.strip_signature(self.recipe.data), threads=0)


def _choose_targets(recipe: Recipe, source: Dataset, train: Split) -> tuple[Tensor | None, int, list[str]]:
    """The classes' weights in the loss, the number of different labels, and sentences on these."""
    if source.label_sets is not None:
        return None, len(source.label_sets), check_label_sets(recipe, source, train)
    weights = parse_class_weights(recipe.class_weights, source.classes, train.labels)
    is_balanced = weights is not None or recipe.sampling == "balanced"
    return weights, len(source.classes), [] if is_balanced else describe_imbalance(source.classes, train.labels)
