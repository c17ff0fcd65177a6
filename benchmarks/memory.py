"""Peak memory of a training step on the CPU, with and without keeping every map.

    python benchmarks/memory.py --net resnet1202 --batch 128 --recompute

Prints the most that the process ever held (resident set), all libraries included, after one whole step on
the digits, enlarged to 32x32. Every setting takes a process of its own, since the peak never falls.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

from residuum.runtime import environment
from residuum.training.average import learn
from residuum.training.checkpoint import Learner
from residuum.training.loop import adapt
from residuum.training.recipes import recipe
from residuum.training.running import prepare_task
from residuum.training.step import train_step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet1202")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--bn-batch", type=int, default=0)
    parser.add_argument("--recompute", action="store_true")
    given = parser.parse_args()
    values = {
        "size": "32",
        "batch": str(given.batch),
        "bn_batch": str(given.bn_batch),
        "recompute": str(given.recompute),
    }
    chosen = adapt(recipe("quick"), data=None, net=given.net, steps=None, seed=None, values=values)
    task, chosen = prepare_task(chosen, Path("data"), "cpu", print)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    learn(task.net)
    learner, began = Learner.fresh(task, chosen), time.perf_counter()
    made = train_step(learner, task.parts(0), 0.01)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{vars(given)} on {environment()['cpu']}, torch {environment()['torch']}")
    print(f"loss {float(made.loss):.3f}; one step {time.perf_counter() - began:.0f} s")
    print(f"peak {peak / 2**20:.2f} GiB, of which {before / 2**20:.2f} before the step")


if __name__ == "__main__":
    main()
