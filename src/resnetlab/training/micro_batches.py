r"""The micro-batches of a step, and the mean over those of all processes.

The rounding of a mean depends on the order of summation. Here that is a balanced tree over the micro-batches:

    micro-batch  0   1   2   3   4   5   6   7        two processes hold 0 to 3 and 4 to 7
                  \ /     \ /     \ /     \ /
    in a process   +       +       +       +
                    \     /         \     /
                       +               +
    between them        \-------------/

so one process and several are bit-identical if the number of micro-batches in each is a power of two (otherwise the last bits
differ). torch's DistributedDataParallel is not used: its sums depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnetlab.distributed import TreeSum, World
from resnetlab.errors import UsageError
from resnetlab.training.recipe import BaseRecipe, Recipe


def count_micro_batches(recipe: Recipe, world: World) -> int:
    """The number of micro-batches in each process's share of a step.

    Raises UsageError if the batch cannot be split evenly; the message says which numbers of processes can.
    """
    if count := _count_or_zero(recipe, world.size):
        return count
    possible = [str(n) for n in range(1, 2 * world.size) if _count_or_zero(recipe, n)]
    what = f"batch {recipe.batch:,}" + (f" in micro-batches of {recipe.bn_batch:,}" if recipe.bn_batch else "")
    uneven = recipe.batch % (2 * world.size) or recipe.bn_sync or not recipe.bn_batch
    hint = "" if uneven else f" (bn_batch={recipe.batch // world.size} would fit)"
    raise UsageError(
        f"{what} cannot be shared evenly by {world.size} processes, only by {' or '.join(possible)}; "
        f"change --procs, batch or bn_batch{hint}."
    )


def _count_or_zero(recipe: Recipe, processes: int) -> int:
    """The number of micro-batches in a share; 0 if they would be uneven. A share has whole pairs (data.mixing)."""
    if processes > 1 and recipe.batch % (2 * processes):
        return 0
    share = recipe.batch // processes
    here = recipe.bn_batch or (recipe.batch if recipe.bn_sync else share)  # images that BN sees together
    if recipe.bn_sync:
        if here % processes:
            return 0
        here //= processes
    return 0 if share % here else share // here


def describe_sum_order(recipe: BaseRecipe, count: int, world: World) -> str:
    """A sentence if the number of processes decides the last bits, or ""; `count` micro-batches are in each."""
    reasons = {
        "gradients are rounded to bf16 between them": recipe.grad_compression == "bf16",
        "grad_reduce=all_reduce adds in an order of its own": recipe.grad_reduce == "all_reduce",
        "synchronised BN adds up a sum of each": getattr(recipe, "bn_sync", False),
        f"{count} micro-batches in each are no power of two": count & (count - 1) > 0,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), "")
    if world.size == 1 or not reason:
        return ""
    return f"the last bits of the result depend on the number of processes, since {reason}"


def take_gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of parameters, which have none afterwards; zeros where a backward pass did not come to one."""
    gradients = []
    for p in parameters:
        gradients.append(torch.zeros_like(p) if p.grad is None else p.grad)
        p.grad = None
    return gradients


class TreeMean:
    """The mean of lists of tensors added one by one, over all processes."""

    def __init__(self, world: World) -> None:
        self._world, self._sum = world, TreeSum()

    def add(self, tensors: list[Tensor]) -> None:
        """Adds the tensors of one micro-batch; takes them over and may modify them."""
        self._sum.add(self._sum.count, tensors)

    def total(self) -> list[Tensor]:
        """The sum over the micro-batches of this process."""
        return self._sum.total()

    def result(self) -> list[Tensor]:
        """The mean over all micro-batches of all processes, the same in each process."""
        return average_over_processes(self._world, self.total(), self._sum.count)


@torch.no_grad()
def average_over_processes(world: World, total: list[Tensor], count: int) -> list[Tensor]:
    """The mean of all processes' tensors, which are sums over `count` micro-batches in each; modifies and returns them."""
    if world.size > 1:
        flat = torch.cat([t.reshape(-1) for t in total])
        world.tree_all_reduce_(flat)
        summed = [
            part.view(t.shape) for part, t in zip(torch.split(flat, [t.numel() for t in total]), total, strict=True)
        ]
        torch._foreach_copy_(total, summed)
    if count * world.size > 1:
        torch._foreach_mul_(total, 1 / (count * world.size))
    return total


class BatchNormStatistics:
    """BN's moving averages: each micro-batch updates them from their values before the step; the step ends at the mean."""

    def __init__(self, net: nn.Module) -> None:
        modules = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.averages: list[Tensor] = [b for m in modules for b in (m.running_mean, m.running_var) if b is not None]
        self._counts: list[Tensor] = [m.num_batches_tracked for m in modules if m.num_batches_tracked is not None]
        # a GPU copies a list of one type with one kernel, where tensors one by one take more time to launch than to copy
        self._lists = [tensors for tensors in (self.averages, self._counts) if tensors]
        self._before: list[list[Tensor]] = []

    @torch.no_grad()
    def save(self) -> None:
        """Saves the values before the step."""
        self._before = self._before or [[torch.empty_like(b) for b in tensors] for tensors in self._lists]
        for before, tensors in zip(self._before, self._lists, strict=True):
            torch._foreach_copy_(before, tensors)

    @torch.no_grad()
    def rewind(self) -> list[Tensor]:
        """Restores the values before the step; returns those that the micro-batch led to."""
        updated = [torch.empty_like(b) for b in self.averages]
        if updated:
            torch._foreach_copy_(updated, self.averages)
        for before, tensors in zip(self._before, self._lists, strict=True):
            torch._foreach_copy_(tensors, before)
        return updated

    @torch.no_grad()
    def set(self, averages: Sequence[Tensor]) -> None:
        """Sets the averages at the end of a step."""
        if self.averages:
            torch._foreach_copy_(self.averages, list(averages))
        if self._counts:
            torch._foreach_add_(self._counts, 1)
