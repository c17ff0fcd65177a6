"""What the machine decides: device, precision, memory format, threads; and randomness as a function."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from residuum.errors import UsageError, unknown
from residuum.world import World

PRECISIONS = ("auto", "bf16", "fp32")


def seed_for(seed: int, *parts: int | str) -> int:
    """A seed in [0, 2^63) for one use of randomness: the same (seed, parts) give the same number on every machine.

    >>> seed_for(0, "order", 3) == seed_for(0, "order", 3) != seed_for(0, "order", 4)
    True
    """
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator that starts from `seed_for(seed, *parts)`."""
    return torch.Generator().manual_seed(seed_for(seed, *parts))


@dataclass(frozen=True)
class Engine:
    """Device, precision and memory format of one run, picked once and written into its record."""

    device: torch.device
    precision: str  # "bf16" (autocast) or "fp32"
    threads: int  # of the CPU
    why: str
    world: World = field(default_factory=World)  # the processes that share the work
    compiled: bool = False  # by torch.compile, for training
    graphs: bool = False  # training steps are replayed from a CUDA graph where that gives the same bits

    @property
    def memory_format(self) -> torch.memory_format:
        """channels_last: convolutions are faster in it on CPUs and GPUs alike."""
        return torch.channels_last

    def place(self, net: nn.Module) -> nn.Module:
        """The network on the device, in the memory format."""
        return net.to(self.device).to(memory_format=self.memory_format)

    def forward(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        """The network's forward pass for training, compiled where the engine compiles.

        Raises UsageError, at the first call, where the network cannot be compiled here.
        """
        if not self.compiled:
            return net
        fast = torch.compile(net, dynamic=False)
        from torch._dynamo.exc import TorchDynamoException

        def forward(x: Tensor) -> Tensor:
            try:
                return cast(Tensor, fast(x))
            except TorchDynamoException as error:
                reason = str(error).strip().splitlines()[0]
                raise UsageError(f"torch cannot compile the network here ({reason}); use --compile off.") from error

        return forward

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which forward passes run."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def __str__(self) -> str:
        threads = f", {self.threads} thread{'s' * (self.threads > 1)}" if self.device.type == "cpu" else ""
        made = ", compiled" * self.compiled + ", CUDA graph" * self.graphs
        return f"{self.device}{threads}, {self.precision}, channels_last{made} ({self.why})"


def pick_engine(precision: str = "auto", device: str = "auto", threads: int = 0) -> Engine:
    """The engine for this machine: bf16 where the hardware computes it, unless told otherwise.

    `threads` is set for the whole process; 0 leaves torch's own number, one for each core.

    Raises UsageError for an unknown precision or a device that is not there.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        float(torch.ones(1, device=place))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {device!r} is not here; use --device cpu, or auto to take what there is.") from error
    if threads:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    if place.type == "cpu":
        _keep_freed_memory()
    automatic = automatic_precision(place)
    if place.type == "cuda":  # the same bits again, and fp32 that is fp32
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    if precision != "auto":
        return Engine(place, precision, threads, "as asked")
    return Engine(
        place, automatic, threads, f"this hardware {'computes' if automatic == 'bf16' else 'does not compute'} bf16"
    )


@functools.cache
def _keep_freed_memory() -> None:
    """Has the C library keep freed memory for the next step, for the whole process.

    Else every large activation goes back to the system when freed, and the next step takes it anew, a page fault for each
    4 KiB: 340,000 a step of ResNet-50 at batch 32, a fifth of its time. Only glibc has these switches.
    """
    switch = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if switch is not None:
        largest = 2**31 - 1
        switch(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
        switch(-1, largest)  # M_TRIM_THRESHOLD: the heap does not shrink


def give_back_memory(device: torch.device) -> None:
    """Gives what was freed, and is kept for the next step, back to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        trim(0)


def automatic_precision(device: torch.device) -> str:
    """What "auto" comes to on a device."""
    return "bf16" if _computes_bf16(device) else "fp32"


@contextlib.contextmanager
def own_process_state() -> Iterator[None]:
    """Gives torch's number of threads and its random generator back as they were: a run sets both for itself."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)


def _computes_bf16(device: torch.device) -> bool:
    """Whether bf16 products are an instruction there, not an emulation."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch answers for the current one
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    try:  # Linux lists what the kernel lets programs use; elsewhere fp32 is the safe answer
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside, the former mode after."""
    before = net.training
    net.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        net.train(before)


def to_device(x: Tensor, engine: Engine) -> Tensor:
    """A batch on the engine's device, without waiting for it."""
    return onto(x, engine.device)


def onto(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, without waiting for what the device has still to do: a GPU copies from pinned memory by itself."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def environment(device: torch.device | None = None) -> dict[str, object]:
    """Versions and hardware, as written into every run folder; the GPU is the device's, or else the current one."""
    from importlib.metadata import version

    from residuum import __version__

    gpu = device if device is not None and device.type == "cuda" else None
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "residuum": __version__,
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None,
    }
