"""What a run judges and keeps in place of its last weights: their moving average, and BN's statistics taken anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from residuum.runtime import seed_for
from residuum.tasks.classify import Classify
from residuum.training.parts import Statistics, TreeMean
from residuum.training.recipe import Recipe
from residuum.world import World


def learn(net: nn.Module) -> None:
    """Brings a network into training mode; BN that is not to learn stays as it is."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()


class Average:
    """An exponential moving average of weights and BN's statistics (Polyak; torchvision's and timm's "model EMA").

    Attributes:
        tensors: the average, by name; empty where the recipe keeps none.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {k: v for k, v in net.state_dict().items() if v.is_floating_point()} if decay else {}
        self.tensors: dict[str, Tensor] = {k: v.detach().clone() for k, v in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after `step` steps; faster in the beginning, which it soon forgets."""
        if self._live:
            decay = min(self._decay, step / (step + 9))
            torch._foreach_lerp_(list(self.tensors.values()), list(self._live.values()), 1 - decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The network with the average inside, the last weights after."""
        before = [v.clone() for v in self._live.values()]
        try:
            self._put(list(self.tensors.values()))
            yield
        finally:
            self._put(before)

    @torch.no_grad()
    def _put(self, values: list[Tensor]) -> None:
        if values:
            torch._foreach_copy_(list(self._live.values()), values)


@torch.no_grad()
def precise_statistics(task: Classify, recipe: Recipe) -> None:
    """Puts the mean over `precise_bn` training batches in place of BN's moving averages, as in the papers' released models.

    The batches are those of the steps that would follow, augmented, each in the parts that BN saw in training.
    """
    statistics, mean = Statistics(task.net), TreeMean(World())
    modules = [m for m in task.net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.momentum for m in modules]
    learn(task.net)
    statistics.hold()
    for module in modules:
        module.momentum = 1.0  # a batch's own statistics
    try:
        for step in range(recipe.steps, recipe.steps + recipe.precise_bn):
            batch = TreeMean(task.engine.world)  # parts first, as in training: in one order whoever holds them
            parts = task.parts(step)
            for number, part in enumerate(parts, task.engine.world.rank * len(parts)):
                torch.manual_seed(seed_for(recipe.seed, "network", step, number))
                with task.engine.autocast():
                    task.net(part.pictures)
                batch.add(statistics.rewind())
            mean.add(batch.result())
        statistics.set(mean.result())
    finally:
        for module, momentum in zip(modules, before, strict=True):
            module.momentum = momentum
