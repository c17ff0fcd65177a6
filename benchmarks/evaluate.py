#!/usr/bin/env python3
"""Pictures per second of evaluating CIFAR-10's 10,000 test pictures: Residuum beside an eager fp32 loop.

    python benchmarks/evaluate.py MODEL --data-dir DATA [--rounds 5]

The plain loop: the model's own network, eager, fp32, NCHW, `torch.no_grad`, batches of 256 that are normalised
tensors in memory already (what a DataLoader costs is left out). Residuum: `judge`, from the uint8 pictures, with its
own engine (bf16 where the hardware computes it, channels_last, BN folded; folding is in its time). Both go through
all pictures in turns, in one process; printed are the median rates, the median of the round-by-round ratios with
their extremes, and on how many pictures they agree. Then `residuum evaluate` runs in a process of its own, whose peak
of memory is printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from residuum.data import sources
from residuum.evaluation.evaluate import judge
from residuum.models.bundle import load_bundle
from residuum.runtime import environment, pick_engine

BATCH = 256


def timed(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds, and the predicted classes."""
    began = time.perf_counter()
    predicted = work()
    return time.perf_counter() - began, predicted


def peak_memory(command: list[str]) -> float:
    """MiB that a process held at most."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    bundle = load_bundle(options.model)
    split = sources.load("cifar10", options.data_dir).test
    engine = pick_engine(device="cpu")
    mean, std = bundle.preprocessing.mean, bundle.preprocessing.std
    inputs = ((split.images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    net = bundle.net.eval()

    def plain() -> Tensor:
        with torch.no_grad():
            return torch.cat([net(x).argmax(1) for x in torch.split(inputs, BATCH)])

    def ours() -> Tensor:
        return judge(net, split, bundle.preprocessing, bundle.classes, engine).predicted

    plain(), ours()
    rounds = [(timed(plain), timed(ours)) for _ in range(options.rounds)]
    n = len(split)
    rates = [(n / a[0], n / b[0]) for a, b in rounds]
    ratios = sorted(b / a for a, b in rates)
    agreement = float((rounds[0][0][1] == rounds[0][1][1]).double().mean())
    errors = [float((each[1] != split.labels).double().mean()) for each in rounds[0]]
    command = [
        "evaluate",
        str(options.model),
        "--data",
        "cifar10",
        "--data-dir",
        str(options.data_dir),
        "--device",
        "cpu",
    ]
    with tempfile.TemporaryDirectory() as folder:
        memory = peak_memory([sys.executable, "-m", "residuum", *command, "--out", folder])
    machine, medians = environment(), [statistics.median(each) for each in zip(*rates, strict=True)]
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {engine}; {options.rounds} rounds\n"
    )
    print(f"eager fp32 loop   {medians[0]:,.0f} pictures/s, error {100 * errors[0]:.2f} %")
    print(f"residuum          {medians[1]:,.0f} pictures/s, error {100 * errors[1]:.2f} %")
    print(f"ratio             {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"agreement         {100 * agreement:.2f} % of {n:,} predictions")
    print(f"peak memory       {memory:,.0f} MiB of `residuum evaluate`")


if __name__ == "__main__":
    main()
