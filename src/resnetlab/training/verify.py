"""Verifies bit-identical resume on the user's own machine, data and recipe, with a real SIGKILL.

Three processes train the first steps of the recipe, with its schedule rescaled to that length: one runs to the end, one is
killed half-way by SIGKILL, one resumes that run. Nothing is evaluated on the test split.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from resnetlab.errors import RunError
from resnetlab.run_folder import RunFolder, list_checkpoints, read_metrics
from resnetlab.tensor_file import read_tensor_file
from resnetlab.training.recipe import BaseRecipe, Recipe
from resnetlab.training.result import Progress

STEPS = 24
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)  # on Windows os.kill ends a process at once with any signal,
KILLED = -KILL if os.name == "posix" else KILL  # and its number is the exit code
TIMING_KEYS = ("seconds", "images_per_second", "share_waiting")  # timing fields of metrics.jsonl


def verify_resume(
    recipe: BaseRecipe, data_dir: Path, device: str, workers: int | None, report: Callable[[str], None]
) -> str:
    """Trains twice and compares; returns a sentence on the result.

    Raises RunError if a bit differs, naming what does, or if a process ended in another way than it should.
    """
    short = replace(recipe.rescale(STEPS + 1), log_every=1, eval_every=STEPS // 3, checkpoint_minutes=0.0)
    if isinstance(short, Recipe):
        short = replace(short, early_stop=0)  # all of the steps are compared
    with TemporaryDirectory(prefix="resnetlab-verify-") as place:
        straight, broken = Path(place) / "straight", Path(place) / "broken"
        half, stopped = STEPS // 2, 128 + signal.SIGTERM
        setup = {"recipe": short.to_json(), "data_dir": str(data_dir), "device": device, "workers": workers}
        report(f"training {STEPS} steps without a stop …")
        _run_child(setup, straight, stop_at=STEPS, kill_at=0, expect=stopped)
        report(f"the same again, killed by SIGKILL after step {half} …")
        _run_child(setup, broken, stop_at=0, kill_at=half, expect=KILLED)
        report("and resumed …")
        _run_child(setup, broken, stop_at=STEPS, kill_at=0, expect=stopped)
        tensors, figures = _compare_runs(RunFolder(straight), RunFolder(broken))
    return (
        f"exact: killed at step {half} and resumed, bit-identical at step {STEPS} in {tensors} tensors and {figures} lines of "
        "metrics.jsonl"
    )


def _run_child(setup: Mapping[str, Any], out: Path, *, stop_at: int, kill_at: int, expect: int) -> None:
    """Trains in a process of its own, which kills or stops itself at the given step."""
    values = json.dumps({**setup, "out": str(out), "stop_at": stop_at, "kill_at": kill_at})
    code = "import sys; from resnetlab.training.verify import _train; _train(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, values], capture_output=True, text=True)
    if done.returncode != expect:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"a process that was to train {STEPS} steps ended otherwise ({done.returncode}): {last}")


def _train(text: str) -> None:
    """Runs in the child: trains, and sends itself a signal."""
    from resnetlab.stopping import StopSignal
    from resnetlab.training.run_options import RunOptions
    from resnetlab.training.train import TASKS, resume, start_run

    values = json.loads(text)
    recipe = TASKS[values["recipe"]["task"]].recipe_type.from_values(values["recipe"])

    def progress(p: Progress) -> None:
        if p.step == values["kill_at"]:
            os.kill(os.getpid(), KILL)
        if p.step == values["stop_at"] - 1:
            signal.raise_signal(signal.SIGTERM)  # handled at the next step, after a checkpoint

    options, out = RunOptions(workers=values["workers"], on_progress=progress), Path(values["out"])
    try:
        if out.is_dir():
            resume(out, options, task=recipe.task)
        else:
            start_run(recipe, out, replace(options, data_dir=Path(values["data_dir"]), device=values["device"]))
    except StopSignal as stop:
        sys.exit(stop.exit_code)


def _compare_runs(one: RunFolder, other: RunFolder) -> tuple[int, int]:
    """The numbers of equal tensors and lines; raises RunError if any differs."""
    (a, about_a), (b, about_b) = (read_tensor_file(list_checkpoints(run)[-1], "checkpoint") for run in (one, other))
    if about_a["step"] != about_b["step"]:
        raise RunError(f"one run stopped at step {about_a['step']}, the other at {about_b['step']}.")
    differing = sorted(k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k]))
    if differing:
        raise RunError(
            f"not exact: {len(differing)} of {len(a)} tensors differ after a resume, such as {differing[0]}; please report "
            "this, with the environment.json of one of your runs."
        )
    lines = [
        [{k: v for k, v in line.items() if k not in TIMING_KEYS} for line in read_metrics(run)] for run in (one, other)
    ]
    if lines[0] != lines[1]:
        at = next(x["step"] for x, y in zip(*lines, strict=False) if x != y)
        raise RunError(f"not exact: metrics.jsonl differs at step {at}; please report this.")
    return len(a), len(lines[0])
