"""A GPU that is simulated: tensors on "cuda" compute on the CPU, and everything that a GPU would refuse or wait for shows.

Tensors of `torch.device("cuda", 0)` are `GPUTensor`s, whose values are those of a CPU tensor. `SimulatedGPU`, a dispatch mode,
sees every operation: it refuses tensors of two devices in one, and lists what makes the host wait for the device's queue. It
cannot show CUDA's own kernels, streams, memory and speed. As MPS it refuses what that lacks: float64, pinned memory, and a copy
from the CPU that is not waited for.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from resnetlab import device as device_module
from resnetlab import graph_capture
from resnetlab.data import decode

GPU, MPS, CPU = torch.device("cuda", 0), torch.device("mps", 0), torch.device("cpu")
# operations whose result the host reads, or whose output's size depends on values
WAITING = {
    *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2", "unique_dim", "bincount"),
    *("unique_consecutive", "allclose", "nms", "_linalg_check_errors", "histc"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class GPUTensor(torch.Tensor):
    """A tensor on the simulated GPU; `values` is the CPU tensor whose memory it has."""

    values: Tensor
    place: ClassVar[torch.device] = GPU

    @staticmethod
    def __new__(cls, values: Tensor) -> GPUTensor:
        tensor = torch.Tensor._make_subclass(cls, values, False, device_for_backend_keys=cls.place)
        tensor.values = values
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return self.place

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """torch's, which takes the tensor for one on the CPU."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        known = {key: value for key, value in kwargs.items() if key != "copy"}
        device, dtype, _, _ = torch._C._nn._parse_to(*(() if args[:1] == (None,) else args), **known)
        if device is None or device.type == self.place.type:
            return super().to(*args, **kwargs)
        SimulatedGPU.current().wait("copy to the CPU")
        return self.values.detach().to(dtype=dtype, copy=True)

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.to("cpu")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return SimulatedGPU.current().run(function, args, kwargs or {})

    def record_stream(self, stream: Any) -> None:
        SimulatedGPU.current().recorded.setdefault(self.values.untyped_storage().data_ptr(), set()).add(stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            new = self.detach().clone().requires_grad_(self.requires_grad)
            memo[id(self)] = (
                torch.nn.Parameter(new, self.requires_grad) if isinstance(self, torch.nn.Parameter) else new
            )
        return memo[id(self)]


class SimulatedStream:
    """A queue of the GPU: how far it is itself, and how far it knows the others to be."""

    default: ClassVar[SimulatedStream]
    ended: ClassVar[dict[SimulatedStream, int]]  # how far the host has waited for each
    here: ClassVar[threading.local]  # of each thread, its current stream as `stream`

    def __init__(self, device: torch.device = GPU) -> None:
        self.device, self.count, self.known = device, 0, dict[SimulatedStream, int]()

    @staticmethod
    def current(_: object = None) -> SimulatedStream:
        return getattr(SimulatedStream.here, "stream", SimulatedStream.default)

    @staticmethod
    def set_current(stream: SimulatedStream) -> None:
        SimulatedStream.here.stream = stream

    @staticmethod
    @contextlib.contextmanager
    def use(stream: SimulatedStream) -> Iterator[None]:
        before = SimulatedStream.current()
        SimulatedStream.set_current(stream)
        yield
        SimulatedStream.set_current(before)

    def record_event(self) -> dict[SimulatedStream, int]:
        return self.known | {self: self.count}

    def wait_event(self, event: dict[SimulatedStream, int]) -> None:
        self.known |= {stream: max(count, self.known.get(stream, 0)) for stream, count in event.items()}

    def wait_stream(self, other: SimulatedStream) -> None:
        self.wait_event(other.record_event())

    def is_behind(self, uses: dict[SimulatedStream, int]) -> bool:
        """Whether another stream has yet to make these uses of a tensor, for all that this one knows."""
        return any(stream is not self and self.known.get(stream, 0) < count for stream, count in uses.items())


class SimulatedGPU(TorchDispatchMode):
    """Runs operations on GPU tensors; refuses one that overtakes another stream's write, or read before a write.

    Attributes:
        waits: "operation at file:function" of everything that made the host wait.
        names: the operations on the GPU, in order.
        reused: operations of streams that may still read or write memory which its own stream has for another use, because
            it neither waited for them nor was marked by `record_stream`.
        float64: "operation in module.function" of those with such a result, which MPS could not compute.
    """

    _active: ClassVar[list[SimulatedGPU]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.names: list[str] = []
        self.float64: set[str] = set()
        self.reused: list[str] = []
        self.recorded: dict[int, set[Any]] = {}  # by the address of the memory
        self._home: dict[int, SimulatedStream] = {}  # by the address of the memory, the stream whose memory it is
        self._written: dict[int, dict[SimulatedStream, int]] = {}  # by the address of the memory
        self._read: dict[int, dict[SimulatedStream, int]] = {}

    @staticmethod
    def current() -> SimulatedGPU:
        return SimulatedGPU._active[-1]

    def __enter__(self) -> Any:
        SimulatedGPU._active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        SimulatedGPU._active.pop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Runs an operation where its tensors are."""
        if function is torch.ops.prim.device.default:
            return GPUTensor.place if isinstance(args[0], GPUTensor) else CPU
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        on_gpu = [x for x in tensors if isinstance(x, GPUTensor)]
        device = kwargs.get("device") or next((x for x in args if isinstance(x, torch.device)), None)
        if not on_gpu and (device is None or device.type != GPUTensor.place.type):
            return function(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode composite operations arrive whole
                return function.decompose(*args, **kwargs)
        name = function.__name__.split(".")[0]
        self.names.append(name)
        self._check(name, args, kwargs, tensors)
        wrappers = {id(x.values): x for x in on_gpu}
        plain_args, plain_kwargs = tree_map_only(GPUTensor, lambda x: x.values, (args, kwargs))
        if device is not None:
            plain_kwargs["device"] = CPU
        result = function(*plain_args, **plain_kwargs)
        if any(x.dtype == torch.float64 for x in tree_flatten(result)[0] if isinstance(x, Tensor)):
            self.float64.add(f"{name} in {_caller()}")
            if GPUTensor.place is MPS:
                raise TypeError(f"{name} in {_caller()}: the MPS framework doesn't support float64")
        self._order(name, on_gpu, [x for x in tree_flatten(result)[0] if isinstance(x, Tensor)])
        if name == "_local_scalar_dense":
            return result
        return tree_map_only(Tensor, lambda x: wrappers[id(x)] if id(x) in wrappers else GPUTensor(x), result)

    def _order(self, name: str, inputs: list[GPUTensor], outputs: list[Tensor]) -> None:
        """Notes the stream of an operation's reads and writes; raises RuntimeError if it overtakes another stream."""
        stream = SimulatedStream.current()
        stream.count += 1
        read = {x.values.untyped_storage().data_ptr() for x in inputs}
        written = {x.untyped_storage().data_ptr() for x in outputs} - read  # a view writes nothing
        if name.endswith("_"):
            written |= read
        for memory in read & self._written.keys():
            if stream.is_behind(self._written[memory]) or (
                memory in written and stream.is_behind(self._read.get(memory, {}))
            ):
                raise RuntimeError(f"{name} overtakes another stream in {_caller()}")
        for memory in written:
            self._written[memory], self._read[memory] = {stream: stream.count}, {}
        for memory in read:
            self._read.setdefault(memory, {})[stream] = stream.count
        for x in outputs:
            storage = x.untyped_storage()
            if storage.data_ptr() not in {0, *read, *self._home}:
                self._home[storage.data_ptr()] = stream
                weakref.finalize(storage, self._free, storage.data_ptr(), name).atexit = False

    def _free(self, memory: int, name: str) -> None:
        """What torch's allocator does with memory that nobody refers to: its stream may have it again at once."""
        home, recorded = self._home.pop(memory), self.recorded.pop(memory, set())
        uses, ended = self._written.pop(memory, {}) | self._read.pop(memory, {}), SimulatedStream.ended
        pending = {s: count for s, count in uses.items() if s not in recorded and count > ended.get(s, 0)}
        if home.is_behind(pending):
            self.reused.append(name)

    def _check(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Lists a wait of the host; raises RuntimeError for tensors of two devices."""
        on_cpu = [x for x in tensors if not isinstance(x, GPUTensor)]
        if name in ("_to_copy", "copy_"):
            source = args[-2 if name == "copy_" and len(args) > 2 else -1]
            into_cpu = name == "copy_" and not isinstance(args[0], GPUTensor)
            asynchronous = kwargs.get("non_blocking", len(args) > 2 and args[2]) and hasattr(source, "pinned")
            if on_cpu and GPUTensor.place is MPS and kwargs.get("non_blocking"):
                raise RuntimeError(f"a copy that reads memory which may be gone, in {_caller()}")
            if into_cpu or (on_cpu and not asynchronous):
                self.wait(f"copy {'to' if into_cpu else 'from'} the CPU")
            return
        if name in WAITING or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.wait(name)
        for index in args[1] if name in INDEXING else ():
            if index is not None and (index.dtype == torch.bool or not isinstance(index, GPUTensor)):
                self.wait(f"index by {'a mask' if index.dtype == torch.bool else 'indices on the CPU'}")
                on_cpu = [x for x in on_cpu if x is not index]
        if any(x.ndim and x.numel() for x in on_cpu):  # autograd's empty gradients are the simulation's
            shapes = [tuple(x.shape) for x in on_cpu]
            raise RuntimeError(f"{name}: expected all tensors on one device; on the CPU are {shapes} in {_caller()}")

    def wait(self, what: str) -> None:
        """Lists a wait of the host for what its thread's stream has queued."""
        here, ended = SimulatedStream.current(), SimulatedStream.ended
        for stream, count in here.record_event().items():
            ended[stream] = max(count, ended.get(stream, 0))
        self.waits.append(f"{what} in {_caller()}")


def _caller() -> str:
    """The innermost function of resnetlab or torchvision that is running, as "module.function"."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.split(".")[0] in ("resnetlab", "torchvision") and not name.startswith("<"):
            return f"{module}.{name}"
        frame = frame.f_back
    return "the test"


def _simulate_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    device_module._side_streams.cache_clear()
    decode._decoding_stream.cache_clear()
    monkeypatch.setattr(torch.cuda, "Stream", SimulatedStream)
    monkeypatch.setattr(torch.cuda, "stream", SimulatedStream.use)
    monkeypatch.setattr(torch.cuda, "set_stream", SimulatedStream.set_current)
    monkeypatch.setattr(torch.cuda, "current_stream", SimulatedStream.current)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(device_module, "_computes_bf16", lambda _: True)
    monkeypatch.setattr(device_module, "_computes_tf32", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


@contextlib.contextmanager
def simulated_gpu(monkeypatch: pytest.MonkeyPatch, place: torch.device = GPU) -> Iterator[SimulatedGPU]:
    """One simulated GPU, which computes bf16, or MPS."""
    gpu = SimulatedGPU()

    def pin(x: Tensor) -> Tensor:
        assert place is GPU, "memory is pinned for CUDA alone"
        pinned: Any = x.view_as(x)
        pinned.pinned = True
        return pinned

    class Executor(ThreadPoolExecutor):
        """Threads that have the simulated GPU too, since a dispatch mode belongs to a thread."""

        def __init__(self, threads: int, initializer: Any = lambda: None) -> None:
            super().__init__(threads, initializer=lambda: (enter_thread(), initializer()))

    def enter_thread() -> None:
        TorchDispatchMode.__enter__(gpu)
        torch._C._set_only_lift_cpu_tensors(True)

    SimulatedStream.default, SimulatedStream.here, SimulatedStream.ended = SimulatedStream(), threading.local(), {}
    monkeypatch.setattr(GPUTensor, "place", place)
    monkeypatch.setattr(device_module, "ThreadPoolExecutor", Executor)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    monkeypatch.setattr(
        torch.nn.functional, "one_hot", lambda x, n: (x[..., None] == torch.arange(n, device=x.device)).long()
    )
    if place is GPU:
        _simulate_cuda(monkeypatch)
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the CPU, then copied
    try:
        with torch.backends.cudnn.flags(enabled=False), gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


def record_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Lets what would be captured in a CUDA graph of predictions be computed; returns the list of the devices asked for."""
    recorded: list[torch.device] = []

    def record(compute: Any, device: torch.device, pool: object) -> Any:
        recorded.append(device)
        return compute

    monkeypatch.setattr(graph_capture, "record_cuda_graph", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    return recorded
