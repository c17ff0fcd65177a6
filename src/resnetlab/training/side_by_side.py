"""The micro-batches of a step side by side on a CPU: one thread carries one micro-batch.

Threads inside an operation meet at a barrier several hundred times a step; where another program takes one core for a time
slice, all wait. Threads with a micro-batch each meet once a step, and what a micro-batch computes does not depend on how many
threads there are. So a run is bit-identical for any number of threads up to the number of micro-batches.

Each thread has a replica of the network: parameters of its own, which share the memory of the weights, and BN statistics of its
own. Autocast's cache of cast weights is one for all threads and is cleared when a thread leaves autocast, so these threads
never leave it, and the cache is cleared after the step.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import is_dataclass, replace
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resnetlab.device import cpu_flags, map_in_order, use_one_heap
from resnetlab.errors import UsageError
from resnetlab.models.own_network import OWN
from resnetlab.nn.batchnorm import fuse_batchnorm
from resnetlab.nn.convolution import use_winograd
from resnetlab.nn.kernel import load_kernel
from resnetlab.random import draw_from
from resnetlab.training.average import set_train_mode
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.exchange import GradientExchange, WatchedGradients
from resnetlab.training.micro_batches import BatchNormStatistics, TreeMean, take_gradients
from resnetlab.training.step import set_means
from resnetlab.training.tasks.base import Task

KERNELS = {
    "fused_bn": "fused BN",
    "winograd": "Winograd's convolution",
}  # values of a recipe, and their names in messages
LONG = 5e8  # pixels of all images of a run, from which compiling the kernels, some 10 s, takes little of its time
MEASURED_THREADS = 2  # inside an operation; each call of a kernel starts its own, which more may not repay
OURS = ("torch", "torchvision", "resnetlab")  # packages whose layers may run in several threads
T = TypeVar("T", bound=Task)


def divide_threads(task: T) -> T:
    """The task with the number of threads inside an operation decided (the recipe's `op_threads`) and set in torch.

    Micro-batches go side by side as far as there are threads for them; threads that are left over work inside operations.
    """
    recipe, config, side_by_side = task.recipe, task.device_config, task.num_micro_batches
    if side_by_side > 1 and (reason := reason_for_turns(task)):
        side_by_side = 1
        if config.device.type == "cpu" and config.threads > 1:
            config = replace(config, reason=f"{config.reason}; one micro-batch after the other: {reason}")
    op_threads = recipe.op_threads or max(1, config.threads // side_by_side)
    side_by_side = max(1, min(side_by_side, config.threads // op_threads))
    torch.set_num_threads(op_threads)
    config = replace(config, op_threads=op_threads, side_by_side=side_by_side)
    return replace(task, recipe=replace(recipe, op_threads=op_threads), device_config=config)  # type: ignore[type-var]


def choose_kernels(task: T, report: Callable[[str], None], *, resuming: bool) -> T:
    """The task with the forms of its BN and convolutions decided, torch's or compiled ones, as the recipe's `fused_bn` and
    `winograd` say; "auto" becomes "on" in a long run where they can be used and were measured, in every process.

    Raises UsageError if a new run asks for a form where it cannot be used; a run that is resumed reports it.
    """
    asked = {form: getattr(task.recipe, form) for form in KERNELS}
    used: dict[str, bool] = {}
    for form, name in KERNELS.items():
        wanted = asked[form] == "on" or (asked[form] == "auto" and _pays_off(task))
        reason = _reason_against_kernels(task, form) if wanted else ""
        used[form] = wanted and not reason
        if asked[form] == "auto":
            (unused,) = task.device_config.world.all_reduce_max(int(not used[form]))
            used[form] = not unused
        elif reason and not resuming:
            raise UsageError(f"{form}=on cannot be used: {reason}; leave it out.")
        elif reason:
            report(f"the run started with {name}, which cannot be used here ({reason}), so its last bits will differ")
    decided = {key: ("on" if used[key] else "off") if asked[key] == "auto" else asked[key] for key in KERNELS}
    recipe = replace(task.recipe, fused_bn=decided["fused_bn"], winograd=decided["winograd"])
    config = replace(task.device_config, fused_bn=used["fused_bn"], winograd=used["winograd"])
    return replace(task, recipe=recipe, device_config=config)  # type: ignore[type-var]


def _pays_off(task: Task) -> bool:
    """Whether a run is long enough for compiled kernels, of a kind that they were seen to shorten (docs/log.md)."""
    recipe, config = task.recipe, task.device_config
    pixels = recipe.steps * recipe.batch * getattr(recipe, "image_size", 0) ** 2  # of detectors they were not measured
    flags = cpu_flags()
    bf16 = (
        config.precision == "bf16" and "avx512_bf16" in flags and "amx_bf16" not in flags
    )  # AMX outruns fewer products
    measured = (bf16 or config.precision == "fp32") and config.op_threads <= MEASURED_THREADS
    return measured and pixels >= LONG and not recipe.net.startswith(OWN)


def _reason_against_kernels(task: Task, form: str) -> str:
    if task.recipe.net.startswith(OWN):
        return "it is for networks that are built by name"
    if reason := reason_for_turns(task):
        return reason
    if form == "fused_bn" and task.device_config.op_threads > 1:
        return (
            f"it uses one thread, where {task.device_config.op_threads} work inside operations (smaller micro-batches, one for "
            "each thread: bn_batch; or threads=1)"
        )
    if form == "winograd" and task.device_config.precision not in ("fp32", "bf16"):
        return f"it takes fp32 and bf16, and this run is in {task.device_config.precision} (--precision fp32)"
    return load_kernel().reason


def reason_for_turns(task: Task) -> str:
    """Why the micro-batches of a task go through the network one after the other; empty if they may go side by side."""
    config = task.device_config
    if config.device.type != "cpu":
        return "a GPU computes them"
    if config.compiled:
        return "the network is compiled"
    if getattr(task.recipe, "bn_sync", False):
        return "synchronised BN exchanges its statistics in every layer"
    if not is_dataclass(task):
        return "the task cannot be copied"
    if getattr(task.net, "draws", False):
        return "the network draws random numbers"
    for module in task.net.modules():
        kind = type(module)
        if kind.__module__.split(".")[0] not in OURS and not getattr(kind, "thread_safe", False):
            return f"{kind.__qualname__} may not be safe in several threads (if it is: thread_safe = True in its class)"
    of_bn = {id(b) for m in task.net.modules() if isinstance(m, _BatchNorm) for b in m.buffers(recurse=False)}
    # each replica has its own copy of what is neither a parameter nor a statistic of BN
    persistent = task.net.state_dict()
    if own := [name for name, b in task.net.named_buffers() if name in persistent and id(b) not in of_bn]:
        return f"the network keeps {own[0].removeprefix('module.')} from step to step"
    return ""


class Replica:
    """A task whose network shares another's weights, with gradients, BN statistics and random numbers of its own."""

    def __init__(self, task: Task, exchange: GradientExchange | None) -> None:
        net = share_weights(task.net)
        set_train_mode(net)
        if task.device_config.fused_bn:
            fuse_batchnorm(net)
        if task.device_config.winograd:
            use_winograd(net, task.device_config.op_threads, task.device_config.precision)
        self.task: Task = replace(task, net=net)  # type: ignore[type-var]
        self._parameters = [p for p in net.parameters() if p.requires_grad]
        self._statistics, self._before = BatchNormStatistics(net), BatchNormStatistics(task.net).averages
        self._generator = torch.Generator()
        self._watched = None if exchange is None else WatchedGradients(exchange, self._parameters)

    def gradients(self, micro_batch: Any, seed: int, number: int, scale: Tensor | None) -> list[Tensor]:
        """Loss, error, the gradient of every parameter, and the BN averages that the micro-batch leads to.

        Where gradients are exchanged with other processes, those of micro-batch `number` go there.
        """
        if self._before:
            with torch.no_grad():
                torch._foreach_copy_(self._statistics.averages, self._before)
        with draw_from(self._generator.manual_seed(seed)):
            with self.task.device_config.autocast():
                loss, error = self.task.loss(micro_batch)
            with contextlib.nullcontext() if self._watched is None else self._watched.collecting(number):
                (loss if scale is None else loss * scale).backward()  # type: ignore[no-untyped-call]
        gradients = take_gradients(self._parameters) if self._watched is None else []
        return [loss.detach(), error, *gradients, *(average.clone() for average in self._statistics.averages)]


def share_weights(net: nn.Module) -> nn.Module:
    """A copy of a network whose parameters are new but have the memory of the given ones; its buffers are copies."""
    return copy.deepcopy(net, {id(p): nn.Parameter(p.data, p.requires_grad) for p in net.parameters()})


class SideBySideGradients:
    """`compute_gradients` with one thread for each of as many micro-batches as the task's device config names."""

    def __init__(self, task: Task, exchange: GradientExchange | None = None) -> None:
        self._threads = task.device_config.side_by_side
        self._replicas: SimpleQueue[Replica] = SimpleQueue()
        for _ in range(self._threads):
            self._replicas.put(Replica(task, exchange))
        use_one_heap()
        # a thread that is inside autocast already does not clear the cache when it leaves autocast again
        self._pool = ThreadPoolExecutor(self._threads, "micro-batch", torch.autocast_increment_nesting)

    def __call__(self, train_state: TrainState, micro_batches: Sequence[Any]) -> list[Tensor]:
        world, exchange = train_state.task.device_config.world, train_state.exchange
        mean, first = TreeMean(world), world.rank * len(micro_batches)
        scale = train_state.loss_scale
        jobs = [(part, train_state.network_seed(first + i), i, scale) for i, part in enumerate(micro_batches)]
        if exchange is not None:
            exchange.start(len(micro_batches))
        try:
            for results in map_in_order(self._pool, 2 * self._threads, self._carry, jobs):
                mean.add(results)
        finally:
            torch.clear_autocast_cache()
        return set_means(train_state, mean.result())

    def _carry(self, job: tuple[Any, int, int, Tensor | None]) -> list[Tensor]:
        replica = self._replicas.get()
        try:
            return replica.gradients(*job)
        finally:
            self._replicas.put(replica)
