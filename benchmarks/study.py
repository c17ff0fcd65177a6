#!/usr/bin/env python3
"""The runs of a study: made by Residuum as a plan, beside the same runs made one after the other by hand.

    python benchmarks/study.py [--depths 8,14] [--seeds 3] [--steps 60] [--repeats 3] [--data digits]

By hand: `residuum train … --out RUN` for each network and seed, one command after the other, as people do who have no plan;
each run uses all cores (threads=0) or one (threads=1). As a plan: `residuum study degradation` of the same networks, seeds and
steps, into an empty folder: one single-threaded run a core at once, data read once a process, estimate and report included.
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

from residuum.runtime import environment


def command(*arguments: str, folder: Path) -> float:
    """Seconds of one command of ours, in a folder."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "residuum", *arguments], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - began


def by_hand(given: argparse.Namespace, threads: int, folder: Path) -> float:
    """One run after the other."""
    seconds = 0.0
    for depth in given.depths.split(","):
        for kind in ("plain", "resnet"):
            for seed in range(given.seeds):
                seconds += command(
                    "train", given.data, "--net", f"{kind}{depth}", "--seed", str(seed), "--steps", str(given.steps),
                    "--set", f"threads={threads}", "--data-dir", given.data_dir, folder=folder,
                )  # fmt: skip
    return seconds


def as_a_plan(given: argparse.Namespace, folder: Path) -> float:
    """The same runs as a study."""
    return command(
        "study", "degradation", "--data", given.data, "--depths", given.depths, "--seeds", str(given.seeds),
        "--steps", str(given.steps), "--data-dir", given.data_dir, folder=folder,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", default="data", type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--depths", default="8,14")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    ways = {
        "by hand, all cores": lambda folder: by_hand(given, len(os.sched_getaffinity(0)), folder),
        "by hand, one thread": lambda folder: by_hand(given, 1, folder),
        "residuum study": lambda folder: as_a_plan(given, folder),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(given.repeats):
        for way, run in ways.items():
            folder = Path(tempfile.mkdtemp())
            seconds[way].append(run(folder))
            print(f"{way}: {seconds[way][-1]:.1f} s", file=sys.stderr, flush=True)
            shutil.rmtree(folder)
    print({key: value for key, value in environment().items() if key in ("cpu", "gpu", "torch", "python")})
    for way, each in seconds.items():
        ratios = [a / b for a, b in zip(each, seconds["residuum study"], strict=True)]
        print(
            f"{way:20} {statistics.median(each):7.1f} s ({min(each):.1f} to {max(each):.1f}), "
            f"{statistics.median(ratios):.2f} times the study's ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
