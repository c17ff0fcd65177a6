"""The setting of a study: data, budget, seeds, depths; and the recipe that all of its runs start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from resnetlab.data import imagenet, sources
from resnetlab.data.dataset import Dataset
from resnetlab.device import default_precision, select_device
from resnetlab.errors import DataError, UsageError, unknown_name_error
from resnetlab.formatting import format_count, format_share
from resnetlab.models.spec import CIFAR_BOTTLENECK, IMAGENET_DEPTHS, Specification, get_specification, nearest_depths
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import find_classification_recipe

PAPER_EPOCHS = 64_000 * 128 / 50_000  # of 2015 §4.2 on CIFAR-10
IMAGENET_IMAGES = 1_281_167  # of its training split
SMOKE: dict[str, Any] = {  # values of a trial run on photographs
    "image_size": 66, "eval_resize": 75, "scale": (75, 141), "batch": 8, "bn_batch": 4, "precise_bn": 2, "lr": 0.01,
}  # fmt: skip
IMAGENET_RECIPES = ("paper-imagenet", "preact-imagenet")
WARMUP = 400 / 64_000  # of a run's steps (2016, appendix)
BUDGETS = {  # name: purpose, share of the paper's epochs, steps at least
    "smoke": ("does it run at all", 0.0, 20),
    "quick": ("a first look", 0.02, 300),
    "paper": ("the paper's own length", 1.0, 0),
}
SEEDS = {"smoke": 1, "quick": 3, "paper": 5}  # default number of runs of each network
HELD_OUT = 2_000  # training images held out for curves, at most; a tenth where there are fewer
EVALUATIONS = 16  # points of such a curve


@dataclass(frozen=True)
class Trial:
    """One run that a study needs: the study's label for its network, and the complete recipe."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Setting:
    """On what, how long and how often a study trains.

    Attributes:
        data: a data set's name, or a folder of class folders.
        seeds: number of runs of each network; their seeds are 0, 1, ….
        depths: of the networks, where the user gives them; empty takes the study's own.
        steps, epochs: length of a run, where the user gives it; else the budget's.
        precision: of every run; auto takes bf16 where the device computes it.
        any_version: finished runs count whatever version of the code made them.
        recipe: of runs on photographs, whose networks are ImageNet's; empty: CIFAR's networks, by the recipe for the data.
    """

    data: str
    data_dir: Path
    budget: str
    seeds: int
    depths: tuple[int, ...] = ()
    device: str = "auto"
    steps: int | None = None
    recipe: str = ""
    epochs: float | None = None
    precision: str = "auto"
    any_version: bool = False

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise unknown_name_error("budget", self.budget, BUDGETS)
        if not 1 <= self.seeds <= 1000:
            raise UsageError(f"--seeds must be from 1 to 1,000, not {self.seeds}.")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps must be 1 or more, not {self.steps}.")
        if self.epochs is not None and (self.steps is not None or not 0 < self.epochs <= 1e6):
            raise UsageError("--epochs must be above 0 and at most 1,000,000, and is given without --steps.")
        if self.device == "auto" and not torch.cuda.is_available():  # a CPU's cores train one run each, not MPS
            object.__setattr__(self, "device", "cpu")
        for depth in self.depths:
            check_depth(depth)
        object.__setattr__(self, "depths", tuple(sorted(set(self.depths))))

    @cached_property
    def source(self) -> Dataset:
        """The data; raises DataError where there are too few images to train on and to hold some out."""
        source = sources.load_dataset(self.data, self.data_dir)
        n, classes = len(source.train), len(source.classes)
        if n < 10 * classes or not len(source.test):
            raise DataError(
                f"{self.data} has {n:,} images to train on and {len(source.test):,} to test on, too few to split: "
                f"a study of {classes} classes needs {10 * classes:,} to train on and some to test on; add images."
            )
        return source

    @cached_property
    def base(self) -> Recipe:
        """The recipe that every run of the study starts from: the one for the data, at the budget's length."""
        name = self.recipe or ("quick" if self.data == "digits" else "paper-cifar")
        full = replace(find_classification_recipe(name), data=self.data)
        if self.budget == "smoke" and self.recipe:
            full = replace(full, **SMOKE)
        device_config = select_device(self.precision, self.device)
        precision = default_precision(device_config.device) if self.precision == "auto" else self.precision
        full = replace(full, threads=1, val_images=max(0, full.val_images), precision=precision)
        short = full.rescale(self.steps or self._steps(full.batch))
        if short.steps == full.steps:
            return full
        held_out = 0 if self.source.val is not None else min(HELD_OUT, len(self.source.train) // 10)
        return replace(short, val_images=held_out, eval_every=max(1, short.steps // EVALUATIONS))

    @cached_property
    def measuring_precision(self) -> str:
        """The precision that trained networks are evaluated in: the runs' own, or fp32 where this machine would imitate it."""
        own = self.base.precision
        return own if own == default_precision(select_device("auto", self.device).device) else "fp32"

    @property
    def measuring_remarks(self) -> list[str]:
        """A sentence if networks are evaluated in another precision than that of their training."""
        if self.measuring_precision == self.base.precision:
            return []
        here = f"evaluated here in {self.measuring_precision}"
        return [f"Trained in {self.base.precision}, which this machine does not compute; {here}."]

    def _steps(self, batch: int) -> int:
        if self.epochs is not None:
            return max(1, round(self.epochs * len(self.source.train) / batch))
        _, share, least = BUDGETS[self.budget]
        paper = self.paper_epochs * len(self.source.train) / batch
        return round(min(paper, max(share * paper, least)))

    @property
    def paper_epochs(self) -> float:
        """The paper's epochs for networks of this kind: 164 on CIFAR; on ImageNet 120 in 2015, 90 in 2016."""
        if not self.recipe:
            return PAPER_EPOCHS
        paper = find_classification_recipe(self.recipe if self.recipe in IMAGENET_RECIPES else IMAGENET_RECIPES[0])
        return paper.steps * paper.batch / IMAGENET_IMAGES

    @property
    def share(self) -> float:
        """The length of a run as a share of the paper's epochs."""
        return self.base.steps * self.base.batch / len(self.source.train) / self.paper_epochs

    @property
    def condition(self) -> str:
        """What every sentence about shortened runs says: " after 300 steps (8.2 % of the paper's epochs)"; else empty."""
        if abs(self.share - 1) < 0.001:
            return ""
        return f" after {format_count(self.base.steps, 'step')} ({format_share(self.share)} of the paper's epochs)"

    @property
    def data_name(self) -> str:
        """The data as the papers name them: "cifar10", "digits", …, "imagenet" for its whole training split; else a path."""
        whole = len(self.source.train) == IMAGENET_IMAGES
        if whole and set(self.source.classes) == set(imagenet.imagenet_class_names().values()):
            return "imagenet"
        return self.data

    def spec(self, recipe: Recipe) -> Specification:
        """The specification of a run's network."""
        channels = 1 if self.data == "digits" else 3
        return get_specification(
            recipe.net, **{"channels": channels, "classes": len(self.source.classes)} | dict(recipe.specification)
        )

    def trials(self, label: str, net: str, values: Mapping[str, Any] | None = None, **changes: Any) -> list[Trial]:
        """The runs of one network, one for each seed.

        Args:
            label: the study's label for the network.
            net: its name.
            values: changes to the specification of that name, such as {"shortcut": "C"}.
            **changes: other values of the recipe.
        """
        one = replace(self.base, net=net, specification=dict(values or {}), **changes)
        if one.warmup == "steps" and not self.recipe:  # 2016's 400 of 64,000 steps
            one = replace(one, warmup_steps=max(1, round(WARMUP * one.steps)))
        return [Trial(label, replace(one, seed=seed)) for seed in range(self.seeds)]

    def pick_depths(self, **by_budget: Sequence[int]) -> tuple[int, ...]:
        """The depths that the user gave, or the study's for this budget."""
        return self.depths or tuple(by_budget[self.budget])

    def pick_basic_depth(self, **by_budget: int) -> int:
        """The deepest of them; raises UsageError for a net of bottlenecks."""
        depth = self.depths[-1] if self.depths else by_budget[self.budget]
        if depth in CIFAR_BOTTLENECK:
            raise UsageError(
                f"depth {depth} is a net of bottlenecks; this study changes basic ones: give 6n+2, such as 56."
            )
        return depth


def check_depth(depth: int) -> None:
    """Raises UsageError, naming the nearest two, for a depth that the CIFAR nets do not have: 6n+2, or 164 and 1001."""
    taken = {*IMAGENET_DEPTHS}  # names of other kinds of network
    if depth in CIFAR_BOTTLENECK or (depth % 6 == 2 and depth >= 8 and depth not in taken):
        return
    why = "is the depth of another kind of network" if depth in taken else "is not 6n+2"
    raise UsageError(f"depth {depth} {why}; the nearest are {nearest_depths(depth)}.")
