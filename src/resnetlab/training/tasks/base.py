"""The base class of tasks: what the training loop needs from classification, detection and segmentation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from resnetlab.data.annotated_sampler import AnnotatedLoader
from resnetlab.data.prefetch import default_workers
from resnetlab.data.sampler import TrainLoader
from resnetlab.device import DeviceConfig
from resnetlab.distributed import World
from resnetlab.errors import RunError
from resnetlab.formatting import format_count
from resnetlab.models.cost import count_parameters
from resnetlab.run_folder import RunFolder
from resnetlab.training import recipes
from resnetlab.training.recipe import BaseRecipe
from resnetlab.training.result import TrainResult
from resnetlab.training.run_options import RunOptions
from resnetlab.training.run_state import RunState

R = TypeVar("R", bound=BaseRecipe)


@dataclass(frozen=True)
class TaskSetup:
    """What a task is built with besides its recipe.

    Attributes:
        started_in: the folder that paths in the recipe are relative to.
        resuming: whether the recipe is a run's, complete and resolved.
        load_once: calls a function that loads data in one process of each machine, and gives its result to all.
    """

    device_config: DeviceConfig
    options: RunOptions
    started_in: Path = field(default_factory=Path)
    resuming: bool = False
    load_once: Callable[[Callable[[], Any]], Any] = lambda load: load()

    @property
    def num_workers(self) -> int:
        """Processes that decode images."""
        workers = self.options.workers
        return default_workers(self.device_config) if workers is None else workers

    def rescale(self, recipe: R, images: int) -> R:
        """The recipe at the length that is given in epochs of `images` images, if one is."""
        epochs = self.options.epochs
        return recipe if epochs is None else epochs.apply(recipe, images)


class Task(ABC):
    """A network with its data, loss and evaluation, from `build` to `finish`; the loop itself handles no images or labels.

    `train_step` calls `loss` on each of `micro_batches(step)`; from time to time the loop calls `evaluate_held_out`.

    Attributes:
        recipe: with all "auto" values resolved.
        net: the network to train; a checkpoint keeps its parameters and buffers.
        data: name and fingerprint of the training data.
        holdout: split -> names of its images, for the splits that were drawn here rather than given by the data.
    """

    name: ClassVar[str]  # as in recipe.toml
    command: ClassVar[str]  # that trains it
    recipe_type: ClassVar[type[BaseRecipe]]
    result_type: ClassVar[type[TrainResult]]
    skipped_one: ClassVar[str] = "image could not be read"  # why an image is skipped, and several are
    skipped_many: ClassVar[str] = "images could not be read"
    # what adds in no fixed order on a GPU in a training step, as torch documents: a resumed run may differ in its last bits
    nondeterministic_on_gpu: ClassVar[str] = ""

    recipe: BaseRecipe
    net: nn.Module
    loader: TrainLoader | AnnotatedLoader[Any, Any]
    device_config: DeviceConfig
    data: Mapping[str, str]
    holdout: Mapping[str, Sequence[str]]
    held_out: Sized  # images that are evaluated while training; may be empty
    test: Sized  # images that are evaluated once, at the end
    evaluated_split: str  # that the images to test on are; "held-out" if they were drawn from all
    start_size: Mapping[str, int] | None = None  # of a classifier that training started from: image_size, eval_resize

    @property
    def test_origin(self) -> str:
        """Where the images to test on come from, in brackets, if not from a test split of the data."""
        origins = {"test": "", "held-out": " (drawn by name)"}
        return origins.get(self.evaluated_split, f" ({self.evaluated_split})")

    @property
    @abstractmethod
    def num_train_images(self) -> int:
        """The number of images to train on."""

    def describe_length(self) -> str:
        """A sentence on how many epochs the run's steps are."""
        steps, images = format_count(self.recipe.steps, "step"), format_count(self.recipe.batch, "image")
        epochs = self.recipe.steps * self.recipe.batch / self.num_train_images
        return f"{steps} of {images} {'is' if self.recipe.steps == 1 else 'are'} {epochs:,.1f} epochs (--epochs changes that)"

    @classmethod
    @abstractmethod
    def build(cls, recipe: Any, setup: TaskSetup) -> Self:
        """Loads the data and builds the network.

        Raises:
            DataError, UsageError: the data, the network's name or a value cannot be used.
        """

    @classmethod
    @abstractmethod
    def count_micro_batches(cls, recipe: Any, world: World) -> int:
        """The number of micro-batches in each process's share. Raises UsageError if they cannot share the batch."""

    @property
    def num_micro_batches(self) -> int:
        """The number of micro-batches in this process's share of a step."""
        return self.count_micro_batches(self.recipe, self.device_config.world)

    @property
    def reason_against_exact(self) -> str:
        """Why a run on this device does not repeat bit-identically; empty if it does."""
        if self.device_config.device.type == "cpu":
            return ""
        if not self.recipe.exact:
            return "exact=false takes the GPU's fastest kernels, some of which add in no fixed order"
        if self.device_config.device.type == "mps":
            return "whether kernels on MPS add in a fixed order was not checked"
        what = self.nondeterministic_on_gpu
        return f"on a GPU {what} add in no fixed order" if what else ""

    @property
    def busy_threads(self) -> float:
        """How many threads of a CPU a step keeps busy: three micro-batches on two threads keep 1.5 busy."""
        rounds = -(-self.num_micro_batches // self.device_config.side_by_side)
        return self.device_config.op_threads * self.num_micro_batches / rounds

    @property
    @abstractmethod
    def skipped(self) -> Mapping[str, str]:
        """name -> reason, of what was skipped so far."""

    @property
    def seconds_reading(self) -> float:
        """Seconds that this process has spent reading images, or waiting for its workers to."""
        return self.loader.seconds_reading

    @abstractmethod
    def micro_batches(self, step: int) -> Sequence[Any]:
        """The input of a step, a function of seed and step alone, as micro-batches that go through the network in turn."""

    @abstractmethod
    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The loss, and an error in [0, 1] to report; both scalars."""

    @abstractmethod
    def evaluate_held_out(self) -> dict[str, float] | None:
        """Figures on the held-out images, the most important first; None if nothing is held out."""

    @abstractmethod
    def finish(self, run: RunFolder, state: RunState) -> TrainResult:
        """Evaluates the final weights on the test split, once; writes model and report."""

    def write_running_report(self, run: RunFolder) -> None:
        """Writes the report of a run that is still training, if the task has one."""
        return

    def fit_micro_batch(self, report: Callable[[str], None]) -> Self:
        """The task with the largest micro-batch that fits into memory, if the task can find it."""
        return self

    def out_of_memory_error(self) -> RunError:
        """The error for a step that does not fit into memory."""
        return RunError("this batch does not fit into memory; take a smaller one: --set batch=…")

    @classmethod
    def how_to_resume(cls, run: RunFolder) -> str:
        """The command that goes on with a run, for messages."""
        return f"resume with: {cls.command} --resume {run.path}"

    @property
    def versions(self) -> dict[str, str]:
        """What the model file records of the programs that trained it."""
        from resnetlab import __version__

        return {"resnetlab": __version__, "torch": torch.__version__}

    def close(self) -> None:
        """Stops the processes that read data."""
        self.loader.close()

    def result_values(self, run: RunFolder, state: RunState, n: int) -> dict[str, Any]:
        """The values that the results of all tasks have, once `n` images of the test split are evaluated."""
        return {
            "run": str(run.path),
            "model": str(run.model),
            "report": str(run.report),
            "split": self.evaluated_split,
            "n": n,
            "steps": state.step,
            "seconds": round(state.seconds, 3),
            "images_per_second": round(self.recipe.batch * state.step / state.step_seconds, 1),
            "parameters": count_parameters(self.net),
            "budget": recipes.describe_run_budget(run, self.recipe),
        }
