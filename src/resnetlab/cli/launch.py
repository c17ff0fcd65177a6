"""Several processes on this machine, started by torchrun's launcher."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnetlab.distributed import PROCESS_GONE
from resnetlab.errors import RunError, UsageError

if TYPE_CHECKING:
    from resnetlab.training.recipe import BaseRecipe


def launch_run(command: str, given: Mapping[str, Any], new: BaseRecipe | None) -> None:
    """Runs a `train` command in several processes; a new run's folder is made before, so that all of them know it.

    Args:
        command: "train", "detect train", …
        given: what it was called with, `procs` and `max_restarts` among it.
        new: the recipe of a new run; None where one is resumed.
    """
    from resnetlab.data.sources import short_name
    from resnetlab.run_folder import RunFolder

    rest = {key: value for key, value in given.items() if key not in ("procs", "max_restarts")}
    procs, restarts = given["procs"], given["max_restarts"]
    if new is None:
        return launch(command, rest, procs, restarts)
    folder = RunFolder.create(given["out"], short_name(new.data)).path
    try:
        launch(command, rest | {"out": folder}, procs, restarts)
    finally:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()


def arguments(command: str, given: Mapping[str, Any]) -> list[str]:
    """A command line of the values that a command was called with; what is None, False or empty is left out.

    >>> arguments("train", {"data": "digits", "set_": ("lr=1",), "json": True, "out": None})
    ['train', 'digits', '--set', 'lr=1', '--json']
    """
    line = command.split()
    for name, value in given.items():
        option = f"--{name.strip('_').replace('_', '-')}"
        if value is None or value is False or value == ():
            continue
        if name == "data":
            line.append(str(value))
        elif value is True:
            line.append(option)
        else:
            for each in value if isinstance(value, tuple) else (value,):
                line += [option, str(each)]
    return line


def check_process_count(processes: int, device: str | None) -> None:
    """Raises UsageError if this machine cannot run so many processes."""
    import torch

    if "WORLD_SIZE" in os.environ:
        raise UsageError("torchrun has started the processes already; leave out --procs.")
    if device and ":" in device:
        raise UsageError(
            f"--procs gives every process a device of its own; give its kind, not {device!r}: --device cuda."
        )
    gpus = torch.cuda.device_count() if device is None or device.startswith(("auto", "cuda")) else 0
    most, what = (gpus, "GPUs") if gpus else (os.cpu_count() or 1, "CPU cores")
    if not 1 <= processes <= most:
        raise UsageError(f"--procs {processes} is not from 1 to {most}, the {what} of this machine.")


def launch(command: str, given: Mapping[str, Any], processes: int, restarts: int) -> None:
    """Runs a command in several processes; restarts them from the last checkpoint if one fails.

    Raises:
        SystemExit: with the exit code of a process that failed and printed its error.
        RunError: a process was killed, and no restart was left.
    """
    import logging

    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # the store of a restarted job must not hold keys of the failed one (torch 2.15: some restarts hang)
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # it would print our messages as tracebacks
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(os.getpid()),
            max_restarts=restarts,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",  # the default, the machine's name, may not resolve in a container
            rdzv_configs={"timeout": 60},
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=dict.fromkeys(range(1, processes), Std.ERR)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "resnetlab", *arguments(command, given))
        except SignalException as stop:
            raise SystemExit(128 + stop.sigval) from None
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            code = failure.exitcode
            if code > 0:
                code = max(code, error.failures.get(0, failure).exitcode)  # 2, a wrong request, takes precedence over 1
                for other in filter(None, error.failures):  # the first process has printed its own error
                    stderr = _read_stderr(other, Path(logs))
                    if PROCESS_GONE not in stderr:  # the others' only if they are the cause
                        sys.stderr.write(stderr)
                raise SystemExit(code) from None
            raise RunError(
                f"process {rank} of {processes} was killed (signal {-code}), and {restarts} restarts were allowed; go on with: "
                f"resnetlab {command} --resume RUN"
            ) from None


def _read_stderr(rank: int, logs: Path) -> str:
    """What a process wrote to standard error in its last attempt."""
    logs_of_rank = sorted(file for file in logs.rglob("stderr.log") if file.parent.name == str(rank))
    return logs_of_rank[-1].read_text() if logs_of_rank else ""
