r"""A step's parts: what goes through the network together, and the mean over all parts of all processes.

A mean is rounded in the order in which it is summed. Here that is a balanced tree over the parts, whoever holds them:

    parts        0   1   2   3   4   5   6   7        two processes hold 0 to 3 and 4 to 7
                  \ /     \ /     \ /     \ /
    in a process   +       +       +       +
                    \     /         \     /
                       +               +
    between them        \-------------/               each sends the other its sum, and both add

so that one process and several come to the same bits where processes and parts a process are powers of two (else they differ in
the last bits). torch's DistributedDataParallel, whose sums depend on the number of processes, is not used for this reason.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from residuum.errors import UsageError
from residuum.training.recipe import Recipe
from residuum.world import World


def parts_of(recipe: Recipe, world: World) -> int:
    """How many parts each process's share of a step has.

    Raises UsageError where the batch cannot be shared so; it says how many processes can.
    """
    if parts := _parts(recipe, world.size):
        return parts
    can = [str(n) for n in range(1, 2 * world.size) if _parts(recipe, n)]
    what = f"batch {recipe.batch:,}" + (f" in parts of {recipe.bn_batch:,}" if recipe.bn_batch else "")
    raise UsageError(
        f"{what} cannot be shared evenly by {world.size} processes, only by {' or '.join(can)}; "
        "change --procs, batch or bn_batch."
    )


def _parts(recipe: Recipe, processes: int) -> int:
    """The number of parts in a share; 0 where shares or parts would be uneven. A share holds whole pairs (data.mixing)."""
    if processes > 1 and recipe.batch % (2 * processes):
        return 0
    share = recipe.batch // processes
    here = recipe.bn_batch or (recipe.batch if recipe.bn_sync else share)  # what BN sees together
    if recipe.bn_sync:
        if here % processes:
            return 0
        here //= processes
    return 0 if share % here else share // here


class TreeMean:
    """The mean of lists of tensors that come one after the other, and of those of the other processes."""

    def __init__(self, world: World) -> None:
        self._world, self._count = world, 0
        self._sums: list[tuple[int, list[Tensor]]] = []  # of ever fewer parts: (how high in the tree, sum)

    @torch.no_grad()
    def add(self, tensors: list[Tensor]) -> None:
        """Takes one part's tensors over; they may be written to."""
        level = 0
        while self._sums and self._sums[-1][0] == level:
            _, before = self._sums.pop()
            torch._foreach_add_(before, tensors)
            tensors, level = before, level + 1
        self._sums.append((level, tensors))
        self._count += 1

    @torch.no_grad()
    def result(self) -> list[Tensor]:
        """The mean over all parts of all processes, the same in each of them."""
        _, total = self._sums.pop()
        while self._sums:
            _, before = self._sums.pop()
            torch._foreach_add_(before, total)
            total = before
        if self._world.size > 1:
            flat = torch.cat([t.reshape(-1) for t in total])
            self._world.add_up_(flat)
            summed = [
                part.view(t.shape) for part, t in zip(torch.split(flat, [t.numel() for t in total]), total, strict=True)
            ]
            torch._foreach_copy_(total, summed)
        if (parts := self._count * self._world.size) > 1:
            torch._foreach_mul_(total, 1 / parts)
        return total


class Statistics:
    """BN's moving averages, which every part of a step moves from where the step began, and which end at the mean of that."""

    def __init__(self, net: nn.Module) -> None:
        modules = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        self.averages: list[Tensor] = [b for m in modules for b in (m.running_mean, m.running_var) if b is not None]
        self._counts: list[Tensor] = [m.num_batches_tracked for m in modules if m.num_batches_tracked is not None]
        self._before: list[Tensor] = []

    @torch.no_grad()
    def hold(self) -> None:
        """Remembers where the step began."""
        self._before = [b.clone() for b in self.averages + self._counts]

    @torch.no_grad()
    def rewind(self) -> list[Tensor]:
        """Back to where the step began; what the part had made of them."""
        made = [b.clone() for b in self.averages]
        torch._foreach_copy_(self.averages + self._counts, self._before)
        return made

    @torch.no_grad()
    def set(self, averages: Sequence[Tensor]) -> None:
        """Ends a step."""
        torch._foreach_copy_(self.averages, list(averages))
        for count in self._counts:
            count += 1
