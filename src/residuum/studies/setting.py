"""What a study is asked for: data, budget, seeds, depths; and the recipe that all of its runs start from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from residuum.data import sources
from residuum.data.dataset import Dataset
from residuum.errors import DataError, UsageError, unknown
from residuum.models.spec import CIFAR_BOTTLENECK, IMAGENET, Specification, specification
from residuum.runtime import automatic_precision, pick_engine
from residuum.training.recipe import Recipe
from residuum.training.recipes import recipe

PAPER_PASSES = 64_000 * 128 / 50_000  # times that 2015 §4.2 shows every training picture of CIFAR-10
IMAGENET_PASSES = 600_000 * 256 / 1_281_167  # and 2015 §3.4 of ImageNet
BUDGETS = {  # name: what it is for, share of the paper's passes, steps at least
    "smoke": ("does it run at all", 0.0, 20),
    "quick": ("a first look", 0.02, 300),
    "paper": ("the paper's own length", 1.0, 0),
}
SEEDS = {"smoke": 1, "quick": 3, "paper": 5}  # runs of each network unless told otherwise
HELD_OUT = 2_000  # training pictures kept for curves, at most; a tenth where there are fewer
JUDGEMENTS = 16  # points of such a curve


@dataclass(frozen=True)
class Trial:
    """One run that a study needs: what the study calls it, and the complete recipe."""

    label: str
    recipe: Recipe


@dataclass(frozen=True)
class Setting:
    """A study's circumstances.

    Attributes:
        data: a data set's name, or a folder of class folders.
        seeds: how many runs of each network; they are seeds 0, 1, ….
        depths: of the networks, where a person has chosen; empty takes the study's own.
        steps: length of a run, where a person has chosen; else the budget's.
        photographs: the networks are ImageNet's, and learn as the recipe `photos` has it; else CIFAR's.
    """

    data: str
    data_dir: Path
    budget: str
    seeds: int
    depths: tuple[int, ...] = ()
    device: str = "auto"
    steps: int | None = None
    photographs: bool = False

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise unknown("budget", self.budget, BUDGETS)
        if not 1 <= self.seeds <= 1000:
            raise UsageError(f"--seeds must be from 1 to 1,000, not {self.seeds}.")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"--steps must be 1 or more, not {self.steps}.")
        for depth in self.depths:
            check_depth(depth)
        object.__setattr__(self, "depths", tuple(sorted(set(self.depths))))

    @cached_property
    def source(self) -> Dataset:
        """The data; raises DataError where there are too few to learn from and to hold some out."""
        source = sources.load(self.data, self.data_dir)
        n, classes = len(source.train), len(source.classes)
        if n < 10 * classes or not len(source.test):
            raise DataError(
                f"{self.data} has {n:,} pictures to train on and {len(source.test):,} to test on, too few to split: "
                f"a study of {classes} classes needs {10 * classes:,} to train on and some to test on; add pictures."
            )
        return source

    @cached_property
    def base(self) -> Recipe:
        """The recipe that every run of the study starts from: the data's own, at the budget's length."""
        name = "quick" if self.data == "digits" else "photos" if self.photographs else "paper-cifar"
        full = replace(recipe(name), data=self.data)
        engine = pick_engine(full.precision, self.device)
        full = replace(full, threads=1, precision=automatic_precision(engine.device))
        short = full.shrunk(self.steps or self._steps(full.batch))
        if short.steps == full.steps:
            return full
        held_out = 0 if self.source.val is not None else min(HELD_OUT, len(self.source.train) // 10)
        return replace(short, held_out=held_out, judge_every=max(1, short.steps // JUDGEMENTS))

    def _steps(self, batch: int) -> int:
        _, share, least = BUDGETS[self.budget]
        paper = self.paper_passes * len(self.source.train) / batch
        return round(min(paper, max(share * paper, least)))

    @property
    def paper_passes(self) -> float:
        """Times that the paper shows every training picture to networks of this kind: 164 on CIFAR, 120 on ImageNet."""
        return IMAGENET_PASSES if self.photographs else PAPER_PASSES

    @property
    def share(self) -> float:
        """The budget as a share of the paper's passes over the training pictures."""
        return self.base.steps * self.base.batch / len(self.source.train) / self.paper_passes

    def spec(self, given: Recipe) -> Specification:
        """The specification of a run's network."""
        channels = 1 if self.data == "digits" else 3
        return specification(
            given.net, **{"channels": channels, "classes": len(self.source.classes)} | dict(given.specification)
        )

    def trials(self, label: str, net: str, values: Mapping[str, Any] | None = None, **changes: Any) -> list[Trial]:
        """The runs of one network, one for each seed.

        Args:
            label: what the study calls the network.
            net: its name.
            values: changes to what the name stands for, such as {"shortcut": "C"}.
            **changes: other values of the recipe.
        """
        one = replace(self.base, net=net, specification=dict(values or {}), **changes)
        if one.warmup == "steps":  # a warm-up shrinks with its run
            one = replace(one, warmup_steps=max(1, round(one.warmup_steps * min(1.0, self.share))))
        return [Trial(label, replace(one, seed=seed)) for seed in range(self.seeds)]

    def chosen(self, **by_budget: Sequence[int]) -> tuple[int, ...]:
        """The depths: a person's own, or the study's for this budget."""
        return self.depths or tuple(by_budget[self.budget])


def check_depth(depth: int) -> None:
    """Raises UsageError, naming the nearest two, for what is no depth of the CIFAR nets: 6n+2."""
    taken = {*IMAGENET, *CIFAR_BOTTLENECK}  # names of other kinds of network
    if depth % 6 == 2 and depth >= 8 and depth not in taken:
        return
    known = [d for d in range(8, max(20, depth) + 20, 6) if d not in taken]
    low, high = sorted(sorted(known, key=lambda d: abs(d - depth))[:2])
    why = "is the depth of another kind of network" if depth in taken else "is not 6n+2"
    raise UsageError(f"depth {depth} {why}; the nearest are {low} and {high}.")
