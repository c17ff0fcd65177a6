"""Lack of memory: the errors that mean it, and batches that are computed in parts where they do not fit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from resnetlab.device import release_memory
from resnetlab.errors import warn

_OUT_OF_MEMORY = (  # messages of torch, oneDNN and the C++ library; of cuBLAS and cuDNN
    *("can't allocate memory", "out of memory", "could not create a ", "bad allocation", "bad_alloc"),
    "_STATUS_ALLOC_FAILED",
)
# what torch says if no cuDNN algorithm finds workspace, and also if cuDNN has none for a convolution at all
_NO_ALGORITHM = "unable to find an engine to execute"
FULL_GPU = 0.1  # less than this share of a GPU's memory is free: such an error is for lack of it


def is_out_of_memory(error: BaseException, gpu: torch.device | None = None) -> bool:
    """Whether an error means that memory has run out, on this GPU or the current one; torch has several messages for it."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and (any(word in str(error) for word in _OUT_OF_MEMORY) or (_NO_ALGORITHM in str(error) and _is_gpu_full(gpu)))
    )


def _is_gpu_full(gpu: torch.device | None) -> bool:
    """Whether the memory of a GPU, or of the current one, is nearly used up; to be called before the failed step's tensors are
    freed.
    """
    free, total = torch.cuda.mem_get_info(gpu)
    cached = torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)
    return free + cached < FULL_GPU * total


def compute_in_parts(compute: Callable[[Tensor], Tensor], batch: Tensor, device: torch.device) -> Tensor:
    """compute(batch), a row for each of the batch's; where that does not fit into the device's memory, part after part.

    A part is half as large whenever one does not fit. Raises the error if not even one row does.
    """
    rows: list[Tensor] = []
    start, size = 0, max(1, len(batch))
    while not rows or start < len(batch):
        try:
            rows.append(compute(batch[start : start + size]))
            start += size
            continue
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error, device):
                raise
        # what the error held is free only here
        release_memory(device)
        size = -(-size // 2)
        warn("a batch does not fit into memory and is computed in parts; scores may differ in their last bits.")
    return rows[0] if len(rows) == 1 else torch.cat(rows)
