"""Files that several threads read where the disk makes one wait, and one thread where it does not."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resnetlab.data import folder, slow_disk, tables
from resnetlab.data.slow_disk import map_files
from resnetlab.errors import DataError

CLASSES = [f"class {i:02d}" for i in range(60)]


@pytest.fixture
def names(tmp_path: Path) -> Path:
    """A folder of 60 classes with two names each, one of them in a folder inside."""
    for i, name in enumerate(CLASSES):
        (tmp_path / "d" / name / "more").mkdir(parents=True)
        for file in ("more/0.jpg", f"{i}.jpg"):
            (tmp_path / "d" / name / file).write_bytes(bytes(i))
    return tmp_path / "d"


def make_slow(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, seconds: float) -> dict[str, int]:
    """Lets a function wait before it answers; returns how often each thread calls it."""
    calls: dict[str, int] = {}
    function: Callable[..., Any] = getattr(place, name)

    def wait(*args: Any) -> Any:
        thread = threading.current_thread().name
        calls[thread] = calls.get(thread, 0) + 1
        time.sleep(seconds)
        return function(*args)

    monkeypatch.setattr(place, name, wait)
    return calls


def test_a_folder_is_listed_by_threads_where_its_disk_is_slow(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = folder.read_layouts(names)
    calls = make_slow(monkeypatch, os, "scandir", 0.02)
    assert folder.read_layouts(names) == expected
    assert expected[0][""].sizes[:4] == [0, 0, 1, 1] and not expected[1]
    most = max(calls.values())
    assert len(calls) > 8 and sum(calls.values()) == 3 + 2 * 60 and most < 40, calls  # every folder once


def test_the_first_folder_that_cannot_be_read_is_named(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = folder.walk_folder

    def refuse(path: Path) -> Any:
        time.sleep(0.02)
        return [DataError(f"{path} cannot be read")] if path.name in CLASSES[20::7] else walk(path)

    monkeypatch.setattr(folder, "walk_folder", refuse)
    with pytest.raises(DataError, match="class 20 cannot be read"):
        folder.read_layouts(names)


@pytest.mark.parametrize("suffix", ["", ".jpg"])
def test_a_table_is_looked_up_by_threads_where_its_disk_is_slow(
    suffix: str, names: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suffix that the table omits is found once."""
    paths = [f"d/{name}/{i}.jpg" for i, name in enumerate(CLASSES)]
    images = tables.ImageList("t", names.parent, [path.removesuffix(suffix) for path in paths], CLASSES)
    expected = tables._find_files(images)
    assert expected == ([str(names.parent / path) for path in paths], list(range(60)))
    monkeypatch.setattr(tables, "PART", 2)
    calls = make_slow(monkeypatch, tables, "_file_size", 0.02)
    assert tables._find_files(images) == expected
    assert len(calls) > 8 and sum(calls.values()) <= 60 + 5, calls


@pytest.mark.parametrize("in_queue", [False, True])
def test_who_waits_for_a_core_and_not_for_a_disk_stays_one_thread(
    in_queue: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, main = [0.0], threading.current_thread()
    times = SimpleNamespace(perf_counter=lambda: clock[0], thread_time=lambda: 0.0)
    monkeypatch.setattr(slow_disk, "time", times)
    monkeypatch.setattr(slow_disk, "_seconds_in_queue", lambda: in_queue * clock[0])

    def wait(i: int) -> tuple[int, bool]:
        clock[0] += 0.01
        return i, threading.current_thread() is main

    found = list(map_files(wait, range(40)))
    assert [i for i, _ in found] == list(range(40))
    assert sum(in_main for _, in_main in found) == (40 if in_queue else 11)  # 0.1 s, and what goes beyond it


@pytest.mark.skipif(not slow_disk.SCHEDULE.exists(), reason="reads the time in the queue")
def test_the_time_in_the_queue_for_a_core_is_known() -> None:
    def stay_busy() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    before = slow_disk._seconds_in_queue()
    threads = [threading.Thread(target=stay_busy) for _ in range(4)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    stay_busy()
    waited = slow_disk._seconds_in_queue() - before
    assert 0 <= waited <= time.perf_counter() - start
