"""The largest micro-batch that fits into memory, found by trying, so that a step of any batch size can run."""

from __future__ import annotations

import contextlib
import copy
import gc
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from resnetlab.device import DeviceConfig, release_memory
from resnetlab.out_of_memory import is_out_of_memory
from resnetlab.training.average import set_train_mode
from resnetlab.training.timing import forward_backward

resource: ModuleType | None
try:
    import resource
except ImportError:  # Windows
    resource = None

BATCHES_IN_MEMORY = 3  # the step's own, and those prefetched
MAX_TRIED = 4  # micro-batches in a row, because each leaves memory more fragmented


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held so far: on a GPU those of torch's allocator, else all; 0 if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if resource is not None else 0


def largest_micro_batch(
    net: nn.Module, device_config: DeviceConfig, shape: tuple[int, int, int], share: int, sizes: Sequence[int]
) -> int | None:
    """The first of `sizes` (falling) that fits into memory as a micro-batch; None if none does. The same in all processes.

    Args:
        shape: (C, h, w) of the images.
        share: images in this process's share of a step.
    """
    largest = next((size for size in sizes if _fits(net, device_config, shape, share, size)), 0)
    (negative,) = device_config.world.all_reduce_max(-largest)  # the minimum over all processes
    return -negative or None


def _fits(net: nn.Module, device_config: DeviceConfig, shape: tuple[int, int, int], share: int, size: int) -> bool:
    """Tries what a step needs on a copy of the network: prefetched batches, and micro-batches a quarter larger than `size`.

    On a CPU as many micro-batches are in memory at once as there are threads. A CUDA graph has a batch of its own, and is
    compared with gradients that were computed without it.
    """
    gc.collect()
    device = device_config.device
    release_memory(device)
    try:
        with _limit_to_free_memory(device):
            net = copy.deepcopy(net)
            set_train_mode(net)
            parameters = list(net.parameters())
            copies = 1 + device_config.cuda_graph  # momentum, and those gradients
            momentum, gradients = [torch.zeros_like(p) for _ in range(copies) for p in parameters], []
            batches = torch.zeros((BATCHES_IN_MEMORY + device_config.cuda_graph, share, *shape), device=device)
            at_once = min(device_config.threads, share // size) if device.type == "cpu" else 1
            images = torch.zeros((at_once * (size + size // 4 + 1), *shape), device=device)
            labels = torch.zeros(len(images), dtype=torch.long, device=device)
            for _ in range(min(share // size // at_once, MAX_TRIED)):
                loss = forward_backward(net, images.to(memory_format=torch.channels_last), labels, device_config)
                gradients += [p.grad for p in parameters]
                for p in parameters:
                    p.grad = None
            kept = len(momentum) and len(gradients) and len(batches)
            return bool(kept) and math.isfinite(loss)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False


@contextlib.contextmanager
def _limit_to_free_memory(device: torch.device) -> Iterator[None]:
    """On a CPU: makes an allocation fail before the system would kill this or another process for lack of memory."""
    free = _free_memory() if device.type == "cpu" else None
    if free is None or resource is None:
        yield
        return
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
