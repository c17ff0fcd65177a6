"""Several processes on this machine, started by torchrun's launcher."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from resnetlab.cli import console
from resnetlab.errors import PROCESS_GONE, RunError, UsageError
from resnetlab.stopping import StopRequest, catch_stop_signals

if TYPE_CHECKING:
    from resnetlab.run_folder import RunFolder
    from resnetlab.training.recipe import BaseRecipe, Overrides
    from resnetlab.training.result import TrainResult
    from resnetlab.training.run_options import RunOptions

# options of a run that its processes get as they are
PASSED_ON = ("device", "workers", "shard_space", "fit_micro_batch", "profile")


def _check_process_count(processes: int, device: str | None) -> None:
    """Raises UsageError if this machine cannot run so many processes."""
    import torch

    from resnetlab.device import count_cores

    if "WORLD_SIZE" in os.environ:
        raise UsageError("torchrun has started the processes already; leave out --procs.")
    if device and ":" in device:
        raise UsageError(
            f"--procs gives every process a device of its own; give its kind, not {device!r}: --device cuda."
        )
    gpus = torch.cuda.device_count() if device is None or device.startswith(("auto", "cuda")) else 0
    most, what = (gpus, "GPUs") if gpus else (count_cores(), "CPU cores")
    if not 1 <= processes <= most:
        raise UsageError(f"--procs {processes} is not from 1 to {most}, the {what} of this machine.")


class Job(NamedTuple):
    """A run of several processes on this machine, restarted from the last checkpoint so often after one has died."""

    task: str
    options: RunOptions
    processes: int
    restarts: int

    def start(self, recipe: BaseRecipe, out: Path | None) -> TrainResult:
        """Trains a complete recipe into the new run folder `out`; None takes runs/<data>, or the next free name."""
        from resnetlab.data.sources import short_name
        from resnetlab.distributed import World
        from resnetlab.run_folder import RunFolder, write_atomically
        from resnetlab.training.train import TASKS

        _check_process_count(self.processes, self.options.device)
        TASKS[self.task].count_micro_batches(recipe, World(0, self.processes))
        run = RunFolder.create(out, short_name(recipe.data))
        write_atomically(run.path / "recipe.toml", recipe.to_toml())
        try:
            return self._launch(run)
        finally:
            if not (run.path / "environment.json").exists():  # the run has not begun
                with contextlib.suppress(OSError):
                    (run.path / "recipe.toml").unlink()
                    (run.path / ".lock").unlink(missing_ok=True)
                    run.path.rmdir()

    def resume(self, path: Path, overrides: Overrides) -> TrainResult:
        """Resumes the run in a folder."""
        from resnetlab.run_folder import RunFolder
        from resnetlab.training.train import check_resume

        _check_process_count(self.processes, self.options.device)
        check_resume(path, self.task, overrides, self.options)
        return self._launch(RunFolder(path))

    def _launch(self, run: RunFolder) -> TrainResult:
        """Resumes a run in the processes; restarts them from the last checkpoint if one fails.

        Raises:
            SystemExit: with the exit code of a process that failed and printed its error.
            RunError: a process was killed, and no restart was left.
        """
        import logging

        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        from resnetlab.device import count_cores
        from resnetlab.training.train import TASKS, read_result

        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // self.processes)))
        for name in logging.root.manager.loggerDict:  # each has a level of its own
            if name.startswith("torch.distributed.elastic"):  # it would print our messages as tracebacks
                logging.getLogger(name).setLevel(logging.CRITICAL)
        with tempfile.TemporaryDirectory() as logs:
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=self.processes,
                run_id=str(os.getpid()),
                max_restarts=self.restarts,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",  # the default, the machine's name, may not resolve in a container
                rdzv_configs={"timeout": 60},
                monitor_interval=0.1,
                signals_to_handle="SIGHUP,SIGQUIT",  # not those that the command handles
                logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=dict.fromkeys(range(1, self.processes), Std.ERR)),
            )
            request = {
                "launcher": os.getpid(),
                "run": str(run.path),
                "task": self.task,
                "data_dir": self.options.data_dir and str(self.options.data_dir),
                "epochs": self.options.epochs,
                "trackers": self.options.trackers,
                **{key: getattr(self.options, key) for key in PASSED_ON},
            }
            try:
                with catch_stop_signals() as stop_request, _torchrun_looks_at(stop_request):
                    elastic_launch(config, sys.executable)("-m", "resnetlab", "_train-process", json.dumps(request))
            except SignalException as stop:
                raise SystemExit(128 + stop.sigval) from None
            except ChildFailedError as error:
                rank, failure = error.get_first_failure()
                code = failure.exitcode
                if code > 0:
                    code = max(code, error.failures.get(0, failure).exitcode)  # 2, a wrong request, comes before 1
                    for other in filter(None, error.failures):  # the first process has printed its own error
                        stderr = _read_stderr(other, Path(logs))
                        if PROCESS_GONE not in stderr:  # the others' only if they are the cause
                            sys.stderr.write(stderr)
                    raise SystemExit(code) from None
                raise RunError(
                    f"process {rank} of {self.processes} was killed (signal {-code}), and {self.restarts} restarts were "
                    f"allowed; resume with: {TASKS[self.task].command} --resume {run.path}"
                ) from None
        result = read_result(run, TASKS[self.task])
        if result is None:
            raise RunError(f"{run.path} has no result; resume with: {TASKS[self.task].command} --resume {run.path}")
        return result


@contextlib.contextmanager
def _torchrun_looks_at(request: StopRequest) -> Iterator[None]:
    """Lets torchrun's loop end its processes, which save first, after a request to stop.

    Its own handlers raise, which a callback of the garbage collector would swallow. So the loop, which publishes metrics
    of itself ten times a second, looks at the request there.
    """
    from torch.distributed.elastic.metrics import api as metrics
    from torch.distributed.elastic.multiprocessing.api import SignalException

    class Look(metrics.MetricHandler):
        raised = False

        def emit(self, metric_data: metrics.MetricData) -> None:
            if request.signum is not None and not self.raised:
                self.raised = True
                raise SignalException("stopped", signal.Signals(request.signum))

    metrics.configure(Look())
    try:
        yield
    finally:
        metrics.configure(metrics.NullMetricHandler())


def train_process(request: str) -> None:
    """Resume a run as one of several processes; `--procs` starts this command."""
    from resnetlab.training.recipe import Epochs
    from resnetlab.training.result import show_training
    from resnetlab.training.run_options import RunOptions
    from resnetlab.training.train import resume

    values = json.loads(request)
    threading.Thread(target=_stop_with, args=(values["launcher"],), daemon=True).start()
    with show_training() as on_progress:
        options = RunOptions(
            data_dir=Path(values["data_dir"]) if values["data_dir"] else None,
            epochs=values["epochs"] and Epochs(*values["epochs"]),
            trackers=tuple(values["trackers"]),
            report=console.log,
            on_progress=on_progress,
            **{key: values[key] for key in PASSED_ON},
        )
        resume(Path(values["run"]), options, task=values["task"])


def _stop_with(launcher: int) -> None:
    """Stops this process, saved, when its launcher has died: it would wait for the others, or train on, unseen."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


def _read_stderr(rank: int, logs: Path) -> str:
    """What a process wrote to standard error in its last attempt."""
    logs_of_rank = sorted(file for file in logs.rglob("stderr.log") if file.parent.name == str(rank))
    return logs_of_rank[-1].read_text("utf-8", "replace") if logs_of_rank else ""
