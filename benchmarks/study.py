#!/usr/bin/env python3
"""The runs of a study: made by `resnetlab study`, compared with the same runs made one after the other by hand.

    python benchmarks/study.py [--depths 8,14] [--seeds 3] [--steps 60] [--repeats 3] [--data digits]

By hand: `resnetlab train … --out RUN` for each network and seed, one command after the other; each run
uses all cores (threads=0) or one (threads=1). As a study: `resnetlab study degradation` of the same networks, seeds and
steps, into an empty folder: a single-threaded run on each core, data read once per process, estimate and report included.
The three alternate; printed are the medians of the wall-clock seconds with their extremes, and the ratios round by round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from resnetlab.device import environment


def time_command(*arguments: str, folder: Path) -> float:
    """Seconds of one `resnetlab` command in a folder."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "resnetlab", *arguments], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def time_by_hand(options: argparse.Namespace, threads: int, folder: Path) -> float:
    """One run after the other."""
    seconds = 0.0
    for depth in options.depths.split(","):
        for kind in ("plain", "resnet"):
            for seed in range(options.seeds):
                seconds += time_command(
                    "train", options.data, "--net", f"{kind}{depth}", "--seed", str(seed), "--steps", str(options.steps),
                    "--set", f"threads={threads}", "--data-dir", options.data_dir, folder=folder,
                )  # fmt: skip
    return seconds


def time_study(options: argparse.Namespace, folder: Path) -> float:
    """The same runs as a study."""
    return time_command(
        "study", "degradation", "--data", options.data, "--depths", options.depths, "--seeds", str(options.seeds),
        "--steps", str(options.steps), "--data-dir", options.data_dir, folder=folder,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", default="data", type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--depths", default="8,14")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    methods = {
        "by hand, all cores": lambda folder: time_by_hand(options, len(os.sched_getaffinity(0)), folder),
        "by hand, one thread": lambda folder: time_by_hand(options, 1, folder),
        "resnetlab study": lambda folder: time_study(options, folder),
    }
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(options.repeats):
        for method, run in methods.items():
            folder = Path(tempfile.mkdtemp())
            seconds[method].append(run(folder))
            print(f"{method}: {seconds[method][-1]:.1f} s", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    print({key: value for key, value in environment().items() if key in ("cpu", "gpu", "torch", "python")})
    for method, each in seconds.items():
        ratios = [a / b for a, b in zip(each, seconds["resnetlab study"], strict=True)]
        print(
            f"{method:20} {statistics.median(each):7.1f} s ({min(each):.1f} to {max(each):.1f}), "
            f"{statistics.median(ratios):.2f} times the study's ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
