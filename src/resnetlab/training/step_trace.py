"""A trace of some steps of a run, every operation and kernel with its time, which Perfetto and chrome://tracing show."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from resnetlab.formatting import format_count

WARMUP_STEPS = 3  # before the traced ones: memory, kernels and workers are made ready


@contextlib.contextmanager
def trace_steps(steps: int, path: Path, report: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Traces `steps` steps into a JSON file, after the first ones; yields a function to call at the end of every step.

    Args:
        steps: how many; 0 traces nothing.
        report: called with a sentence on the trace.
    """
    if not steps:
        yield lambda: None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the tracer's library would print notes, and errors without a GPU
    from torch.profiler import profile, schedule

    done = 0

    def end_step() -> None:
        nonlocal done
        done += 1
        profiler.step()

    def write(trace: profile) -> None:
        if (traced := min(steps, done - WARMUP_STEPS)) < 1:
            return
        temporary = path.with_name(f".{path.name}.tmp")
        trace.export_chrome_trace(str(temporary))
        os.replace(temporary, path)
        report(f"trace of {format_count(traced, 'step')}, to open in Perfetto: {path}")

    plan = schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield end_step
    if done <= WARMUP_STEPS:
        report(f"no trace: it begins after {WARMUP_STEPS} steps, and there were no more")
