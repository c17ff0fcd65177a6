"""Code shared by detection and segmentation: the task's base class, and the network that training starts from."""

from __future__ import annotations

import hashlib
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from operator import methodcaller
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from resnetlab.data import sources
from resnetlab.data.annotated_dataset import AnnotatedDataset, hold_out_images
from resnetlab.data.annotated_sampler import FLIPS, AnnotatedLoader, AugmentationDraw, divide_batch
from resnetlab.data.annotations import AnnotatedItem
from resnetlab.data.dataset import A_TENTH, count_held_out
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.device import DeviceConfig
from resnetlab.distributed import World
from resnetlab.errors import DataError, UsageError, unknown_name_error
from resnetlab.inference.start import choose_specification, load_start, resolve_start
from resnetlab.models.annotated_model import HEAD_SPECS, AnnotatedModel, build_annotated_net
from resnetlab.models.cost import count_parameters
from resnetlab.models.head_spec import HeadSpec
from resnetlab.models.resnet import ResNet, build_from_spec
from resnetlab.models.spec import Specification, get_specification, nearest_name
from resnetlab.random import seed_for
from resnetlab.run_folder import RunFolder, write_atomically
from resnetlab.training.annotated_recipes import AnnotatedRecipe
from resnetlab.training.report import EvaluationSummary, RunDescription, render_annotated_report
from resnetlab.training.result import TrainResult
from resnetlab.training.run_state import RunState
from resnetlab.training.tasks.base import Task, TaskSetup

STATISTICS_IMAGES = 256  # about so many images give the channel statistics

P = TypeVar("P", bound=AnnotatedItem)
S = TypeVar("S")


@dataclass(frozen=True, eq=False, kw_only=True)
class AnnotatedTask(Task, Generic[P, S]):
    """Base class of both tasks; each adds its data, head, loss, evaluation and report.

    Attributes:
        held_out: images evaluated while training and never trained on; may be empty.
        test: the images of `evaluated_split`, evaluated once, at the end.
        errors: handles images and annotations that cannot be used; lists those that were skipped.
    """

    metrics: ClassVar[tuple[str, ...]]  # that the result has beside those of every task
    held_out_metrics: ClassVar[tuple[str, ...]]  # that are evaluated while training, the most important first

    recipe: AnnotatedRecipe
    net: nn.Module
    spec: Specification
    head_spec: HeadSpec
    classes: tuple[str, ...]
    loader: AnnotatedLoader[P, S]
    train: Sequence[P]
    held_out: Sequence[P]
    test: Sequence[P]
    evaluated_split: str
    data: Mapping[str, str]
    device_config: DeviceConfig
    errors: ErrorPolicy
    holdout: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @classmethod
    def build(cls, recipe: Any, setup: TaskSetup) -> Self:
        """Holds images out, computes statistics, and builds the network with its head."""
        data = cls.load_data(recipe, setup.started_in / recipe.data)
        if recipe.flips not in FLIPS:
            raise unknown_name_error("flips", recipe.flips, FLIPS)
        if recipe.val_images == A_TENTH:
            count = 0 if data.val else count_held_out(A_TENTH, len(data.train), len(data.classes))
            recipe = replace(recipe, val_images=count)
        train, held_out, holdout = divide_images(data, recipe.val_images)
        recipe = setup.rescale(recipe, len(train))
        # what cannot be evaluated is found now, not after the last step
        held_out = tuple(image for image, _ in data.errors.read_each(held_out, methodcaller("read_pixels")))
        test = tuple(image for image, _ in data.errors.read_each(data.test, methodcaller("read_pixels")))
        some = train[:: max(1, len(train) // STATISTICS_IMAGES)]  # evenly spaced
        images = (pixels for _, pixels in data.errors.read_each(some, methodcaller("read_pixels")))
        start = build_starting_network(recipe, resolve_start(recipe.start_from, setup.started_in), images)
        if not recipe.net:
            name, changes = nearest_name(start.net.spec)
            recipe = replace(recipe, net=name, specification=changes)
        for sentence in start.notes:
            setup.options.report(sentence)
        head_spec = cls.choose_head(recipe, start, train)
        net = build_annotated_net(start.net, head_spec, len(data.classes), seed=recipe.seed, **cls.head_options(recipe))
        device_config = setup.device_config
        loader = AnnotatedLoader(
            train,
            cls.sample_maker(recipe),
            recipe.batch,
            recipe.seed,
            recipe.flips,
            world=device_config.world,
            micro_batch=recipe.bn_batch,
            errors=data.errors,
            workers=setup.num_workers,
            device=device_config.device,
            version=recipe.sampling_version,
        )
        task = cls(
            recipe=recipe,
            net=device_config.place(net),
            spec=start.net.spec,
            head_spec=head_spec,
            classes=data.classes,
            loader=loader,
            train=train,
            held_out=held_out,
            test=test,
            evaluated_split=data.evaluated_split,
            data={"name": sources.short_name(recipe.data), "fingerprint": data.fingerprint + start.digest},
            device_config=device_config,
            errors=data.errors,
            holdout=holdout,
        )
        setup.options.report(f"{recipe.data}: {data.layout}")
        setup.options.report(
            f"{task.title} on {recipe.data}: {task.describe_data()} to train on, {len(held_out):,} held out, "
            f"{len(task.test):,} to test on{task.test_origin}; {count_parameters(task.net):,} parameters"
        )
        setup.options.report(task.describe_length())
        return task

    @property
    def num_train_images(self) -> int:
        return len(self.train)

    @classmethod
    def count_micro_batches(cls, recipe: Any, world: World) -> int:
        share, size = divide_batch(recipe.batch, recipe.bn_batch, world.size)
        return share // size

    @classmethod
    @abstractmethod
    def load_data(cls, recipe: Any, path: Path) -> AnnotatedDataset[P]:
        """Loads images with annotations."""

    @classmethod
    def choose_head(cls, recipe: Any, start: StartingNetwork, train: Sequence[P]) -> HeadSpec:
        """The specification of the head, which has the recipe's values."""
        kind = HEAD_SPECS[cls.name]
        values = {f.name: getattr(recipe, f.name) for f in fields(kind) if hasattr(recipe, f.name)}
        return kind(mean=start.mean, std=start.std, **values)

    @classmethod
    def head_options(cls, recipe: Any) -> dict[str, Any]:
        """Further arguments of `build_annotated_net`."""
        return {}

    @classmethod
    @abstractmethod
    def sample_maker(cls, recipe: Any) -> Callable[[P, AugmentationDraw], S]:
        """The function that makes a training sample of an image; picklable."""

    @property
    @abstractmethod
    def title(self) -> str:
        """Network and head, for the report."""

    @abstractmethod
    def describe_data(self) -> str:
        """The number of training images and classes."""

    @abstractmethod
    def evaluate(self, images: Sequence[P]) -> Any:
        """Evaluates the network with its current weights."""

    def evaluate_held_out(self) -> dict[str, float] | None:
        """The figures `held_out_metrics` on the held-out images."""
        if not self.held_out:
            return None
        metrics = self.evaluate(self.held_out)
        return {key: getattr(metrics, key) for key in self.held_out_metrics}

    @abstractmethod
    def summarise_evaluation(self, result: Any, metrics: Any) -> EvaluationSummary:
        """What the report shows of the evaluation."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """name -> reason, of the images and annotations skipped so far."""
        return self.errors.skipped

    def micro_batches(self, step: int) -> list[list[S]]:
        """This process's micro-batches of step `step`."""
        return self.loader.micro_batches(step)

    def finish(self, run: RunFolder, state: RunState) -> TrainResult:
        """Evaluates the final weights on the test split, once; writes model and report."""
        start = time.perf_counter()
        recipe, is_first = self.recipe, self.device_config.world.is_first
        held_out = self.evaluate(self.held_out).to_json() if self.held_out else None
        metrics = self.evaluate(self.test)
        values = metrics.to_json()
        measured = {self.evaluated_split: values} | ({"held_out": held_out} if held_out else {})
        if is_first:
            model = AnnotatedModel(
                task=self.name,
                net=self.net,
                spec=self.spec,
                head_spec=self.head_spec,
                classes=self.classes,
                recipe=replace(recipe, threads=0).to_json(),  # the number of threads does not change the model
                metrics=measured,
                data=self.data,
                versions=self.versions,
            )
            model.save(run.model)
        state.seconds += time.perf_counter() - start
        result = self.result_type(
            **self.result_values(run, state, values["n"]), **{key: values[key] for key in self.metrics}
        )
        if is_first:
            title = f"{self.title} on {sources.short_name(recipe.data)}"
            description = RunDescription.from_run(run, title, recipe, self.device_config)
            summary = self.summarise_evaluation(result, metrics)
            write_atomically(run.report, render_annotated_report(description, self.name, result, summary))
        return result


class StartingNetwork(NamedTuple):
    """The network, mean and std of channels in units of [0, 1], a digest of the weights ("" if they are random), and notes."""

    net: ResNet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str
    notes: list[str]


def build_starting_network(recipe: AnnotatedRecipe, start_from: str, images: Iterator[Tensor]) -> StartingNetwork:
    """A classifier with its own channel statistics, from a model file; or a new network with the statistics of images.

    Args:
        start_from: a classifier's model file, a published name or a weight file; "" starts from random weights.
        images: training images, uint8 (H, W, 3); read only without a model file.

    Raises:
        UsageError: the file holds another network, or BN is fixed and there is no file.
        ModelFileError: the file cannot be read.
    """
    if not start_from:
        spec = get_specification(recipe.net, **{"channels": 3, "classes": 1} | dict(recipe.specification))
        if recipe.bn == "fixed":
            raise UsageError(
                "bn=fixed keeps the statistics of a classifier, but there is none: give --start-from MODEL, or --set bn=live."
            )
        mean, std = channel_statistics(images)
        net = build_from_spec(spec, init=recipe.init, seed=seed_for(recipe.seed, "init"))
        return StartingNetwork(net, mean, std, "", [])
    model, _, notes = load_start(start_from, recipe.specification)
    preprocessing = model.preprocessing
    if model.spec.channels != 3 or preprocessing.dtype:
        taken = preprocessing.pixel_format
        raise UsageError(f"{start_from} takes images of {taken}, not of 3 channels of 8 bits; start from another.")
    notes = [*notes, *choose_specification(start_from, model.spec, recipe.net, dict(recipe.specification))]
    means = preprocessing.mean if preprocessing.mean.ndim == 1 else preprocessing.mean.mean((0, 1))
    digest = hashlib.sha256()
    for tensor in model.resnet.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    mean, std = tuple(means.tolist()), tuple(preprocessing.std.tolist())
    return StartingNetwork(model.resnet.train(), mean, std, digest.hexdigest()[:16], notes)


def divide_images(
    data: AnnotatedDataset[P], val_images: int
) -> tuple[tuple[P, ...], tuple[P, ...], dict[str, list[str]]]:
    """(training images, images evaluated while training, names of the images in each split that was held out here).

    Raises DataError if there is no training image, UsageError if images are to be held out although there is a val split.
    """
    if not data.train:
        raise DataError(f"{data.name} has no train split; there is nothing to train on.")
    holdout = {"held-out": [p.name for p in data.test]} if data.evaluated_split == "held-out" else {}
    if not val_images:
        return data.train, data.val, holdout
    if data.val:
        raise UsageError(
            f"{data.name} has a val split, which is evaluated while training; leave out val_images={val_images}."
        )
    train, held_out = hold_out_images(data.train, val_images)
    return train, held_out, holdout | {"evaluated while training": [p.name for p in held_out]}


def channel_statistics(images: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over images of any sizes, uint8 (H, W, 3), in units of [0, 1]."""
    total, squares, n = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0
    for pixels in images:
        flat = pixels.reshape(-1, 3).to(torch.int64)
        total, squares, n = total + flat.sum(0), squares + flat.square().sum(0), n + len(flat)
    if not n:
        raise DataError("no training image can be read.")
    mean = total.double() / n / 255
    std = (squares.double() / n / 255**2 - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(round(v, 6) for v in mean.tolist()), tuple(max(round(v, 6), 1e-6) for v in std.tolist())
