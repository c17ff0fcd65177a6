"""Runs spread over processes: each process makes one run after the other, and tells how far it is.

On a CPU a process keeps to one thread: two small networks side by side learn faster than one on two threads. Data are read
once a process. A process that loses its parent stops as if by SIGTERM, so nothing goes on unseen and at most a minute is lost.
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

from residuum.errors import ResiduumError, RunError
from residuum.studies.runs import Place
from residuum.training.stopping import Stopped, stop_requests

ON_ONE_GPU = 4  # small networks leave most of a GPU idle, so several learn on one at once


@dataclass(frozen=True)
class News:
    """What a process says of its run: how many steps are done; `state` "learns", "finished", "failed" or "stopped"."""

    state: str
    step: int = 0
    words: str = ""


def seats(device: str, wanted: int) -> list[str]:
    """A device for each process: every core, or several on each GPU; no more than are wanted."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        found = ["cpu"] * len(os.sched_getaffinity(0))
    else:
        gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if device in ("auto", "cuda") else [device]
        found = gpus * ON_ONE_GPU
    return found[: max(1, wanted)]


def carry_out(
    places: Sequence[Place], data_dir: Path, devices: Sequence[str], progress: Callable[[int, int], None]
) -> None:
    """Makes runs, as many at once as there are devices, in the order given.

    Args:
        progress: called with a run's position in `places` and the steps it has done.

    Raises:
        Stopped: SIGINT or SIGTERM, after every run has saved where it stands.
        RunError: a run that failed (the others stop where they are, saved), or a process that was killed.
    """
    waiting = list(range(len(places)))[::-1]
    crew = [_Worker(data_dir, device) for device in devices[: len(places)]]
    trouble: str | None = None
    with stop_requests() as request:
        for worker in crew:
            worker.take(waiting.pop(), places)
        while busy := [worker for worker in crew if worker.job is not None]:
            if (request.signum is not None or trouble) and not all(worker.asked_to_stop for worker in busy):
                for worker in busy:
                    worker.stop()
            for pipe in wait([worker.pipe for worker in busy], timeout=0.5):
                worker = next(each for each in busy if each.pipe is pipe)
                job, news = worker.listen()
                if news.state in ("learns", "finished"):
                    progress(job, news.step)
                if news.state == "failed":
                    trouble = trouble or news.words
                if worker.job is None and waiting and not (trouble or request.signum):
                    worker.take(waiting.pop(), places)
    for worker in crew:
        worker.dismiss()
    if request.signum is not None:
        raise Stopped(request.signum, "stopped; every run is saved. The same command goes on where it stands.")
    if trouble:
        raise RunError(trouble)


class _Worker:
    """One process, as seen from the one that started it."""

    def __init__(self, data_dir: Path, device: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_work, args=(theirs, data_dir, device), daemon=True)
        self.process.start()
        theirs.close()
        self.job: int | None = None
        self.asked_to_stop = False

    def take(self, job: int, places: Sequence[Place]) -> None:
        self.job, self.place = job, places[job]
        self.pipe.send(self.place)

    def listen(self) -> tuple[int, News]:
        """The next news of its job, which is no longer its own where it has ended."""
        job = self.job if self.job is not None else -1
        try:
            news: News = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            words = f"the process of {self.place.folder} was ended (code {self.process.exitcode}); run the same command again."
            news = News("stopped") if self.asked_to_stop else News("failed", words=words)
        if news.state != "learns":
            self.job = None
        return job, news

    def stop(self) -> None:
        """Asks the run to save and end at its next step."""
        self.asked_to_stop = True
        self.process.terminate()

    def dismiss(self) -> None:
        self.pipe.close()
        self.process.join()


def _work(pipe: Connection, data_dir: Path, device: str) -> None:
    """The process: one run after the other, until its parent has no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which asks to stop
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tell(news: News) -> None:
        with contextlib.suppress(OSError):  # a parent that is gone: the run is saved all the same
            pipe.send(news)

    while True:
        try:
            place: Place = pipe.recv()
        except (EOFError, OSError):
            break
        try:
            place.make(data_dir, device, lambda p: tell(News("learns", p.step)))
            tell(News("finished", place.recipe.steps))
        except Stopped:
            tell(News("stopped"))
            break
        except ResiduumError as error:
            tell(News("failed", words=f"{place.folder}: {error}"))


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
