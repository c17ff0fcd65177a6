#!/usr/bin/env python3
"""Images per second of evaluating CIFAR-10's 10,000 test images: ResNetLab beside an eager fp32 loop.

    python benchmarks/evaluate.py MODEL --data-dir DATA [--rounds 5] [--busy 1]

The plain loop: the model's own network, eager, fp32, NCHW, `torch.no_grad`, batches of 256 that are normalised
tensors in memory already (what a DataLoader costs is left out). ResNetLab: `evaluate`, from the uint8 images, with its
own device configuration (bf16 where the hardware computes it, channels_last, BN folded; folding is timed too). Both
evaluate all images alternately, in one process; printed are the median rates, the median of the round-by-round ratios with
their extremes, and the share of equal predictions. Then `resnetlab evaluate` runs in a process of its own, whose peak
memory is printed.
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

from neighbour import busy_neighbours
from resnetlab.data import sources
from resnetlab.device import environment, select_device
from resnetlab.evaluation.metrics import evaluate_network
from resnetlab.models.model_file import load_trained_model

BATCH = 256


def measure(work: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds, and the predicted classes."""
    start = time.perf_counter()
    predicted = work()
    return time.perf_counter() - start, predicted


def peak_memory(command: list[str]) -> float:
    """The peak memory of a process, MiB."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=0, help="other processes that compute without pause")
    options = parser.parse_args()
    bundle = load_trained_model(options.model)
    split = sources.load_dataset("cifar10", options.data_dir).test
    device_config = select_device(device="cpu")
    mean, std = bundle.preprocessing.mean, bundle.preprocessing.std
    inputs = ((split.images.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()  # (N, 3, 32, 32)
    net = bundle.net.eval()

    def run_plain() -> Tensor:
        with torch.no_grad():
            return torch.cat([net(x).argmax(1) for x in torch.split(inputs, BATCH)])

    def run_resnetlab() -> Tensor:
        return evaluate_network(net, split, bundle.preprocessing, bundle.classes, device_config).predicted

    with busy_neighbours(options.busy):
        run_plain(), run_resnetlab()
        rounds = [(measure(run_plain), measure(run_resnetlab)) for _ in range(options.rounds)]
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
        memory = peak_memory([sys.executable, "-m", "resnetlab", *command, "--out", folder])
    machine, medians = environment(), [statistics.median(each) for each in zip(*rates, strict=True)]
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, {device_config}; {options.rounds} rounds, "
        f"{options.busy} busy processes beside them\n"
    )
    print(f"eager fp32 loop   {medians[0]:,.0f} images/s, error {100 * errors[0]:.2f} %")
    print(f"resnetlab          {medians[1]:,.0f} images/s, error {100 * errors[1]:.2f} %")
    print(f"ratio             {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"agreement         {100 * agreement:.2f} % of {n:,} predictions")
    print(f"peak memory       {memory:,.0f} MiB of `resnetlab evaluate`")


if __name__ == "__main__":
    main()
