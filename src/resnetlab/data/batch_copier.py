"""Copies batches to a GPU on a stream of its own, beside the kernels of the step before."""

from __future__ import annotations

from itertools import accumulate
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from resnetlab.device import to_device

ALIGNMENT = 512  # bytes, as torch's allocator aligns tensors

T = TypeVar("T")


class BatchCopier:
    """`to_device` for one batch after the other: a tensor, or tensors in tuples and lists.

    Two buffers take turns, each as large as the largest batch so far, so the host may be many steps ahead without more memory.
    What computes with a batch must be queued before the next call, since the call after that waits only for what was queued
    before. In the queue of the step before, the copy would begin only where that ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []
        self._before_last: torch.cuda.Event | None = None  # when all was done that came before the last call

    def __call__(self, batch: T) -> T:
        if self._stream is None:
            return cast(T, tree_map_only(Tensor, lambda x: to_device(x, self._device), batch))
        tensors, structure = tree_flatten(batch)
        *starts, size = accumulate((-(-x.nbytes // ALIGNMENT) * ALIGNMENT for x in tensors), initial=0)
        current = torch.cuda.current_stream(self._device)
        used, self._before_last = self._before_last, current.record_event()
        buffer = self._buffers.pop(0) if len(self._buffers) == 2 else None
        if buffer is None or used is None or len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._stream.wait_stream(current)  # whose kernels may still read what was in this memory
        else:
            self._stream.wait_event(used)
        copies = []
        with torch.cuda.stream(self._stream):
            for start, x in zip(starts, tensors, strict=True):
                copies.append(buffer[start : start + x.nbytes].view(x.dtype).view(x.shape))
                copies[-1].copy_(x.contiguous().pin_memory(), non_blocking=True)
        current.wait_stream(self._stream)
        self._buffers.append(buffer)
        return cast(T, tree_unflatten(copies, structure))
