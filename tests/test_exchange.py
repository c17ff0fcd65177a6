"""Gradients summed over processes: the bits of one process, whatever holds the micro-batches, and few bytes."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from process_groups import call_in_processes, sizes
from resnetlab.distributed import TreeSum, World
from resnetlab.training.exchange import ALIGNMENT, GradientExchange, WatchedGradients
from resnetlab.training.micro_batches import TreeMean, describe_sum_order
from tiny_runs import tiny

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


def make_net() -> nn.Sequential:
    """A network with parameters of odd sizes, in channels_last memory; one of them gets no gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 7, 3), nn.Flatten(), nn.Linear(7 * 16, 3))
    net.unused = nn.Parameter(torch.ones(3))
    return net.to(memory_format=torch.channels_last)


def loss_of(net: nn.Sequential, number: int) -> Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(number))
    return net(x.to(memory_format=torch.channels_last)).exp().sum()


def gradients_of_one_process(count: int) -> list[Tensor]:
    net, mean = make_net(), TreeMean(World())
    for number in range(count):
        loss_of(net, number).backward()
        mean.add([torch.zeros_like(p) if p.grad is None else p.grad for p in net.parameters()])
        net.zero_grad()
    return mean.result()


def exchange_gradients(world: World, count: int, options: Any = None) -> tuple[list[Tensor], list[int]]:
    """The mean gradients, and the sizes of the groups; the micro-batches come in another order in every process."""
    assert world.links is not None
    net, here = make_net(), count // world.size
    exchange = GradientExchange(list(net.parameters()), world, 400, **options or {})
    replica = make_net()
    collectors = [(net, exchange.own), (replica, WatchedGradients(exchange, list(replica.parameters())))]
    order = random.Random(world.rank).sample(range(here), here)
    for _ in range(2):  # a second step is like the first
        exchange.start(here)
        for number in order:
            used, collector = collectors[number % 2]
            loss = loss_of(used, world.rank * here + number)
            with collector.collecting(number):
                loss.backward()
            assert all(p.grad is None for p in used.parameters())
        gradients = exchange.result()
    assert len(exchange.buckets) > 1
    assert [g.stride() for g in gradients] == [p.stride() for p in net.parameters()]
    assert all(g.data_ptr() % (4 * ALIGNMENT) == 0 for g in gradients)
    return [g.contiguous().numpy().copy() for g in gradients], sizes(world.links.levels)


@pytest.mark.parametrize(
    ("processes", "machines", "count", "groups"),
    [(4, 2, 8, [2, 2]), (3, 3, 12, [3]), (6, 2, 12, [6]), (6, 3, 12, [2, 3])],
)
def test_the_bits_are_those_of_one_process(processes: int, machines: int, count: int, groups: list[int]) -> None:
    """With a process a machine, several, and three, which are no level of the tree and so are not summed before the others."""
    expected = gradients_of_one_process(count)
    for gradients, levels in call_in_processes(processes, lambda world: exchange_gradients(world, count), machines):
        assert levels == groups
        for ours, theirs in zip(gradients, expected, strict=True):
            assert torch.equal(torch.from_numpy(ours), theirs)


def test_the_order_in_which_terms_come_does_not_matter() -> None:
    """Twelve are eight and four."""
    terms = [torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    levels: Any = [torch.stack(terms[:8]), torch.stack(terms[8:])]
    while len(levels[0]) > 1:
        levels = [x[::2] + x[1::2] if len(x) > 1 else x for x in levels]
    for seed in range(5):
        total = TreeSum()
        for i in random.Random(seed).sample(range(12), 12):
            total.add(i, [terms[i].clone()])
        (found,) = total.total()
        assert torch.equal(found, (levels[0] + levels[1])[0])


def test_other_numbers_of_micro_batches_are_reported() -> None:
    assert describe_sum_order(tiny(), 3, World(0, 2)).endswith("since 3 micro-batches in each are no power of two")
    for values in ({"bn_sync": True}, {"grad_reduce": "all_reduce"}, {"grad_compression": "bf16"}):
        assert describe_sum_order(tiny(**values), 1, World(0, 2)) and not describe_sum_order(tiny(**values), 1, World())
    for count, size in ((3, 1), (4, 2), (1, 3), (2, 6)):
        assert not describe_sum_order(tiny(), count, World(0, size))


@pytest.mark.parametrize("reduce", ["tree", "all_reduce"])
@pytest.mark.parametrize("compression", ["none", "bf16"])
def test_other_sums_are_close_and_the_same_in_all_processes(reduce: str, compression: str) -> None:
    expected, options = gradients_of_one_process(8), {"reduce": reduce, "compression": compression}
    (first, _), *others = call_in_processes(4, lambda world: exchange_gradients(world, 8, options), machines=2)
    for gradients, _ in others:
        assert all(map(np.array_equal, gradients, first))
    for ours, theirs in zip(first, expected, strict=True):
        precision = 2**-7 * theirs.abs().max() if compression == "bf16" else 1e-5
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-5, atol=float(precision))
    exact = all(torch.equal(torch.from_numpy(a), b) for a, b in zip(first, expected, strict=True))
    assert exact == (compression == "none" and reduce == "tree")
