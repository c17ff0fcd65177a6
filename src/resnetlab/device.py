"""The device a run computes on: its kind, precision and number of threads."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from resnetlab.distributed import World
from resnetlab.errors import UsageError, first_line, unknown_name_error
from resnetlab.formatting import format_count
from resnetlab.shared_context import SharedContext

A = TypeVar("A")
B = TypeVar("B")
PRECISIONS = ("auto", "bf16", "fp32")
TRAINING_PRECISIONS = ("auto", "bf16", "fp16", "tf32", "fp32")


class MapFunction(Protocol):
    """`map` of one iterable."""

    def __call__(self, function: Callable[[A], B], items: Iterable[A], /) -> Iterator[B]: ...


@dataclass(frozen=True)
class DeviceConfig:
    """Device, precision and threads of one run, selected once and recorded in the run folder."""

    device: torch.device
    precision: str  # "bf16" or "fp16" (autocast), "tf32" (products of fp32 numbers on a GPU rounded to TF32) or "fp32"
    threads: int  # of the CPU
    reason: str  # why this precision, and why compiled or not; printed at the start of a run
    world: World = field(default_factory=World)  # the processes that share the work
    compiled: bool = False  # by torch.compile, for training
    compile_mode: str = "default"  # torch.compile's
    cuda_graph: bool = False  # replay training steps from a CUDA graph where that is bit-identical
    op_threads: int = 0  # of the threads, those inside each operation; 0: all
    fused_bn: bool = False  # train with BN and ReLU in one function compiled for this CPU
    winograd: bool = False  # train with 3x3 convolutions by Winograd's algorithm, compiled for this CPU
    side_by_side: int = 1  # micro-batches that a CPU trains on at once, one thread (or `op_threads`) each

    def place(self, net: nn.Module) -> nn.Module:
        """Moves a network to the device, in channels_last memory: convolutions are faster in it on CPUs and GPUs alike."""
        return net.to(self.device).to(memory_format=torch.channels_last)

    def forward_fn(self, net: nn.Module) -> Callable[[Tensor], Tensor]:
        """The forward function for training, compiled by torch.compile if `compiled`.

        Its first call raises UsageError if the network cannot be compiled on this machine.
        """
        if not self.compiled:
            return net
        from torch._dynamo.exc import TorchDynamoException
        from torch._inductor import list_mode_options

        options = list_mode_options(self.compile_mode)
        if self.device.type == "cuda":  # otherwise kernels that add in different orders are chosen by their speed
            options = options | {"deterministic": torch.backends.cudnn.deterministic}
        compiled = torch.compile(net, dynamic=False, options=options)

        def forward(x: Tensor) -> Tensor:
            try:
                return cast(Tensor, compiled(x))
            except TorchDynamoException as error:
                reason = first_line(error)
                raise UsageError(f"torch cannot compile the network here ({reason}); use --compile off.") from error

        return forward

    def autocast(self) -> AbstractContextManager[object]:
        """The autocast context for forward passes."""
        if self.precision in ("fp32", "tf32"):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.float16 if self.precision == "fp16" else torch.bfloat16)

    @contextlib.contextmanager
    def side_by_side_map(self, count: int) -> Iterator[MapFunction]:
        """`map` in threads, for `count` independent items such as batches to evaluate.

        On a CPU each has as many threads inside its operations as are left over, whatever a run's steps have, so that a run's
        own evaluation and a later one agree. On a GPU there are two threads with a stream each, so that one batch is prepared
        and copied beside another. Elsewhere the built-in `map`.
        """
        if self.device.type == "cuda" and count > 1:
            caller = torch.cuda.current_stream(self.device)
            use_own = partial(_use_own_stream, iter(_side_streams(caller.device)), caller)
            with ThreadPoolExecutor(2, initializer=use_own) as pool:
                yield partial(map_in_order, pool, 3)
            return
        op_threads = max(1, self.threads // max(1, count))
        side_by_side = min(count, self.threads // op_threads) if self.device.type == "cpu" else 1
        if side_by_side < 2:
            yield map
            return
        before = torch.get_num_threads()
        torch.set_num_threads(op_threads)
        use_one_heap()
        pool = ThreadPoolExecutor(side_by_side)
        try:
            yield partial(map_in_order, pool, side_by_side + 1)
        finally:
            pool.shutdown()
            torch.set_num_threads(before)

    def __str__(self) -> str:
        threads = f", {format_count(self.threads, 'thread')}" if self.device.type == "cpu" else ""
        if self.side_by_side > 1:
            each = self.op_threads if self.op_threads > 1 else "one"
            count = self.side_by_side * self.op_threads
            at_once = f"{each} for each of {self.side_by_side} micro-batches at a time"
            threads = f", {format_count(count, 'thread')}, {at_once}"
        compiled = ", compiled" + f" for {self.compile_mode}" * (self.compile_mode != "default")
        kernels = ", fused BN" * self.fused_bn + ", Winograd" * self.winograd
        mode = compiled * self.compiled + kernels + ", CUDA graph" * self.cuda_graph
        return f"{self.device}{threads}, {self.precision}, channels_last{mode} ({self.reason})"


@functools.cache
def _side_streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The streams of two threads, always the same: torch keeps the memory that each new one has used."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _use_own_stream(streams: Iterator[torch.cuda.Stream], caller: torch.cuda.Stream) -> None:
    """Gives this thread the next of the streams, which goes on after what the caller has queued."""
    own = next(streams)
    own.wait_stream(caller)
    torch.cuda.set_stream(own)


def map_in_order(pool: Executor, ahead: int, function: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """function(item) of every item, in order; at most `ahead` are read, computed or waiting at once.

    After an error, which is that of the first item that has one, none is left running.
    """
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) == ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def select_device(
    precision: str = "auto", device: str = "auto", threads: int = 0, *, training: bool = False, exact: bool = True
) -> DeviceConfig:
    """Selects device and precision; "auto" takes a GPU (CUDA, then MPS) if there is one, and bf16 if the hardware computes it.

    Sets the number of CPU threads for the whole process; 0 keeps torch's own number, one per core that the process may use.

    Args:
        training: choose among TRAINING_PRECISIONS (fp16 needs a scaled loss), and switch the process to the run's kernels: what
            is not training computes by `standard_torch_state`, and may be called in the middle of a run.
        exact: train with deterministic kernels of a GPU alone; False takes the fastest ones, found by cuDNN's benchmark.

    Raises UsageError for an unknown precision or a missing device.
    """
    known = TRAINING_PRECISIONS if training else PRECISIONS
    if precision not in known:
        raise unknown_name_error("precision", precision, known)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    elif device.isdecimal():  # as other programs number GPUs
        device = f"cuda:{device}"
    try:
        selected = torch.device(device)
        float(torch.ones(1, device=selected))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {device!r} is not available; use --device cpu, or auto.") from error
    threads = threads or min(torch.get_num_threads(), count_cores())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    if selected.type == "cpu":
        _keep_freed_memory()
    if precision == "tf32" and not _computes_tf32(selected):
        raise UsageError("tf32 is a format of NVIDIA's GPUs since Ampere; on this device use --precision fp32.")
    if training and selected.type == "cuda":
        _set_reproducible_flags(tf32=precision == "tf32")
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = exact, not exact
    if precision != "auto":
        return DeviceConfig(selected, precision, threads, "as asked")
    if selected.type == "mps":
        return DeviceConfig(selected, "fp32", threads, "half precision on MPS was not checked")
    best = default_precision(selected)
    best = best if best in known else "fp32"
    reason = f"{'computes' if best == 'bf16' else 'does not compute'} bf16{', but fp16' * (best == 'fp16')}"
    return DeviceConfig(selected, best, threads, f"this hardware {reason}")


@functools.cache
def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next step, for the whole process.

    Otherwise every large activation goes back to the system when freed and the next step allocates it again, with a page
    fault per 4 KiB: 340,000 faults per step of ResNet-50 at batch 32, a fifth of its time. Only glibc has these options.
    """
    largest = 2**31 - 1
    _set_malloc_option(-3, 2**30)  # M_MMAP_THRESHOLD: blocks up to 1 GiB come from the heap
    _set_malloc_option(-1, largest)  # M_TRIM_THRESHOLD: the heap does not shrink


@functools.cache
def use_one_heap() -> None:
    """Makes glibc serve all threads from the heap that keeps freed memory; to be called before threads that compute start.

    The heaps of threads do give it back: 13,000 page faults per step of ResNet-20 at batch 128 on two threads.
    """
    _set_malloc_option(-8, 1)  # M_ARENA_MAX


def _set_malloc_option(option: int, value: int) -> None:
    if os.name == "posix" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(option, value)


def count_cores(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """The number of cores that this process may use: its affinity, and its container's CPU quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        group = next(
            line.split(":", 2)[2].strip("/") for line in own.read_text().splitlines() if line.startswith("0::")
        )
    except (OSError, StopIteration):
        group = ""
    folders = [cgroups / group, *(cgroups / group).parents][: len(Path(group).parts) + 1]
    version1 = (cgroups / "cpu/cpu.cfs_quota_us", cgroups / "cpu/cpu.cfs_period_us")
    for files in (*((folder / "cpu.max",) for folder in folders), version1):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, " ".join(file.read_text() for file in files).split())  # "max": not a number
            if quota > 0:
                cores = min(cores, max(1, -(-quota // period)))
    return cores


def is_usable(device: torch.device) -> bool:
    """Whether the device still computes: after some errors of a kernel, all that a process asks of its GPU fails."""
    try:
        return device.type == "cpu" or float(torch.ones(1, device=device)) == 1
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False


def release_memory(device: torch.device) -> None:
    """Returns cached free memory to the system."""
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()
    elif trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None:
        trim(0)


def default_precision(device: torch.device) -> str:
    """The precision that "auto" selects for training on a device."""
    if _computes_bf16(device):
        return "bf16"
    has_fp16_cores = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (7, 0)  # V100, T4, later
    return "fp16" if has_fp16_cores else "fp32"


@contextlib.contextmanager
def _reproducible_flags() -> Iterator[None]:
    """torch's process-wide flags that change results as a fresh process has them; gives the caller's back on exit."""
    with contextlib.ExitStack() as stack:
        undo = stack.callback
        backends = cast(Any, torch.backends)  # its parts are not in torch's type information
        cudnn, mkldnn = backends.cudnn, backends.mkldnn
        for part in (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv):
            undo(setattr, part, "fp32_precision", part.fp32_precision)
        undo(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        with contextlib.suppress(RuntimeError):  # raised where the caller has set conv and rnn apart
            undo(setattr, cudnn, "allow_tf32", cudnn.allow_tf32)
        undo(setattr, cudnn, "deterministic", cudnn.deterministic)
        undo(setattr, cudnn, "benchmark", cudnn.benchmark)
        undo(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled():  # even False would import torch's compiler: seconds
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            undo(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(False)
        _set_reproducible_flags()
        yield


def _set_reproducible_flags(tf32: bool = False) -> None:
    """Deterministic algorithms of cuDNN, and fp32 that is not rounded to TF32 (unless `tf32`) or bf16."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cast(Any, torch.backends).mkldnn.conv.fp32_precision = "ieee"


_process_flags = SharedContext(_reproducible_flags)


@contextlib.contextmanager
def standard_torch_state() -> Iterator[None]:
    """Computes as in a fresh process, whatever the caller has switched on, and gives it back on exit; also a decorator.

    The caller may be inside `torch.autocast`, `no_grad`, `inference_mode` or a default device, and may have set a default
    dtype or a precision of products. A generator function cannot be decorated: its caller's code runs between its steps.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_process_flags)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_outside_autocast())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextlib.contextmanager
def _outside_autocast() -> Iterator[None]:
    """As outside of every `torch.autocast`.

    A context inside another would keep cast copies of the weights for as long as the outermost one, the caller's, lasts: no
    step would see the update of the one before.
    """
    depth = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    enabled = [kind for kind in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(kind)]
    if not depth and not enabled:
        yield
        return
    for kind in enabled:
        torch.set_autocast_enabled(kind, False)
    for _ in range(depth):
        torch.autocast_decrement_nesting()
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()
        for kind in enabled:
            torch.set_autocast_enabled(kind, True)


@contextlib.contextmanager
def preserve_settings() -> Iterator[None]:
    """`standard_torch_state` that also holds inside a run, whose settings (flags, threads, current GPU) are back on exit."""
    threads = torch.get_num_threads()
    current = torch.cuda.current_device() if torch.cuda.is_initialized() else 0  # type: ignore[no-untyped-call]
    try:
        with standard_torch_state(), _reproducible_flags():
            yield
    finally:
        torch.set_num_threads(threads)
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            # after some errors, which are reported, all that is asked of a GPU fails
            with contextlib.suppress(RuntimeError):
                torch.cuda.set_device(current)


@contextlib.contextmanager
def preserve_process_state() -> Iterator[None]:
    """The same for a run, which also sets torch's random generators."""
    state = torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with preserve_settings():
            yield
    finally:
        torch.set_rng_state(state)
        if mps is not None:
            torch.mps.set_rng_state(mps)
        if gpus:
            with contextlib.suppress(RuntimeError):  # as above
                torch.cuda.set_rng_state_all(gpus)


def _computes_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bf16 products rather than emulating them."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # torch checks the current device
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_flags())


def _computes_tf32(device: torch.device) -> bool:
    """Whether the device rounds products to TF32; elsewhere torch takes the switch and computes in fp32."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):  # torch checks the current device
        return bool(torch.cuda.is_tf32_supported())


def cpu_flags() -> frozenset[str]:
    """What Linux lists of the processor, its usable instructions among it; nothing elsewhere, where fp32 is the safe choice."""
    try:
        return frozenset(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return frozenset()


@contextlib.contextmanager
def eval_mode(*nets: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; the former mode is restored on exit."""
    before = [net.training for net in nets]
    for net in nets:
        net.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for net, training in zip(nets, before, strict=True):
            net.train(training)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device without waiting for a GPU's queue: CUDA copies from pinned memory asynchronously.

    MPS would copy later what is in the tensor's memory then, when another may have it (torch's issue 189690).
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=device.type == "cuda")


def environment(device: torch.device | None = None) -> dict[str, object]:
    """Versions and hardware, as written to every run folder; the GPU is `device`, or the current one."""
    from importlib.metadata import version

    from resnetlab import __version__

    gpu = device if device is not None and device.type == "cuda" else None
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "resnetlab": __version__,
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "numpy": version("numpy"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None,
    }
