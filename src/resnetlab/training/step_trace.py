"""A trace of some steps of a run, every operation and kernel with its time, which Perfetto and chrome://tracing show."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from resnetlab.formatting import format_count

WARMUP_STEPS = 3  # before the traced ones: memory, kernels and workers are made ready
# how the names of CUDA's and HIP's functions begin that launch a kernel, or a graph of them
LAUNCHES = (
    "cudaLaunch",
    "cuLaunch",
    "cudaGraphLaunch",
    "hipLaunch",
    "hipExtLaunch",
    "hipModuleLaunch",
    "hipGraphLaunch",
)


def count_launches(trace: Any) -> int:
    """How many kernels, and graphs of kernels, the host launched on a GPU in a trace of torch.profiler."""
    return sum(event.name.startswith(LAUNCHES) for event in trace.events())


@contextlib.contextmanager
def trace_steps(
    steps: int, path: Path, report: Callable[[str], None], record: Callable[[float], None] = lambda launches: None
) -> Iterator[Callable[[], None]]:
    """Traces `steps` steps into a JSON file, after the first ones; yields a function to call at the end of every step.

    Args:
        steps: how many; 0 traces nothing.
        report: called with a sentence on the trace.
        record: called with the launches of a step, on a GPU.
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
        launches = count_launches(trace) / traced
        counted = f" ({launches:,.0f} launches a step)" if launches else ""
        report(f"trace of {format_count(traced, 'step')}{counted}, to open in Perfetto: {path}")
        if launches:
            record(launches)

    plan = schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1)
    with profile(schedule=plan, on_trace_ready=write, acc_events=True) as profiler:
        yield end_step
    if done <= WARMUP_STEPS:
        report(f"no trace: it begins after {WARMUP_STEPS} steps, and there were no more")
