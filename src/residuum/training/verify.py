"""A proof of exact resume, on the user's own machine, data and recipe: straight through, and with a real SIGKILL in between.

Three processes train the first steps of the recipe, its schedule brought to that length: one goes straight to the end, one is
killed half-way by the system's SIGKILL, one goes on from what that left. Nothing is judged on the test split.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from residuum.errors import RunError
from residuum.models.bundle import read_safetensors
from residuum.records import Run, read_metrics
from residuum.training.checkpoint import checkpoints
from residuum.training.recipe import Training
from residuum.training.result import Progress

STEPS = 24
CLOCK = ("seconds", "images_per_second", "share_waiting")  # of metrics.jsonl: they depend on the machine's mood


def verify(recipe: Training, data_dir: Path, device: str, workers: int | None, say: Callable[[str], None]) -> str:
    """Trains twice and compares; a sentence on what was found equal.

    Raises RunError, naming what differs, where a bit does; or where a process ended for another reason than it should.
    """
    short = replace(recipe.shrunk(STEPS + 1), record_every=1, judge_every=STEPS // 3, checkpoint_minutes=0.0)
    with TemporaryDirectory(prefix="residuum-verify-") as place:
        straight, broken = Path(place) / "straight", Path(place) / "broken"
        half = STEPS // 2
        say(f"{STEPS} steps straight on …")
        _child(short, straight, data_dir, device, workers, stop_at=STEPS, kill_at=0, expect=128 + signal.SIGTERM)
        say(f"the same again, killed by SIGKILL after step {half} …")
        _child(short, broken, data_dir, device, workers, stop_at=0, kill_at=half, expect=-signal.SIGKILL)
        say("and gone on with …")
        _child(short, broken, data_dir, device, workers, stop_at=STEPS, kill_at=0, expect=128 + signal.SIGTERM)
        tensors, figures = _compare(Run(straight), Run(broken))
    return f"exact: killed at step {half}, at step {STEPS} the same bits in {tensors} tensors and {figures} lines of figures"


def _child(
    recipe: Training,
    out: Path,
    data_dir: Path,
    device: str,
    workers: int | None,
    *,
    stop_at: int,
    kill_at: int,
    expect: int,
) -> None:
    """Trains in a process of its own, which ends itself as asked."""
    values = json.dumps([recipe.to_json(), str(out), str(data_dir), device, workers, stop_at, kill_at])
    code = "import sys; from residuum.training.verify import _train; _train(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, values], capture_output=True, text=True)
    if done.returncode != expect:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise RunError(f"a process that was to train {STEPS} steps ended otherwise ({done.returncode}): {last}")


def _train(text: str) -> None:
    """In the child: trains, and sends itself a signal on the way."""
    from residuum.training import jobs, loop
    from residuum.training.stopping import Stopped

    values, out, data_dir, device, workers, stop_at, kill_at = json.loads(text)
    recipe = jobs.JOBS[values["task"]].recipe.from_values(values)

    def progress(p: Progress) -> None:
        if p.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if p.step == stop_at - 1:
            os.kill(os.getpid(), signal.SIGTERM)  # heard at the next step, which is saved

    try:
        if Path(out).is_dir():
            loop.resume(Path(out), task=recipe.task, workers=workers, progress=progress)
        else:
            loop.start(recipe, Path(out), Path(data_dir), device, progress, workers=workers)
    except Stopped as stop:
        sys.exit(stop.exit_code)


def _compare(one: Run, other: Run) -> tuple[int, int]:
    """How many tensors and lines are equal; raises RunError where any differs."""
    (a, about_a), (b, about_b) = (read_safetensors(checkpoints(run)[-1], "checkpoint") for run in (one, other))
    if about_a["step"] != about_b["step"]:
        raise RunError(f"one run stopped at step {about_a['step']}, the other at {about_b['step']}.")
    differing = sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k]))
    if differing:
        raise RunError(
            f"not exact: {len(differing)} of {len(a)} tensors differ after a resume, such as {differing[0]}; please report "
            "this, with the environment.json of one of your runs."
        )
    lines = [[{k: v for k, v in line.items() if k not in CLOCK} for line in read_metrics(run)] for run in (one, other)]
    if lines[0] != lines[1]:
        at = next(x["step"] for x, y in zip(*lines, strict=False) if x != y)
        raise RunError(f"not exact: the recorded figures differ at step {at}; please report this.")
    return len(a), len(lines[0])
