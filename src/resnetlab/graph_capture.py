"""CUDA graphs: kernels captured once and launched together, where launching them takes longer than they do."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from resnetlab.errors import first_line, warn

Compute = Callable[[], list[Tensor]]
Record = Callable[[Compute], Compute]
WARMUP_RUNS = 3  # before the capture: libraries choose their algorithms and allocate their workspaces
MAX_SEEN = 1000  # shapes that are remembered until they come again
# one capture at a time in a process: it begins by waiting for all streams, which ends another
capturing = threading.Lock()


class GraphPool(NamedTuple):
    """Memory that graphs share, none of which is replayed beside another, and the stream that all of them are captured on:
    a stream's blocks are of no use to another's.
    """

    handle: Any
    stream: Any


def record_cuda_graph(
    compute: Compute,
    device: torch.device,
    pool: GraphPool | None = None,
    *,
    fail_on_sync: bool = False,
    on_capture: Callable[[int], None] | None = None,
) -> Compute:
    """Captures a CUDA graph. Raises RuntimeError if memory runs out.

    Args:
        pool: None for memory of its own.
        fail_on_sync: raise RuntimeError if something in it synchronises with the device, which would break torch's allocators
            during a capture. torch raises it in every thread of the process, so only where no other one uses the device.
        on_capture: called with the number of kernels, copies and fills in the graph, if torch and the driver tell it.
    """
    # cuda:1 is not the current device by default, and a stream belongs to one device
    with capturing, torch.cuda.device(device):
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        memory, own = pool or (None, torch.cuda.Stream())  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        gc.collect()  # a graph of an earlier run that is freed during a capture would end it
        torch.cuda.empty_cache()  # a stream has no use of memory that is cached for another: a step would take it twice
        with torch.cuda.stream(side), _fail_on_sync() if fail_on_sync else contextlib.nullcontext():
            for _ in range(WARMUP_RUNS):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        if on_capture is not None and hasattr(graph, "register_capture_end_hook"):  # torch 2.15 has it, 2.11 may not
            graph.register_capture_end_hook(lambda captured: on_capture(_count_nodes(captured)))
        # torch.cuda.graph leaves its own stream current when a capture fails; the outer context restores the former one.
        # "thread_local" lets the loader's threads continue during the capture.
        capture = torch.cuda.graph(graph, memory, stream=own, capture_error_mode="thread_local")
        with torch.cuda.stream(own), capture:
            results = compute()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def _count_nodes(graph: Any) -> int:
    """How many kernels, copies and fills a captured graph holds; 0 where the driver does not tell."""
    count = ctypes.c_size_t()
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        failed = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    except (OSError, AttributeError, RuntimeError):
        return 0
    return 0 if failed else count.value


@contextlib.contextmanager
def _fail_on_sync() -> Iterator[None]:
    """Makes a synchronisation raise an error, in all threads."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # torch warns that it does not detect every synchronisation
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


class _CapturedCall(NamedTuple):
    """A captured call: the input that it reads, and the form of its results."""

    x: Tensor
    replay: Compute
    structure: TreeSpec


class GraphedFunction:
    """A function of one tensor for inference on a GPU, replayed from a CUDA graph for every shape that comes again.

    A shape is captured when it comes the second time, on blank input, and only used if its replay is bit-identical to the
    function itself; otherwise, or without memory, the function is called as before, and a warning says so. The function
    must not depend on anything that changes but its input, nor wait for the device. Each stream has graphs of its own, since
    two may run at once.
    """

    def __init__(self, function: Callable[[Tensor], Any], most: int, record: Record | None = None) -> None:
        """Captures at most `most` shapes, by `record` in place of `record_cuda_graph`."""
        self._function, self._most, self._record = function, most, record
        self._reset()

    def _reset(self) -> None:
        self._recordings, self._seen = dict[Any, _CapturedCall](), set[Any]()
        self._lock, self._given_up = threading.Lock(), False
        self._pools = dict[Any, GraphPool]()  # of each stream

    def __getstate__(self) -> dict[str, Any]:
        """Without what was captured, which belongs to the process."""
        return {name: getattr(self, name) for name in ("_function", "_most", "_record")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __call__(self, x: Tensor) -> Any:
        if self._given_up or torch.is_grad_enabled() or torch._C._get_tracing_state() is not None:
            return self._function(x)
        with self._lock:
            kind = x.device.type
            stream = torch.cuda.current_stream(x.device) if kind == "cuda" else None
            autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
            key = (stream, x.shape, x.stride(), x.dtype, autocast)
            if key not in self._recordings:
                if key not in self._seen or len(self._recordings) == self._most:
                    if len(self._seen) < MAX_SEEN:
                        self._seen.add(key)
                    return self._function(x)
                try:
                    self._recordings[key] = self._capture(x, stream)
                except RuntimeError as error:
                    self._reset()
                    self._given_up = True
                    reason = first_line(error)
                    warn(f"CUDA graph: not used for predictions ({reason}).")
                    return self._function(x)
            recording = self._recordings[key]
            recording.x.copy_(x, non_blocking=True)
            results = [y.clone() for y in recording.replay()]  # the next replay overwrites them
            return tree_unflatten(results, recording.structure)

    def _capture(self, x: Tensor, stream: Any) -> _CapturedCall:
        """The call recorded; raises RuntimeError if that fails, or a replay differs."""
        record = self._record
        if record is None:
            if stream not in self._pools:
                own = torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
                self._pools[stream] = GraphPool(torch.cuda.graph_pool_handle(), own)
            record = partial(record_cuda_graph, device=x.device, pool=self._pools[stream])
        with torch.inference_mode(False), torch.no_grad():  # an input that later calls may write into in any mode
            blank, kind = torch.zeros_like(x), x.device.type
        expected, structure = tree_flatten(self._function(x))

        def compute() -> list[Tensor]:
            # autocast would cast the weights once, and free what the graph reads when its context ends
            enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
            with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                return tree_flatten(self._function(blank))[0]

        replay = record(compute)
        blank.copy_(x)
        if not all(map(torch.equal, replay(), expected)):
            raise RuntimeError("a replay differs from the network itself")
        return _CapturedCall(blank, replay, structure)
