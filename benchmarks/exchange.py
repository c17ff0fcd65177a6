#!/usr/bin/env python3
"""Gradients between machines: bytes out of each link, and the time of a training step beside DistributedDataParallel's.

    python benchmarks/exchange.py [--bits-per-second 1e9] [--microseconds 1000] [--image-size 64] [--batch 8] [--steps 4]

Machines are network namespaces of this one, joined by a switch in user space (relay.c, compiled with cc) with that rate and
delay; their addresses exist inside them alone. It needs Linux and root. The first part sums 25.6 million floats in two machines
of four processes, at no rate, and checks the bits; the second trains ResNet-50 in four machines of one process each, a step of
ours and a step of torch's DistributedDataParallel (gloo) in turn, with the same optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from resnetlab.distributed import TreeSum, World, join_process_group
from resnetlab.models.resnet import build
from resnetlab.training.exchange import GradientExchange

FLOATS = 25_600_000
BUCKETS = 4
PREFIX = f"exchange{os.getpid()}-"


@contextlib.contextmanager
def machines(count: int, bits_per_second: float, microseconds: float) -> Iterator[list[str]]:
    """The names of network namespaces that a switch joins."""
    names = [f"{PREFIX}{i}" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        relay = Path(folder, "relay")
        subprocess.run(["cc", "-O2", "-o", str(relay), str(Path(__file__).with_name("relay.c"))], check=True)
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=True)
        command = [str(relay), str(count), str(bits_per_second), str(microseconds), PREFIX]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        yield names


def run_processes(names: list[str], here: int, part: str, options: argparse.Namespace) -> dict[str, Any]:
    """What the first of `here` processes in each namespace prints."""
    processes: list[subprocess.Popen[str]] = []
    for rank in range(here * len(names)):
        places = {"RANK": rank, "WORLD_SIZE": here * len(names), "LOCAL_RANK": rank % here, "LOCAL_WORLD_SIZE": here}
        network = {
            "MASTER_ADDR": "10.99.0.1",
            "MASTER_PORT": 29500,
            "GLOO_SOCKET_IFNAME": "link0",
            "OMP_NUM_THREADS": 1,
        }
        environment = os.environ | {key: str(value) for key, value in (places | network).items()}
        given = [
            part,
            "--image-size",
            str(options.image_size),
            "--batch",
            str(options.batch),
            "--steps",
            str(options.steps),
        ]
        command = ["ip", "netns", "exec", names[rank // here], sys.executable, __file__, "--part", *given]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    try:
        outputs = [process.communicate()[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), outputs
    return dict(json.loads(outputs[0]))


def bytes_out() -> int:
    """Bytes that this machine has sent through its link."""
    return int(Path("/sys/class/net/link0/statistics/tx_bytes").read_text())


def make_terms(rank: int) -> torch.Tensor:
    return torch.randn(FLOATS, generator=torch.Generator().manual_seed(rank))


def measure_bytes(world: World, _: argparse.Namespace) -> dict[str, Any]:
    """Bytes out of this machine's link for one sum, of ours and of gloo's all_reduce."""
    found: dict[str, Any] = {}
    for method in ("tree", "all_reduce"):
        x = make_terms(world.rank)
        world.tree_all_reduce_(torch.ones(1000))  # connects
        torch.distributed.all_reduce(torch.ones(10_000_000)) if method == "all_reduce" else None
        world.all_reduce_max(0)
        before, start = bytes_out(), time.perf_counter()
        pending = [world.start_all_reduce_(part, in_tree=method == "tree") for part in x.chunk(BUCKETS)]
        for each in pending:
            each.wait()
        world.all_reduce_max(0)
        found[f"{method}_seconds"] = round(time.perf_counter() - start, 2)
        found[f"{method}_bytes"] = bytes_out() - before
        if method == "tree" and world.is_first:
            total = TreeSum()
            for rank in range(world.size):
                total.add(rank, [make_terms(rank)])
            found["bits_as_one_process"] = torch.equal(x, total.total()[0])
        world.all_reduce_max(0)
    return found


def measure_steps(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step of ours and of DistributedDataParallel's, in turn."""
    nets: list[nn.Module] = [
        build("resnet50", classes=1000, seed=0).to(memory_format=torch.channels_last) for _ in "ab"
    ]
    distributed = nn.parallel.DistributedDataParallel(nets[1], broadcast_buffers=False)
    parameters = list(nets[0].parameters())
    exchange = GradientExchange(parameters, world)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, foreach=True) for net in nets]
    x = torch.randn(options.batch, 3, options.image_size, options.image_size).to(memory_format=torch.channels_last)
    labels = torch.arange(options.batch)

    def step_ours() -> None:
        exchange.start(1)
        loss = F.cross_entropy(nets[0](x), labels)
        with exchange.own.collecting(0):
            loss.backward()
        for p, gradient in zip(parameters, exchange.result(), strict=True):
            p.grad = gradient
        optimizers[0].step()
        optimizers[0].zero_grad()

    def step_ddp() -> None:
        F.cross_entropy(distributed(x), labels).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()

    def step_alone() -> None:
        F.cross_entropy(nets[0](x), labels).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    seconds: dict[str, list[float]] = {"ours": [], "ddp": [], "without_exchange": []}
    for number in range(options.steps + 2):
        for name, step in (("ours", step_ours), ("ddp", step_ddp), ("without_exchange", step_alone)):
            world.all_reduce_max(0)
            start = time.perf_counter()
            step()
            world.all_reduce_max(0)
            if number > 1:  # the first ones connect, and DDP makes its buckets anew
                seconds[name].append(time.perf_counter() - start)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    return medians | {"ours_over_ddp": round(medians["ours"] / medians["ddp"], 3), "all": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits-per-second", type=float, default=1e9)
    parser.add_argument("--microseconds", type=float, default=1000.0, help="delay between two machines")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="images in each process")
    parser.add_argument("--steps", type=int, default=4, help="that are measured, of each kind")
    parser.add_argument("--part", choices=("bytes", "steps"), help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("bytes", "steps"), help="one of the two parts")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the namespaces are removed
    if options.part:
        torch.set_num_threads(1)
        with join_process_group() as world:
            print(json.dumps((measure_bytes if options.part == "bytes" else measure_steps)(world, options)))
        return
    if options.only != "steps":
        with machines(2, 0, 0) as names:
            print("2 machines of 4 processes:", json.dumps(run_processes(names, 4, "bytes", options)), flush=True)
    if options.only != "bytes":
        with machines(4, options.bits_per_second, options.microseconds) as names:
            print("4 machines of 1 process:", json.dumps(run_processes(names, 1, "steps", options)))


if __name__ == "__main__":
    main()
