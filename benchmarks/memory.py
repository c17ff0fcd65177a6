"""Peak memory of a training step on the CPU, with and without recompute.

    python benchmarks/memory.py --net resnet1202 --batch 128 --recompute

Prints the peak resident set of the process, including libraries, after one step on the digits, enlarged to
32x32. Every setting needs a process of its own, because the peak never falls.
"""

from __future__ import annotations

import argparse
import resource
import time

from resnetlab.device import environment
from resnetlab.training.average import set_train_mode
from resnetlab.training.checkpoint import TrainState
from resnetlab.training.recipe import Overrides
from resnetlab.training.recipes import find_classification_recipe
from resnetlab.training.step import train_step
from resnetlab.training.train import RunOptions, build_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet1202")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bn-batch", type=int, default=0)
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    values = {
        "image_size": "32",
        "batch": str(args.batch),
        "bn_batch": str(args.bn_batch),
        "recompute": str(args.recompute),
    }
    recipe = Overrides(net=args.net, values=values).apply(find_classification_recipe("quick"))
    task = build_task(recipe, RunOptions(device="cpu", report=print))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    set_train_mode(task.net)
    train_state, began = TrainState.create(task), time.perf_counter()
    output = train_step(train_state, task.micro_batches(0), 0.01)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{vars(args)} on {environment()['cpu']}, torch {environment()['torch']}")
    print(f"loss {float(output.loss):.3f}; one step {time.perf_counter() - began:.0f} s")
    print(f"peak {peak / 2**20:.2f} GiB, of which {before / 2**20:.2f} before the step")


if __name__ == "__main__":
    main()
