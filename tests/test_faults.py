"""Processes that stop, die or never come: the others end with one sentence within the time-out; and few files are open."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch.distributed import PrefixStore

from process_groups import call_in_processes, free_port
from resnetlab import distributed
from resnetlab.distributed import World, join_process_group
from resnetlab.errors import PROCESS_GONE, RunError, first_line

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

NEW_NETWORK = 0x40000000  # unshare(2)'s CLONE_NEWNET


def suffer_a_stopped_process(world: World, in_turn: bool) -> tuple[str, float]:
    """The first process is stopped, and goes on when the others have ended: the error of each, and when it came."""
    pids = world.merge_dicts({str(world.rank): str(os.getpid())})
    start = time.monotonic()
    try:
        if world.is_first and not in_turn:
            os.kill(os.getpid(), signal.SIGSTOP)
        with world.first_process_first():
            if world.is_first and in_turn:
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGSTOP)
        world.tree_all_reduce_(torch.ones(5))
    except RunError as error:
        seconds = time.monotonic() - start
        if world.rank == world.size - 1:
            time.sleep(1)
            os.kill(int(pids["0"]), signal.SIGCONT)
        return str(error), seconds
    return "no error", 0.0


@pytest.mark.parametrize("in_turn", [False, True])
def test_nobody_waits_for_a_stopped_process(in_turn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in a sum, and not while it has its turn to download; it ends too when it goes on."""
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))
    for error, seconds in call_in_processes(3, lambda world: suffer_a_stopped_process(world, in_turn)):
        assert error.startswith(PROCESS_GONE) and "\n" not in error
        assert seconds < 30


def test_a_failed_collective_fails_the_next_ones_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not wait for a time-out each."""

    def run(world: World) -> float:
        if world.is_first:
            time.sleep(5)
            return 0.0
        ends = []
        for _ in range(5):
            with pytest.raises(RunError, match=PROCESS_GONE):
                world.all_reduce_max(1)
            ends.append(time.monotonic())
        return ends[-1] - ends[0]

    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))
    assert max(call_in_processes(2, run)) < 1


def test_a_meeting_place_that_nobody_answers_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=1))
    port = str(free_port())
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    start = time.monotonic()
    sentence = f"the 2 processes of this job did not meet at 127.0.0.1:{port} "
    with pytest.raises(RunError, match=sentence) as caught, join_process_group():
        pass
    assert "\n" not in str(caught.value) and time.monotonic() - start < 30


def test_a_restarted_job_does_not_read_what_the_failed_one_wrote() -> None:
    """The store is the same, and one process has been restarted more often than the others, as on another machine."""

    def run(world: World) -> list[tuple[bool, bytes, bool]]:
        store, found = torch.distributed.distributed_c10d._get_default_store(), []
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        for attempt in range(3):
            os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt if world.rank == 1 else 0)
            time.sleep(0.2 * world.rank * attempt)
            own, restarted = distributed._meet(store, world.rank, world.size)
            fresh = not own.check([f"place {world.rank}"])
            own.set(f"place {world.rank}", f"{attempt}")
            found.append((fresh, own.get(f"place {1 - world.rank}"), restarted))
        return found

    expected = [(True, b"0", True), (True, b"1", True), (True, b"2", True)]
    assert call_in_processes(2, run) == [expected, expected]  # the harness has met there before


def suffer_a_cut_link(rank: int, port: int, pipe: Connection) -> None:
    """In a network of its own: the error of a sum whose link was cut, and the seconds until the process had left the group."""
    assert not ctypes.CDLL(None).unshare(NEW_NETWORK)
    pipe.send(os.getpid())
    pipe.recv()  # the link is there
    places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    network = {"MASTER_ADDR": "10.99.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": f"link{rank}"}
    os.environ |= {key: str(value) for key, value in (places | network).items()}
    start = time.monotonic()
    try:
        with join_process_group() as world:
            world.tree_all_reduce_(torch.ones(5))
            pipe.send("met")
            pipe.recv()  # the link is cut
            start = time.monotonic()
            world.tree_all_reduce_(torch.ones(5))
    except RunError as error:
        pipe.send((str(error), time.monotonic() - start))


@pytest.mark.skipif(
    not (sys.platform == "linux" and os.geteuid() == 0 and shutil.which("ip") and shutil.which("nsenter")),
    reason="makes networks of its own, as root",
)
def test_both_ends_of_a_cut_link_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing arrives any more, not even that the other end is gone."""
    monkeypatch.setattr(distributed, "TIMEOUT", timedelta(seconds=2))
    context, pipes, port = multiprocessing.get_context("fork"), list[Connection](), free_port()

    def run(pid: int, command: str) -> None:
        subprocess.run(["nsenter", f"--target={pid}", "--net", "sh", "-c", command], check=True)

    for rank in range(2):
        pipe, other = context.Pipe()
        context.Process(target=suffer_a_cut_link, args=(rank, port, other), daemon=True).start()
        pipes.append(pipe)
    first, second = (pipe.recv() for pipe in pipes)
    run(first, f"ip link add link0 type veth peer name link1 netns {second}")
    for rank, pid in enumerate((first, second)):
        run(pid, f"ip addr add 10.99.0.{rank + 1}/24 dev link{rank} && ip link set lo up && ip link set link{rank} up")
    for pipe in pipes:
        pipe.send("linked")
    for pipe in pipes:
        assert pipe.poll(40) and pipe.recv() == "met"
    run(first, "ip link set link0 down")
    for pipe in pipes:
        pipe.send("cut")
    for pipe in pipes:
        assert pipe.poll(40)
        error, seconds = pipe.recv()
        assert error.startswith(PROCESS_GONE) and "\n" not in error and seconds < 2 + 30


def count_open_files() -> int:
    """Without the pipes of this test."""
    count = 0
    for file in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the folder itself, which is read here
            count += not os.readlink(file).startswith("pipe:")
    return count


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files")
def test_processes_need_few_open_files() -> None:
    def run(world: World) -> int:
        world.tree_all_reduce_(torch.ones(100))
        world.merge_dicts({"a": "b"})
        world.broadcast(1, torch.ones(3))
        with world.first_process_first():
            return count_open_files()

    before = count_open_files()
    _, *files = call_in_processes(12, run, machines=3)  # in the first one is the store, as in torchrun
    assert max(files) - before <= 11 + 12


def test_an_error_without_a_message_is_named_by_its_type() -> None:
    """Its first line ended in an IndexError, in a dozen places."""
    assert first_line(RuntimeError(" \n")) == "RuntimeError" and first_line(ValueError("\na\nb")) == "a"
    with pytest.raises(RunError, match=r"\(RuntimeError\); start the command again"), distributed._connection_errors():
        raise RuntimeError
