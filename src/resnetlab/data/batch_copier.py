"""Copies batches to a GPU on a stream of its own, beside the kernels of the step before."""

from __future__ import annotations

import torch
from torch import Tensor

from resnetlab.device import to_device


class BatchCopier:
    """`to_device` for one batch after the other.

    Two buffers take turns, so the host may be many steps ahead without more memory; what a call returns holds until the next
    call but one. In the queue of the step before, the copy would begin only where that ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: list[Tensor] = []
        self._before_last: torch.cuda.Event | None = None  # when all was done that came before the last call

    def __call__(self, x: Tensor) -> Tensor:
        if self._stream is None:
            return to_device(x, self._device)
        current = torch.cuda.current_stream(self._device)
        used, self._before_last = self._before_last, current.record_event()
        buffer = self._buffers.pop(0) if len(self._buffers) == 2 else None
        if buffer is None or used is None or (buffer.shape, buffer.dtype) != (x.shape, x.dtype):
            buffer = torch.empty(x.shape, dtype=x.dtype, device=self._device)
            self._stream.wait_stream(current)  # whose kernels may still read what was in this memory
        else:
            self._stream.wait_event(used)
        with torch.cuda.stream(self._stream):
            buffer.copy_(x.pin_memory(), non_blocking=True)
        current.wait_stream(self._stream)
        self._buffers.append(buffer)
        return buffer
