"""What a plan will cost on this machine, from a few steps of small networks of each kind in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from residuum.models.accounting import cost
from residuum.models.resnet import assemble
from residuum.models.spec import Specification, specification
from residuum.runtime import own_process_state, pick_engine
from residuum.studies.runs import Place
from residuum.studies.setting import Setting
from residuum.training.recipe import Recipe

START = 4.0  # seconds until a run's first step
FORWARD = 1 / 3  # of a training step: what judging a picture costs
TWINS = (1, 3)  # blocks in each stage of the two networks that are timed


@dataclass
class Pace:
    """Seconds per step of any network: of its kind, two small ones are timed, and time is linear in multiply-adds."""

    setting: Setting
    every_kind: bool = True  # time each kind of network in the plan; or one, for a rough figure
    _kinds: dict[Specification, list[tuple[int, float]]] = field(default_factory=dict)

    def step(self, recipe: Recipe) -> float:
        """Seconds of one training step in a process with one thread."""
        spec = self.setting.spec(recipe)
        size = (recipe.size, recipe.size)
        timed = spec if self.every_kind else replace(specification("resnet20"), channels=spec.channels)
        kind = replace(timed, depths=(1,) * len(timed.depths))
        if kind not in self._kinds:
            twins = [replace(timed, depths=(n,) * len(timed.depths)) for n in TWINS]
            with own_process_state():
                self._kinds[kind] = [
                    (recipe.batch * _multiply_adds(twin, size), _timed(twin, recipe, self.setting.device))
                    for twin in twins
                ]
        (few, short), (many, long) = self._kinds[kind]
        slope = max(0.0, (long - short) / (many - few))
        return max(short + slope * (recipe.batch * _multiply_adds(spec, size) - few), 0.1 * short)

    def run(self, recipe: Recipe) -> float:
        """Seconds of a whole run: its steps, its judgements, its start."""
        step = self.step(recipe)
        judged = recipe.steps // recipe.judge_every * recipe.held_out + len(self.setting.source.test)
        return START + step * recipe.steps + FORWARD * step / recipe.batch * judged

    def left(self, places: Sequence[Place], processes: int) -> float:
        """Seconds until all of these runs are finished, by so many processes at once."""
        seconds = [self.run(p.recipe) * (1 - p.steps_done / p.recipe.steps) for p in places if not p.finished]
        return max([sum(seconds) / processes, *seconds])


@cache
def _multiply_adds(spec: Specification, size: tuple[int, int]) -> int:
    return cost(spec, size).multiply_adds


def _timed(spec: Specification, recipe: Recipe, device: str) -> float:
    """Seconds of one step (forward, backward), median of three after one to warm up; pictures are noise."""
    engine = pick_engine(recipe.precision, device, 1)
    net: Any = engine.place(assemble(spec, seed=0)).train()
    pictures = torch.randn(recipe.batch, spec.channels, recipe.size, recipe.size, device=engine.device)
    pictures = pictures.contiguous(memory_format=engine.memory_format)
    labels = torch.zeros(recipe.batch, dtype=torch.long, device=engine.device)
    seconds = []
    for _ in range(4):
        began = time.perf_counter()
        with engine.autocast():
            loss = F.cross_entropy(net(pictures).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        float(loss.detach())  # waits for the device
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])
