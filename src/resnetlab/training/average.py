"""The weights that a run evaluates and saves: their moving average, and re-estimated BN statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnetlab.distributed import World
from resnetlab.random import seed_for
from resnetlab.training.micro_batches import BatchNormStatistics, TreeMean
from resnetlab.training.tasks.base import Task


def set_train_mode(net: nn.Module) -> None:
    """Puts a network into train mode; frozen BN stays in eval mode."""
    net.train()
    for module in net.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


class WeightAverage:
    """An exponential moving average of weights and BN statistics (Polyak; "model EMA" in torchvision and timm).

    Attributes:
        tensors: the average, by name; empty if the recipe keeps none.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {k: v for k, v in net.state_dict().items() if v.is_floating_point()} if decay else {}
        self.tensors: dict[str, Tensor] = {k: v.detach().clone() for k, v in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after `step` steps; early steps have a smaller decay, so they fade soon."""
        if self._live:
            decay = min(self._decay, step / (step + 9))
            torch._foreach_lerp_(list(self.tensors.values()), list(self._live.values()), 1 - decay)

    @contextlib.contextmanager
    def swap_in(self) -> Iterator[None]:
        """Puts the average into the network; the last weights are restored on exit."""
        before = [v.clone() for v in self._live.values()]
        try:
            self._copy_in(list(self.tensors.values()))
            yield
        finally:
            self._copy_in(before)

    @torch.no_grad()
    def _copy_in(self, values: list[Tensor]) -> None:
        if values:
            torch._foreach_copy_(list(self._live.values()), values)


@torch.no_grad()
def reestimate_bn_statistics(task: Task, num_batches: int) -> None:
    """Replaces BN's moving averages by the mean over `num_batches` training batches, as in the papers' released models.

    The batches are those of the steps that would follow, augmented, each in the micro-batches that BN saw in training.
    """
    statistics, mean = BatchNormStatistics(task.net), TreeMean(World())
    if not statistics.averages:  # a network of the user's own without BN
        return
    modules = [m for m in task.net.modules() if isinstance(m, _BatchNorm)]
    before = [m.momentum for m in modules]
    set_train_mode(task.net)
    statistics.save()
    for module in modules:
        module.momentum = 1.0  # the statistics of one batch
    try:
        for step in range(task.recipe.steps, task.recipe.steps + num_batches):
            batch = TreeMean(task.device_config.world)  # micro-batches first, summed in training's order
            micro_batches = task.micro_batches(step)
            for number, micro_batch in enumerate(micro_batches, task.device_config.world.rank * len(micro_batches)):
                torch.manual_seed(seed_for(task.recipe.seed, "network", step, number))
                with task.device_config.autocast():
                    task.net(micro_batch.images)
                batch.add(statistics.rewind())
            mean.add(batch.result())
        statistics.set(mean.result())
    finally:
        for module, momentum in zip(modules, before, strict=True):
            module.momentum = momentum
