"""The backbone of a detector or segmenter, forward and backward replayed from CUDA graphs while batches keep one shape.

What comes after a detector's backbone has sizes that depend on values, so its whole step cannot be recorded as a classifier's
(`cuda_graph`).
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resnetlab.device import release_memory
from resnetlab.errors import first_line
from resnetlab.graph_capture import capturing
from resnetlab.training.cuda_graph import is_close
from resnetlab.training.micro_batches import BatchNormStatistics

SAME_SHAPE = 4  # batches in a row of one shape, after which it is taken for that of all

Forward = Callable[[Tensor], Any]


class _Unrecorded(nn.Module):
    """A backbone as it is without graphs, with its parameters, for torch to record."""

    def __init__(self, backbone: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.backbone, self.compute = backbone, forward

    def forward(self, x: Tensor) -> Any:
        return self.compute(x)


def make_graphed_callables(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """torch's, on the device of the inputs, and beside threads that pin memory, whose calls would end a global capture."""
    with capturing, torch.cuda.device(inputs[0].device):
        capture, stream = torch.cuda.graph, torch.cuda.Stream()  # type: ignore[no-untyped-call]
        settings = {"stream": stream, "capture_error_mode": "thread_local"}
        gc.collect()  # as in `record_cuda_graph`
        # not every version of it can be recognised
        torch.cuda.graph = lambda *args, **kwargs: capture(*args, **kwargs | settings)  # type: ignore[misc, assignment]
        try:
            return torch.cuda.make_graphed_callables(module, inputs)
        finally:
            torch.cuda.graph = capture  # type: ignore[misc]


class BackboneGraph:
    """The `forward` of a backbone in training, which replays CUDA graphs if that is bit-identical; elsewhere its own.

    It is recorded when SAME_SHAPE batches have had one shape, and given up when another one comes: a recording holds the memory
    of its activations.

    Args:
        exact: whether a replay that differs in its last bits is refused.
        report: called with a sentence, once or when that changes.
        make: records a module for an input, as `torch.cuda.make_graphed_callables`, which changes the module's `forward`.
    """

    def __init__(
        self,
        backbone: nn.Module,
        exact: bool,
        report: Callable[[str], None],
        make: Callable[[Any, tuple[Tensor, ...]], Any] | None = None,
    ) -> None:
        self._plain, self._exact, self._report = _Unrecorded(backbone, backbone.forward), exact, report
        self._make = make or make_graphed_callables
        self._parameters = [p for p in backbone.parameters() if p.requires_grad]
        self._hooks: list[Any] = []
        self._replay: Forward | None = None
        self._shape, self._in_a_row, self._open = torch.Size(), 0, True
        backbone.forward = self

    def __call__(self, x: Tensor) -> Any:
        if not self._open or not self._plain.backbone.training or not torch.is_grad_enabled():
            return self._plain.compute(x)
        self._in_a_row = self._in_a_row + 1 if x.shape == self._shape else 1
        self._shape = x.shape
        if self._replay is None and self._in_a_row == SAME_SHAPE:
            self._record(x)
        elif self._replay is not None and self._in_a_row == 1:
            self._give_up(x, "given up, since a batch has another size than those before")
        return (self._replay or self._plain.compute)(x)

    def _give_up(self, x: Tensor, why: str) -> None:
        self._replay, self._open = None, False
        vars(self._plain).pop("forward", None)  # torch's, which holds the graphs
        for hook in self._hooks:
            hook.remove()
        gc.collect()  # in some versions the graphs are part of a cycle
        release_memory(x.device)
        self._report(f"CUDA graph of the backbone: {why}")

    def _record(self, x: Tensor) -> None:
        """Sets the replay, if it gives the same maps, gradients and statistics for this input; these stay as they are."""
        statistics = BatchNormStatistics(self._plain.backbone)
        statistics.save()
        kind, agree = x.device.type, torch.equal if self._exact else is_close
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        try:
            # autocast would cast the weights once, and free what the graph reads when its context ends
            with torch.autocast(kind, dtype, enabled, cache_enabled=False):
                expected = self._compute(self._plain.compute, x) + statistics.rewind()
                replay = self._make(self._plain, (torch.zeros_like(x),))
                statistics.rewind()
                found = self._compute(replay, x) + statistics.rewind()
        except RuntimeError as error:
            statistics.rewind()
            reason = first_line(error)
            return self._give_up(x, f"not used, since recording failed ({reason})")
        if len(found) != len(expected) or not all(map(agree, found, expected)):
            return self._give_up(x, "not used, since a replay differs from the backbone itself")
        self._replay = replay
        # the next micro-batch overwrites what a replay gives
        self._hooks = [p.register_hook(torch.clone) for p in self._parameters]  # type: ignore[no-untyped-call]
        self._report("CUDA graph of the backbone: replayed for batches of one size")
        return None

    def _compute(self, forward: Forward, x: Tensor) -> list[Tensor]:
        """Copies of the maps, and of the gradients of half the sum of their squares."""
        maps = tree_leaves(forward(x))
        gradients = torch.autograd.grad(maps, self._parameters, [y.detach().clone() for y in maps])
        return [y.detach().clone() for y in (*maps, *gradients)]


def replay_backbone(net: nn.Module, exact: bool, report: Callable[[str], None]) -> None:
    """Lets the backbone of a network be replayed in training, if it has one of its own."""
    if isinstance(backbone := getattr(net, "backbone", None), nn.Module):
        BackboneGraph(backbone, exact, report)
