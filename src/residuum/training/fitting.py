"""How many pictures fit into memory at once: found by trying, so that a step of any batch can be made in parts."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from residuum.runtime import give_back_memory
from residuum.tasks.classify import Classify
from residuum.training.average import learn
from residuum.training.parts import parts_of
from residuum.training.recipe import Recipe

SHARES = 3  # that are in memory at once: the step's, and what is read ahead
PARTS = 4  # that are tried: each finds memory as the one before has left it, in pieces
# torch's, oneDNN's and the C++ library's; cuBLAS's and cuDNN's, and torch's where no algorithm of cuDNN finds room to work in
_WORDS = (
    *("can't allocate memory", "out of memory", "could not create a ", "bad allocation", "bad_alloc"),
    *("_STATUS_ALLOC_FAILED", "unable to find an engine to execute"),
)


def is_short(error: BaseException) -> bool:
    """Whether an error says that there is no memory left; torch has several words for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)
    )


def largest_part(task: Classify, recipe: Recipe, below: int | None = None) -> int | None:
    """The most pictures of a step, no more than now go through the network together, that fit into memory at once.

    Args:
        below: try only fewer than these.

    Returns:
        A divisor of this process's share; None where not even two pictures fit. The same in all processes.
    """
    share = recipe.batch // task.engine.world.size
    now = share // task.shares
    found = 0
    for size in range(now, 1, -1):
        if share % size == 0 and (below is None or size < below) and _fits(task, recipe, size):
            found = size
            break
    (least,) = task.engine.world.agree(-found)  # the largest of the negative ones
    return -least or None


def in_fitting_parts(task: Classify, recipe: Recipe) -> tuple[Classify, Recipe, int | None]:
    """Task and recipe with as many pictures at once as fit; the third is that number, None where nothing has to change."""
    size = largest_part(task, recipe)
    if size is None or size == recipe.batch // task.engine.world.size // task.shares:
        return task, recipe, None
    recipe = replace(recipe, bn_batch=size * task.engine.world.size if recipe.bn_sync else size)
    return replace(task, shares=parts_of(recipe, task.engine.world)), recipe, size


def _fits(task: Classify, recipe: Recipe, size: int) -> bool:
    """Tries what a step needs, on a copy of the network: this share and the next ones, and parts of it, a fourth larger."""
    gc.collect()
    give_back_memory(task.engine.device)
    try:
        with _no_more_than_there_is(task):
            net = copy.deepcopy(task.net)
            learn(net)
            parameters = list(net.parameters())
            momentum, gradients = [torch.zeros_like(p) for p in parameters], []
            count, device = recipe.batch // task.engine.world.size, task.engine.device
            shape = (task.preprocessing.channels, *task.preprocessing.size)
            shares = torch.zeros((SHARES, count, *shape), device=device)
            part = torch.zeros((size + size // 4 + 1, *shape), device=device)
            for _ in range(min(count // size, PARTS)):
                with task.engine.autocast():
                    loss = net(part.to(memory_format=task.engine.memory_format)).float().square().sum()
                loss.backward()
                gradients += [p.grad for p in parameters]
                for p in parameters:
                    p.grad = None
            kept = len(momentum) and len(gradients) and len(shares)
            return bool(kept) and bool(loss.detach().isfinite())  # waits for the device
    except (RuntimeError, MemoryError) as error:
        if not is_short(error):
            raise
        return False


@contextlib.contextmanager
def _no_more_than_there_is(task: Classify) -> Iterator[None]:
    """On a CPU: has an allocation fail where the system would end the process, or another one, for want of memory."""
    free = _free_memory() if task.engine.device.type == "cpu" else None
    if free is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = [limit for limit in (soft, hard, used + free) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _free_memory() -> int | None:
    """Bytes that this process may still take, on Linux; None elsewhere."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):  # a container's own limit
        most, now = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, most - now)
    return free
