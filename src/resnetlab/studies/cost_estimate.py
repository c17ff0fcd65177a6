"""The cost of a plan on this machine, from a few timed steps of small networks of each kind in it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from resnetlab.device import preserve_process_state, select_device
from resnetlab.models.cost import compute_cost
from resnetlab.models.resnet import build_from_spec
from resnetlab.models.spec import Specification, get_specification
from resnetlab.studies.runs import StudyRun
from resnetlab.studies.setting import Setting
from resnetlab.training.recipe import Recipe
from resnetlab.training.timing import time_steps

START_UP = 4.0  # seconds until a run's first step
FORWARD = 1 / 3  # cost of evaluating an image, as a share of a training step
PIXELS = 2**19  # of the images that are timed together, at most
BLOCKS = (1, 3)  # in each stage of the two networks that are timed


@dataclass
class CostEstimate:
    """Seconds per step of any network: two small ones of its kind are timed, and time is linear in multiply-adds."""

    setting: Setting
    every_kind: bool = True  # time each kind of network in the plan, or only one, for a rough figure
    reading: float = 0.0  # seconds, with one thread, of what studies measure when their runs are finished
    _kinds: dict[Specification, list[tuple[int, float]]] = field(default_factory=dict)

    def step(self, recipe: Recipe) -> float:
        """Seconds of one training step in a process with one thread."""
        spec = self.setting.spec(recipe)
        size = (recipe.image_size, recipe.image_size)
        timed = spec if self.every_kind else replace(get_specification("resnet20"), channels=spec.channels)
        kind = replace(timed, depths=(1,) * len(timed.depths))
        if kind not in self._kinds:
            small_nets = [replace(timed, depths=(n,) * len(timed.depths)) for n in BLOCKS]
            with preserve_process_state():
                self._kinds[kind] = [
                    (recipe.batch * _multiply_adds(net, size), _time_step(net, recipe, self.setting.device))
                    for net in small_nets
                ]
        (few, short), (many, long) = self._kinds[kind]
        work = recipe.batch * _multiply_adds(spec, size)
        slope = (long - short) / (many - few)
        if slope <= 0:  # another program slowed the smaller network down
            return (short + long) / (few + many) * work
        return max(short + slope * (work - few), 0.1 * short)

    def evaluation(self, recipe: Recipe, images: float) -> float:
        """Seconds in which a run's network computes the scores of so many images of its size."""
        return FORWARD * self.step(recipe) / recipe.batch * images

    def run(self, recipe: Recipe, done: int = 0) -> float:
        """Seconds of a run, of which so many steps are done: its other steps, their evaluations, the test, its start."""
        evaluations = recipe.steps // recipe.eval_every - done // recipe.eval_every
        images = evaluations * recipe.val_images + len(self.setting.source.test)
        return START_UP + self.step(recipe) * (recipe.steps - done) + self.evaluation(recipe, images)

    def remaining(self, runs: Sequence[StudyRun], processes: int) -> float:
        """Seconds until all of these runs are finished, by so many processes at once, and read."""
        seconds = [self.run(r.recipe, r.steps_done) for r in runs if not r.finished]
        return max([sum(seconds) / processes, *seconds]) + self.reading / processes


@cache
def _multiply_adds(spec: Specification, size: tuple[int, int]) -> int:
    return compute_cost(spec, size).multiply_adds


def _time_step(spec: Specification, recipe: Recipe, device: str) -> float:
    """Seconds of one step (forward, backward) on noise: the median of three after one to warm up.

    As many images are timed as a micro-batch has, or fewer large ones.
    """
    n = max(1, min(recipe.bn_batch or recipe.batch, recipe.batch, PIXELS // recipe.image_size**2))
    device_config = select_device(recipe.precision, device, 1)
    net: Any = device_config.place(build_from_spec(spec, seed=0)).train()
    images = torch.randn(n, spec.channels, recipe.image_size, recipe.image_size, device=device_config.device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(n, dtype=torch.long, device=device_config.device)
    return statistics.median(time_steps(net, images, labels, device_config, 3)) * recipe.batch / n
