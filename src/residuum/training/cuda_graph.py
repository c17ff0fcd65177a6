"""A step's kernels recorded once into a CUDA graph, then replayed: for small networks launching them takes longer than they do.

Recorded is what a step computes, forward and backward of all its parts and their mean. The update, a handful of kernels, stays
outside: its learning rate is a number that changes. It is recorded on blank pictures and the weights' negatives, and used only
where, replayed on a step's own, it gives the bits of that step made kernel by kernel, so a run and its resumption come to the
same end with and without.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from residuum.training.checkpoint import Learner
from residuum.training.parts import Statistics
from residuum.training.step import Made, gradients, train_step, update

Compute = Callable[[], list[Tensor]]
Record = Callable[[Compute], Compute]
WARM = 3  # runs before the recording: libraries choose their algorithms and take their workspaces


class _Recording(NamedTuple):
    parts: list[Any]  # of tensors that stay where they are; a step's pictures are copied into them
    replay: Compute


class GraphStep:
    """`train_step`, replayed where that is the same.

    Args:
        say: told, once, whether the steps are replayed.
        record: from a function of tensors that stay where they are, one that computes the same anew into the same results.
    """

    def __init__(self, say: Callable[[str], None], record: Record | None = None) -> None:
        self._say, self._record = say, record
        self._recording: _Recording | None = None
        self._tried = False

    def __call__(self, learner: Learner, parts: Sequence[Any], lr: float) -> Made:
        if not self._tried:
            self._tried = True
            record = self._record or partial(on_cuda, device=learner.task.engine.device)
            self._recording, why = _recorded(learner, parts, record)
            self._say(f"CUDA graph: {why or 'every step is replayed from one recording'}")
        recording = self._recording
        if recording is None or _shapes(parts) != _shapes(recording.parts):  # unreadable pictures shorten a step
            return train_step(learner, parts, lr)
        return _replayed(learner, recording, parts, lr)


def on_cuda(compute: Compute, device: torch.device) -> Compute:
    """Records into a CUDA graph. Raises RuntimeError where something in it waits for the device, or memory is short."""
    with torch.cuda.device(device):  # cuda:1 is not the current one by itself, and a stream belongs to one device
        aside, own = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside), _waiting_refused():
            for _ in range(WARM):
                compute()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # The outer stream comes back where a recording is broken off, which torch.cuda.graph leaves its own one in; the
        # loader's threads may go on meanwhile.
        with torch.cuda.stream(own), torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):
            results = compute()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


@contextlib.contextmanager
def _waiting_refused() -> Iterator[None]:
    """Has what waits for the device fail: in a recording it would leave torch's allocators as in the middle of one."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # that it does not find all that waits yet
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _recorded(learner: Learner, parts: Sequence[Any], record: Record) -> tuple[_Recording | None, str]:
    """A recording of the step, or None and why not; network and statistics stay as they are."""
    own = [type(part)(*map(torch.zeros_like, part)) for part in parts]
    optimizer, statistics = learner.optimizer, Statistics(learner.task.net)
    statistics.hold()

    def compute() -> list[Tensor]:
        optimizer.forget()  # so that the gradients are written, not added to
        found = gradients(learner, own, lambda _: None)
        optimizer.forget()
        return found

    def made(function: Compute) -> list[Tensor]:
        learner.seed_network(0)
        found = [x.clone() for x in function()] + statistics.rewind()
        optimizer.forget()
        return found

    stepwise = made(lambda: gradients(learner, parts, learner.seed_network))
    try:
        with _negated(list(optimizer.parameters.values())):
            replay = record(compute)
        statistics.rewind()
        _fill(own, parts)
        replayed = made(replay)
    except RuntimeError as error:
        statistics.rewind()
        optimizer.forget()
        return None, f"not used, since recording failed ({str(error).strip().splitlines()[0]})"
    if len(stepwise) != 2 + len(optimizer.parameters) + len(statistics.averages):
        return None, "not used, since some weights get no gradient"
    if len(replayed) != len(stepwise) or not all(map(torch.equal, replayed, stepwise)):
        return None, "not used, since a replayed step differs from the step itself"
    return _Recording(own, replay), ""


@contextlib.contextmanager
def _negated(weights: list[Tensor]) -> Iterator[None]:
    """Other weights inside, the same bits after: a recording that keeps a copy of them, as of autocast's, is found out."""
    with torch.no_grad():
        torch._foreach_neg_(weights)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_neg_(weights)


def _shapes(parts: Sequence[Any]) -> list[torch.Size]:
    return [x.shape for part in parts for x in part]


def _fill(own: Sequence[Any], parts: Sequence[Any]) -> None:
    for kept, new in zip(own, parts, strict=True):
        for x, y in zip(kept, new, strict=True):
            x.copy_(y, non_blocking=True)


def _replayed(learner: Learner, recording: _Recording, parts: Sequence[Any], lr: float) -> Made:
    _fill(recording.parts, parts)
    learner.seed_network(0)
    found = recording.replay()
    learner.optimizer.receive(found[2:])
    return update(learner, [x.clone() for x in found[:2]], lr)  # the next replay writes over them
