"""Fixtures of all tests: one thread per worker, and the real images."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

# Before anything imports torch, and for the processes that tests start: about as many workers run as there are cores, and a
# thread more each would only take turns.
os.environ["OMP_NUM_THREADS"] = "1"
# About a hundred processes start, and each would compile torch's Python and ours anew where none may keep its bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Nothing is taken from, or left in, the cache of whoever runs the tests. Workers share one, so that kernels are compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="resnetlab-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
# A full collection visits all of torch's objects and all collected tests. Fewer collections, which leave those out, save a
# tenth of the processors' time.
gc.set_threshold(20_000, 10, 10)


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One worker more than there are cores: tests wait for processes, timers and disks a quarter of the time."""
    return (yield) + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begins with the file of the longest tests: one of them at the end would leave the other workers without work."""
    items.sort(key=lambda item: item.path.name != "test_together.py")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # what is left at the end is freed as ever


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A run in this process sets torch's number of threads, which decides the bits that later tests compare."""
    yield
    if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != 1:
        torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def first_backward() -> None:
    """Takes torch's first backward pass before any export.

    Some tests fork. After `torch.export`, which makes a device that is not the CPU known, the first backward pass starts
    autograd's threads, and no forked process can take another one then.
    """
    import torch

    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture(scope="session", autouse=True)
def short_measurements() -> Iterator[None]:
    """Which of several backends is the fastest decides no test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resnetlab.inference.parity_check.PAUSE", 0.001)
        patch.setattr("resnetlab.inference.parity_check.BUDGET", 0.0)
        yield


@pytest.fixture(scope="module", autouse=True)
def plain_reports(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reports of runs have no curves where no test looks at them: drawing takes half of the time of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        if request.path.name not in SHOWING_CURVES:
            patch.setattr("resnetlab.training.report.draw_curves", lambda *_: None)
        yield


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests download only from their own servers, and retry without waiting."""
    monkeypatch.setattr("resnetlab.data.cifar.SITE", "http://127.0.0.1:9/")
    monkeypatch.setattr("resnetlab.data.download.PAUSES", (0.0, 0.0))


SHOWING_CURVES = (
    *("test_report.py", "test_stops.py", "test_resume.py", "test_folder.py", "test_training.py", "test_multi_label.py"),
    *("test_own_network.py", "test_seen.py"),
)
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def cifar10_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds cifar-10-batches-bin, all 60,000 images. Read only: all workers share it."""
    script = REPOSITORY.parent / "shared" / "data" / "make_cifar10.py"
    if not script.is_file():
        pytest.skip("CIFAR-10 is not there: ../shared/data, beside the repository, is missing")
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # each worker has a folder of its own in there
    folder = root / "cifar10"
    with FileLock(root / "cifar10.lock"):  # one worker writes the files, the others wait
        if not (folder / "cifar-10-batches-bin" / "batches.meta.txt").is_file():  # the script writes it last
            subprocess.run([sys.executable, script, folder], check=True)
    return folder
