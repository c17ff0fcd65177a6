#!/usr/bin/env python3
"""SHA-256 of the weights after some steps of paper-cifar with bn_batch=32, for several numbers of threads and of processes.

    python benchmarks/same_bits.py --data-dir DATA [--steps 30] [--threads 1,2,4] [--procs 1,2,4]

Each is a run of its own, made by `resnetlab train` (more processes than there are cores by torchrun). They all come to the
same weights; the script's exit code is 1 where they do not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from resnetlab.device import environment
from resnetlab.models.model_file import load_trained_model


def train(arguments: list[str], processes: int) -> tuple[str, float]:
    """SHA-256 of the weights and the seconds of a run of the command line."""
    with tempfile.TemporaryDirectory() as folder:
        out, began = Path(folder, "run"), time.perf_counter()
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [sys.executable, *launcher, "-m", "resnetlab", "train", *arguments, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        digest = hashlib.sha256()
        for name, tensor in sorted(load_trained_model(out / "model.safetensors").net.state_dict().items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest(), time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--threads", default="1,2,4", help="comma list, each in one process")
    parser.add_argument("--procs", default="1,2,4", help="comma list, each with one thread a process")
    parser.add_argument(
        "--set", action="append", default=[], help="further values of the recipe, as of `resnetlab train`"
    )
    options = parser.parse_args()
    common = [
        "cifar10",
        "--recipe",
        "paper-cifar",
        "--net",
        "resnet20",
        "--steps",
        str(options.steps),
        "--device",
        "cpu",
    ]
    common += ["--data-dir", str(options.data_dir), "--set", "bn_batch=32"]
    common += [part for value in options.set for part in ("--set", value)]
    runs = [(int(n), 1) for n in options.threads.split(",")]
    runs += [(int(n), int(n)) for n in options.procs.split(",") if int(n) > 1]
    machine = environment()
    print(f"{machine['cpu']}, {os.cpu_count()} cores, torch {machine['torch']}, resnetlab {machine['resnetlab']}\n")
    print("| threads | processes | SHA-256 of the weights | seconds, with start and evaluation |\n|---|---|---|---|")
    digests = set()
    for threads, processes in runs:
        digest, seconds = train([*common, "--set", f"threads={threads}"], processes)
        print(f"| {threads} | {processes} | {digest[:16]}… | {seconds:.0f} |", flush=True)
        digests.add(digest)
    sys.exit(len(digests) > 1)


if __name__ == "__main__":
    main()
