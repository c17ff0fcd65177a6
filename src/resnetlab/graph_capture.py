"""CUDA graphs: kernels captured once and launched together, where launching them takes longer than they do."""

from __future__ import annotations

import contextlib
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


def record_cuda_graph(compute: Compute, device: torch.device, pool: Any = None) -> Compute:
    """Captures a CUDA graph. Raises RuntimeError if something in it synchronises with the device, or memory runs out.

    Args:
        pool: memory that graphs share, none of which is replayed beside another.
    """
    with torch.cuda.device(device):  # cuda:1 is not the current device by default, and a stream belongs to one device
        side, own = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda.empty_cache()  # a stream has no use of memory that is cached for another: a step would take it twice
        with torch.cuda.stream(side), _fail_on_sync():
            for _ in range(WARMUP_RUNS):
                compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph leaves its own stream current when a capture fails; the outer context restores the former one.
        # "thread_local" lets the loader's threads continue during the capture.
        capture = torch.cuda.graph(graph, pool, stream=own, capture_error_mode="thread_local")
        with torch.cuda.stream(own), capture:
            results = compute()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


@contextlib.contextmanager
def _fail_on_sync() -> Iterator[None]:
    """Makes a synchronisation raise an error: during a capture it would leave torch's allocators in a broken state."""
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
    must not depend on anything that changes but its input. Each stream has graphs of its own, since two may run at once.
    """

    def __init__(self, function: Callable[[Tensor], Any], most: int, record: Record | None = None) -> None:
        """Captures at most `most` shapes, by `record` in place of `record_cuda_graph`."""
        self._function, self._most, self._record = function, most, record
        self._reset()

    def _reset(self) -> None:
        self._recordings, self._seen = dict[Any, _CapturedCall](), set[Any]()
        self._lock, self._given_up = threading.Lock(), False
        self._pools = dict[Any, Any]()  # of each stream, the memory that its graphs share

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
            pool = self._pools.setdefault(stream, torch.cuda.graph_pool_handle())
            record = partial(record_cuda_graph, device=x.device, pool=pool)
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
