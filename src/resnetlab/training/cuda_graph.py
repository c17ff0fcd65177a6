"""A training step captured once in a CUDA graph and replayed: for small networks launching kernels takes longer than they do.

The graph holds forward and backward of all micro-batches and their mean; of several processes only each one's sum, which it
exchanges after every replay. The update, a handful of kernels, stays outside, because its learning rate changes. The graph is
captured on blank images and negated weights, and used only if its replay on a step's own images is bit-identical to that step
without a graph. So a run and its resumption end bit-identically with and without a graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnetlab.device import release_memory
from resnetlab.errors import first_line
from resnetlab.graph_capture import Compute, Record, record_cuda_graph
from resnetlab.out_of_memory import is_out_of_memory
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.micro_batches import BatchNormStatistics, average_over_processes
from resnetlab.training.step import add_micro_batches, compute_gradients, set_means

TRIAL_SCALE = 2.0**8
MAX_DIFFERENCE = 0.01  # of a replayed step with exact=false, relative to the norm of each result


class _Recording(NamedTuple):
    micro_batches: list[Any]  # of tensors with fixed addresses, into which a step's images are copied
    replay: Compute


class GraphGradients:
    """`compute_gradients`, replayed from a CUDA graph if that is bit-identical.

    The first full step is recorded. A step with fewer images (some could not be read) launches its kernels; if there is no
    memory for it beside the graph's, the graph is given up. Of several processes one may replay a step that another computes:
    both exchange the same tensors in the same order.

    Args:
        report: called with a sentence on whether steps are replayed, once or when that changes.
        record: turns a function of tensors with fixed addresses into one that recomputes the same result tensors.
    """

    def __init__(self, report: Callable[[str], None], record: Record | None = None) -> None:
        self._report, self._record = report, record
        self._recording: _Recording | None = None
        self._tried = False

    def __call__(self, train_state: TrainState, micro_batches: Sequence[Any]) -> Sequence[Tensor]:
        share = train_state.recipe.batch // train_state.task.device_config.world.size
        full = sum(len(micro_batch[0]) for micro_batch in micro_batches) == share
        if full and not self._tried:
            self._tried = True
            device, nodes = train_state.task.device_config.device, list[int]()
            record = self._record or partial(
                record_cuda_graph, device=device, fail_on_sync=True, on_capture=nodes.append
            )
            with _low_loss_scale(train_state):
                self._recording, why = _record_step(train_state, micro_batches, record)
            held = f" of {nodes[0]:,} kernels, copies and fills" if any(nodes) else ""
            self._report(f"CUDA graph: {why or f'full steps are replayed from one recording{held}'}")
        if self._recording is None:
            return compute_gradients(train_state, micro_batches)
        if not full:
            return self._compute_beside_graph(train_state, micro_batches)
        train_state.state.replayed_steps += 1
        return _replay_step(train_state, self._recording, micro_batches)

    def _compute_beside_graph(self, train_state: TrainState, micro_batches: Sequence[Any]) -> Sequence[Tensor]:
        statistics = BatchNormStatistics(train_state.task.net)
        statistics.save()
        try:
            return compute_gradients(train_state, micro_batches)
        except RuntimeError as error:
            if not is_out_of_memory(error) or train_state.exchange is not None:  # which has sent a part of the step
                raise
        # the failed step's tensors are free only here
        self._recording = None
        statistics.rewind()
        train_state.optimizer.zero_grad()
        release_memory(train_state.task.device_config.device)
        self._report("CUDA graph: given up, since a step with fewer images does not fit into memory beside it")
        return compute_gradients(train_state, micro_batches)


def _record_step(
    train_state: TrainState, micro_batches: Sequence[Any], record: Record
) -> tuple[_Recording | None, str]:
    """A recording of the step, or None and the reason; network and statistics are left unchanged."""
    buffers = [type(micro_batch)(*map(torch.zeros_like, micro_batch)) for micro_batch in micro_batches]
    optimizer, statistics = train_state.optimizer, BatchNormStatistics(train_state.task.net)
    statistics.save()

    def compute() -> list[Tensor]:
        optimizer.zero_grad()  # gradients are written, not accumulated
        results = _compute_here(train_state, buffers, lambda _: None)
        optimizer.zero_grad()
        return results

    def run(function: Compute) -> list[Tensor]:
        train_state.seed_network(_first_number(train_state, micro_batches))
        results = [x.clone() for x in function()]
        if train_state.exchange is None:  # else they are among the results
            results += statistics.rewind()
        optimizer.zero_grad()
        return results

    direct = run(lambda: _compute_here(train_state, micro_batches, train_state.seed_network))
    try:
        with _negate_weights(list(optimizer.parameters.values())):
            replay = record(compute)
        statistics.rewind()
        _copy_tensors(buffers, micro_batches)
        replayed = run(replay)
    except RuntimeError as error:
        statistics.rewind()
        optimizer.zero_grad()
        return None, f"not used, since recording failed ({first_line(error)})"
    if len(direct) != 2 + len(optimizer.parameters) + len(statistics.averages):
        return None, "not used, since some weights get no gradient"
    agree = torch.equal if train_state.recipe.exact else is_close
    if len(replayed) != len(direct) or not all(map(agree, replayed, direct)):
        return None, "not used, since a replayed step differs from the step itself"
    return _Recording(buffers, replay), ""


def is_close(x: Tensor, y: Tensor) -> bool:
    """Whether two results differ by no more than kernels that add in another order, as with exact=false."""
    return bool(torch.linalg.vector_norm(x - y) <= MAX_DIFFERENCE * torch.linalg.vector_norm(y))


def _compute_here(train_state: TrainState, micro_batches: Sequence[Any], seed: Callable[[int], None]) -> list[Tensor]:
    """What a graph holds: `compute_gradients`; of several processes the sums of this one, with those of BN's averages."""
    if train_state.exchange is None:
        return compute_gradients(train_state, micro_batches, seed)
    return add_micro_batches(train_state, micro_batches, seed, None).total()


def _first_number(train_state: TrainState, micro_batches: Sequence[Any]) -> int:
    """The number of this process's first micro-batch, whose seed a whole replay has."""
    return train_state.task.device_config.world.rank * len(micro_batches)


@contextlib.contextmanager
def _low_loss_scale(train_state: TrainState) -> Iterator[None]:
    """Scales the loss of fp16 so little that the trial does not overflow: what is not a number equals nothing."""
    scale = train_state.loss_scale
    if scale is not None:
        scale.fill_(TRIAL_SCALE)
    yield
    if scale is not None:
        scale.fill_(train_state.state.loss_scale)


@contextlib.contextmanager
def _negate_weights(weights: list[Tensor]) -> Iterator[None]:
    """Negates the weights; restores them on exit. Detects a recording that uses a cached copy of them, as autocast's."""
    with torch.no_grad():
        torch._foreach_neg_(weights)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_neg_(weights)


def _copy_tensors(buffers: Sequence[Any], micro_batches: Sequence[Any]) -> None:
    for buffer, new in zip(buffers, micro_batches, strict=True):
        for x, y in zip(buffer, new, strict=True):
            x.copy_(y, non_blocking=True)


def _replay_step(train_state: TrainState, recording: _Recording, micro_batches: Sequence[Any]) -> list[Tensor]:
    _copy_tensors(recording.micro_batches, micro_batches)
    train_state.seed_network(_first_number(train_state, micro_batches))
    results, exchange = recording.replay(), train_state.exchange
    if exchange is None:
        train_state.optimizer.set_grads(results[2:])
        return [x.clone() for x in results[:2]]  # the next replay overwrites them
    end = 2 + len(train_state.optimizer.parameters)
    exchange.send(results[2:end], len(micro_batches))
    rest = [x.clone() for x in (*results[:2], *results[end:])]
    return set_means(
        train_state, average_over_processes(train_state.task.device_config.world, rest, len(micro_batches))
    )
