"""Runs spread over processes: each process makes one run after the other and sends messages about its progress.

On a CPU a process uses one thread: two small networks side by side train faster than one on two threads. Each process reads
the data once. A process whose parent has died stops as if by SIGTERM, so none is left running and at most a minute is lost.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess, parent_process
from pathlib import Path

import torch

from resnetlab.device import count_cores
from resnetlab.errors import ResNetLabError, RunError
from resnetlab.stopping import StopSignal, catch_stop_signals
from resnetlab.studies.runs import StudyRun

MPS_PROCESSES = 8  # that share a GPU
SMALL = 64  # pixels: larger images fill a GPU by themselves


@dataclass(frozen=True)
class Message:
    """What a process sends about its run: `state` is "running", "finished", "failed" or "stopped"; `step` steps are done."""

    state: str
    step: int = 0
    text: str = ""


def worker_devices(device: str, num_runs: int, image_size: int = 0) -> list[str]:
    """A device for each process, no more than there are runs: every core, or every GPU.

    One process a GPU, whose steps are CUDA graphs, since kernels of several do not run side by side: on an H100 four
    processes that train ResNet-20 make 1.06 times the steps of one, and under NVIDIA's MPS 2.1 times as many; eight with
    ResNet-56 make 2.3 times (docs/log.md). So where MPS runs eight share a GPU, if no image of
    the runs has a longer side than SMALL.
    """
    if device == "cpu":
        devices = ["cpu"] * count_cores()
    else:
        devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device in ("auto", "cuda") else [device]
        if image_size <= SMALL and _runs_mps():
            devices *= MPS_PROCESSES
    return devices[: max(1, num_runs)]


def _runs_mps() -> bool:
    """Whether NVIDIA's Multi-Process Service has been started, which lets kernels of several processes run side by side."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


def make_runs(
    runs: Sequence[StudyRun], data_dir: Path, devices: Sequence[str], on_step: Callable[[int, int], None]
) -> None:
    """Makes runs in the given order, as many at once as there are devices.

    Args:
        on_step: called with a run's position in `runs` and the steps it has done.

    Raises:
        StopSignal: SIGINT or SIGTERM, after every run has saved a checkpoint.
        RunError: a run failed (the others stop, saved), or a process was killed.
    """
    waiting = list(range(len(runs)))[::-1]
    workers = [_Worker(data_dir, device) for device in devices[: len(runs)]]
    failure: str | None = None
    with catch_stop_signals() as request:
        for worker in workers:
            worker.assign(waiting.pop(), runs)
        while busy := [worker for worker in workers if worker.index is not None]:
            if (request.signum is not None or failure) and not all(worker.stopping for worker in busy):
                for worker in busy:
                    worker.stop()
            for pipe in wait([worker.pipe for worker in busy], timeout=0.5):
                worker = next(each for each in busy if each.pipe is pipe)
                index, message = worker.receive()
                if message.state in ("running", "finished"):
                    on_step(index, message.step)
                if message.state == "failed":
                    failure = failure or message.text
                if worker.index is None and waiting and not (failure or request.signum):
                    worker.assign(waiting.pop(), runs)
    for worker in workers:
        worker.close()
    if request.signum is not None:
        raise StopSignal(request.signum, "stopped; every run is saved. The same command resumes them.")
    if failure:
        raise RunError(failure)


class _Worker:
    """One process, as seen from its parent."""

    def __init__(self, data_dir: Path, device: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        self.pipe, child_pipe = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(child_pipe, data_dir, device), daemon=True)
        self.process.start()
        child_pipe.close()
        self.index: int | None = None  # of the run in progress
        self.stopping = False

    def assign(self, index: int, runs: Sequence[StudyRun]) -> None:
        self.index, self.run = index, runs[index]
        self.pipe.send(self.run)

    def receive(self) -> tuple[int, Message]:
        """The next message about its run, which is cleared where it has ended."""
        index = self.index if self.index is not None else -1
        try:
            message: Message = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            text = f"the process of {self.run.folder} ended (code {code}); run the same command again."
            message = Message("stopped") if self.stopping else Message("failed", text=text)
        if message.state != "running":
            self.index = None
        return index, message

    def stop(self) -> None:
        """Makes the run save a checkpoint and end at its next step."""
        self.stopping = True
        self.process.terminate()

    def close(self) -> None:
        self.pipe.close()
        self.process.join()


def _work(pipe: Connection, data_dir: Path, device: str) -> None:
    """The process: one run after the other, until its parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which stops its workers
    torch.set_num_threads(1)
    threading.Thread(target=_stop_with_parent, daemon=True).start()

    def send(message: Message) -> None:
        with contextlib.suppress(OSError):  # the parent has died; the run is saved all the same
            pipe.send(message)

    while True:
        try:
            run: StudyRun = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            run.make(data_dir, device, lambda progress: send(Message("running", progress.step)))
            send(Message("finished", run.recipe.steps))
        except StopSignal:
            send(Message("stopped"))
            break
        except ResNetLabError as error:
            send(Message("failed", text=f"{run.folder}: {error}"))


def _stop_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
