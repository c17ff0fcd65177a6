"""The largest micro-batch that fits into memory, found by trying, so that a step of any batch size can run."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from resnetlab.device import release_memory
from resnetlab.training.average import set_train_mode
from resnetlab.training.micro_batches import count_micro_batches
from resnetlab.training.recipe import Recipe
from resnetlab.training.tasks.classification import ClassificationTask

BATCHES_IN_MEMORY = 3  # the step's own, and those prefetched
MAX_TRIED = 4  # micro-batches in a row, because each leaves memory more fragmented
# messages of torch, oneDNN and the C++ library; of cuBLAS and cuDNN, and of torch if no cuDNN algorithm finds workspace
_OUT_OF_MEMORY = (
    *("can't allocate memory", "out of memory", "could not create a ", "bad allocation", "bad_alloc"),
    *("_STATUS_ALLOC_FAILED", "unable to find an engine to execute"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory has run out; torch has several messages for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in _OUT_OF_MEMORY)
    )


def largest_micro_batch(task: ClassificationTask, recipe: Recipe, below: int | None = None) -> int | None:
    """The largest micro-batch, no larger than the present one, that fits into memory.

    Args:
        below: try only smaller sizes than this.

    Returns:
        A number of images that divides this process's share; None if not even two fit. The same in all processes.
    """
    share = recipe.batch // task.device_config.world.size
    current = share // task.num_micro_batches
    largest = 0
    for size in range(current, 1, -1):
        if share % size == 0 and (below is None or size < below) and _fits(task, recipe, size):
            largest = size
            break
    (negative,) = task.device_config.world.all_reduce_max(-largest)  # the minimum over all processes
    return -negative or None


def fit_micro_batches(task: ClassificationTask, recipe: Recipe) -> tuple[ClassificationTask, Recipe, int | None]:
    """Task and recipe with the largest micro-batch that fits, and its size; None if nothing has to change."""
    size = largest_micro_batch(task, recipe)
    if size is None or size == recipe.batch // task.device_config.world.size // task.num_micro_batches:
        return task, recipe, None
    recipe = replace(recipe, bn_batch=size * task.device_config.world.size if recipe.bn_sync else size)
    return replace(task, num_micro_batches=count_micro_batches(recipe, task.device_config.world)), recipe, size


def _fits(task: ClassificationTask, recipe: Recipe, size: int) -> bool:
    """Tries what a step needs on a copy of the network: prefetched batches, and micro-batches a quarter larger than `size`."""
    gc.collect()
    release_memory(task.device_config.device)
    try:
        with _limit_to_free_memory(task):
            net = copy.deepcopy(task.net)
            set_train_mode(net)
            parameters = list(net.parameters())
            momentum, gradients = [torch.zeros_like(p) for p in parameters], []
            count, device = recipe.batch // task.device_config.world.size, task.device_config.device
            shape = (task.preprocessing.channels, *task.preprocessing.size)
            batches = torch.zeros((BATCHES_IN_MEMORY, count, *shape), device=device)
            part = torch.zeros((size + size // 4 + 1, *shape), device=device)
            for _ in range(min(count // size, MAX_TRIED)):
                with task.device_config.autocast():
                    loss = net(part.to(memory_format=task.device_config.memory_format)).float().square().sum()
                loss.backward()
                gradients += [p.grad for p in parameters]
                for p in parameters:
                    p.grad = None
            kept = len(momentum) and len(gradients) and len(batches)
            return bool(kept) and bool(loss.detach().isfinite())  # synchronises with the device
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False


@contextlib.contextmanager
def _limit_to_free_memory(task: ClassificationTask) -> Iterator[None]:
    """On a CPU: makes an allocation fail before the system would kill this or another process for lack of memory."""
    free = _free_memory() if task.device_config.device.type == "cpu" else None
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
    """Bytes that this process may still allocate, on Linux; None elsewhere."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):  # the limit of a container
        most, current = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, most - current)
    return free
