#!/usr/bin/env python3
"""Images per second of a training step: ResNetLab and its alternatives.

    python benchmarks/train.py [--nets resnet20,resnet56,resnet110,resnet18,resnet50] [--contestants …] [--rounds 5] [--busy 1]

Every contestant trains the same network on the same images in a process of its own (so that none benefits from the process
settings of another), and only one runs at a time: the processes take turns, some steps each, in every round.

* eager fp32: NCHW, without TF32, torch.optim.SGD; a CIFAR ResNet as public repositories write it or torchvision's at 224.
* eager bf16: the same in channels_last under bf16 autocast (at 224 torchvision's).
* timm: timm's ResNet in channels_last under bf16 autocast (at 224).
* compiled: eager bf16 under torch.compile.
* resnetlab: `resnetlab train`'s own task and step, from uint8 images in memory through its augmentation to updated weights, as
  in a run of the recipe's length: on most CPUs with compiled kernels. The others are given normalised floats at no cost.
* resnetlab torch kernels: the same with `--set winograd=off --set fused_bn=off`.
* resnetlab fused BN: the same with `--set winograd=off --set fused_bn=on`.
* resnetlab two micro-batches: as a long run, in two micro-batches, so that two threads have one each (paper-cifar has two).
* resnetlab in turn: torch's kernels with all threads inside operations, as up to version 0.1.
* resnetlab compiled: the same under torch.compile, as runs of the papers' length on small images are made on a CPU, and any
  with `--compile on` (at 32 on a CPU, at both on a GPU).

With `--busy 1` another process computes beside all of them without pause (`neighbour.py`).

A contestant that this machine cannot run (timm is not installed, there is no compiler) is left out, and the reason printed;
so are the peers' bf16 forms on a CPU that would only imitate it, where ResNetLab computes in fp32.

Printed: medians over the rounds, the ratio to eager fp32 round by round (lowest to highest), and the share of the peak that the
largest matrix product reaches on this machine in the precision used, counting 6 operations for each multiply-add.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import resnetlab
from neighbour import busy_neighbours
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import MemorySplit
from resnetlab.data.sampler import TrainLoader
from resnetlab.device import environment, select_device
from resnetlab.models.cost import compute_cost
from resnetlab.models.spec import get_specification
from resnetlab.preprocessing import Preprocessing
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.gradients import select_gradients
from resnetlab.training.recipes import find_classification_recipe
from resnetlab.training.side_by_side import choose_kernels, divide_threads
from resnetlab.training.step import train_step
from resnetlab.training.tasks.classification import ClassificationTask
from train_cifar import plain_resnet

Step = Callable[[], object]
BATCHES = {32: 128, 224: 32}  # by the side of the images, on a CPU
CONTESTANTS = (
    *("eager fp32", "eager bf16", "timm", "compiled", "resnetlab", "resnetlab torch kernels", "resnetlab fused BN"),
    *("resnetlab two micro-batches", "resnetlab in turn", "resnetlab compiled"),
)


def side(net: str) -> int:
    """The side of the images that a network is made for."""
    return 224 if net in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152") else 32


def our_name(net: str) -> str:
    """What torchvision and timm, and here --nets, call by that name."""
    return net if side(net) == 32 or net in ("resnet18", "resnet34") else f"{net}v1.5"


def published(contestant: str, net: str) -> nn.Module:
    """The network as others write it, 10 classes."""
    if side(net) == 32:
        return plain_resnet(int(net.removeprefix("resnet")))
    if contestant == "timm":
        import timm

        return timm.create_model(net, num_classes=10)
    import torchvision

    return torchvision.models.get_model(net, num_classes=10)


def peer(contestant: str, net: str, batch: int, device: torch.device) -> Step:
    """One step of a loop that a person would write around a published network."""
    fast = contestant != "eager fp32"
    torch.backends.cudnn.allow_tf32 = fast  # cuDNN's default would make fp32 TF32 on a GPU
    model = published(contestant, net).to(device).train()
    x = torch.randn(batch, 3, side(net), side(net), device=device)
    y = torch.randint(10, (batch,), device=device)
    if fast:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    forward: Any = torch.compile(model) if contestant == "compiled" else model

    def step() -> None:
        sgd.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=fast):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        sgd.step()

    return step


def make_task(net: str, batch: int, device: torch.device, form: str, images: int) -> ClassificationTask:
    """The task of `resnetlab train` on so many uint8 images in memory."""
    size, compiled, exact = side(net), form == "compiled", form != "exact off"
    graph = device.type == "cuda" and form not in ("compiled", "eager")  # as a run picks by itself, or with --compile
    device_config = replace(
        select_device(device=device.type, training=True, exact=exact), compiled=compiled, cuda_graph=graph
    )
    chosen = find_classification_recipe("paper-cifar" if size == 32 else "photos")
    op_threads = device_config.threads if form == "in turn" else 0
    if form in ("torch kernels", "in turn", "fused BN"):
        chosen = replace(chosen, winograd="off", fused_bn="on" if form == "fused BN" else "off")
    chosen = replace(chosen, op_threads=op_threads, exact=exact)
    if form == "two micro-batches":
        chosen = replace(chosen, bn_batch=batch // 2)
    pixels = torch.randint(256, (images, size, size, 3), dtype=torch.uint8)
    split = MemorySplit(pixels, torch.randint(10, (images,)))
    preprocessing = Preprocessing(3, (size, size), size, torch.full((3,), 0.5), torch.full((3,), 0.25))
    model: Any = device_config.place(resnetlab.build(our_name(net), classes=10, seed=0)).train()
    augmentation = Augmentation(
        chosen.pad, chosen.pad_with, chosen.flip, chosen.colour, crop=Crop("centre", (256, 480), 1.0)
    )
    loader = TrainLoader(split, preprocessing, augmentation, batch, 0, device_config)
    return ClassificationTask(
        replace(chosen, batch=batch), model, tuple("0123456789"), preprocessing, loader, split, split, {}, device_config
    )


def ours(net: str, batch: int, device: torch.device, form: str) -> Step:
    """One step of `resnetlab train` on uint8 images in memory."""
    task = make_task(net, batch, device, form, 4 * batch)
    say = partial(print, file=sys.stderr)
    task = choose_kernels(divide_threads(task), say, resuming=False)
    say(task.device_config)
    train_state, position = TrainState.create(task), iter(range(10**9))
    gradients = select_gradients(train_state, say)
    return lambda: train_step(train_state, task.micro_batches(next(position)), 0.01, gradients)


def serve(link: Connection, contestant: str, net: str, batch: int, kind: str) -> None:
    """A contestant's process: told a number of steps, it makes them and answers with the seconds they took."""
    device = torch.device(kind)
    own, form = contestant.startswith("resnetlab"), contestant.removeprefix("resnetlab").strip()
    step = ours(net, batch, device, form) if own else peer(contestant, net, batch, device)

    def settle() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):  # the first steps compile, choose algorithms and fill caches
        step()
    settle()
    link.send("ready")
    while count := link.recv():
        began = time.perf_counter()
        for _ in range(count):
            step()
        settle()
        link.send(time.perf_counter() - began)


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of a 4096-sided matrix product, the best of several."""
    side = 4096 if device.type == "cpu" else 8192
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        c: Tensor = a @ b
        float(c[0, 0])
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best


def measure(net: str, options: argparse.Namespace) -> list[str]:
    """The rows of one network."""
    context, batch, seconds_a_turn = multiprocessing.get_context("spawn"), options.batch or BATCHES[side(net)], 3.0
    left_out = {"timm"} if side(net) == 32 else {"resnetlab compiled"} if options.device == "cpu" else set()
    bf16 = select_device(device=options.device).precision == "bf16"  # as a run chooses by itself
    if not bf16:
        left_out |= {"eager bf16", "timm", "compiled"}
    names = [name for name in CONTESTANTS if name in options.contestants.split(",") and name not in left_out]
    links, processes, counts = {}, [], {}
    for name in names:
        links[name], theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, name, net, batch, options.device), daemon=True)
        process.start()
        theirs.close()
        try:
            links[name].recv()  # "ready"
        except EOFError:
            print(f"{net}: {name} is left out; it ended as said above", file=sys.stderr, flush=True)
            continue
        processes.append(process)
        links[name].send(1)
        counts[name] = max(1, round(seconds_a_turn / links[name].recv()))
        print(f"{net}: {name} is ready, {counts[name]} steps a turn", file=sys.stderr, flush=True)
    names = list(counts)
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            links[name].send(counts[name])
            rates[name].append(counts[name] * batch / links[name].recv())
    for name in names:
        links[name].send(0)
    for process in processes:
        process.join()
    work = 6.0 * compute_cost(get_specification(our_name(net), classes=10)).multiply_adds
    device = torch.device(options.device)
    peaks = {dtype: peak(dtype, device) for dtype in {torch.float32, torch.bfloat16 if bf16 else torch.float32}}
    rows = []
    for name in names:
        ratios = sorted(a / b for a, b in zip(rates[name], rates["eager fp32"], strict=True))
        middle = statistics.median(rates[name])
        share = middle * work / peaks[torch.float32 if name == "eager fp32" or not bf16 else torch.bfloat16]
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        rows.append(f"| {net}, {side(net)} px, batch {batch} | {name} | {middle:,.1f} | {spread} | {share:.0%} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="resnet20,resnet56,resnet110,resnet18,resnet50", help="comma list")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every contestant, alternating")
    parser.add_argument(
        "--contestants", default=",".join(CONTESTANTS), help="comma list; eager fp32 must be among them"
    )
    parser.add_argument("--batch", type=int, help="images in a step; 128 at 32 px and 32 at 224 where not args")
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute without pause")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    machine = environment()
    print(f"{machine['cpu']}, {machine['threads']} threads, GPU {machine['gpu']}, torch {machine['torch']}, "
          f"torchvision {machine['torchvision']}; {options.rounds} rounds, medians; "
          f"{options.busy} busy processes beside them\n")  # fmt: skip
    print("| network | contestant | images/s | ratio to eager fp32 (lowest to highest) | share of peak |")
    print("|---|---|---|---|---|", flush=True)
    with busy_neighbours(options.busy):
        for net in options.nets.split(","):
            print("\n".join(measure(net, options)), flush=True)


if __name__ == "__main__":
    main()
