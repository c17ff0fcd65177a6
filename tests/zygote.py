"""Processes that need not import torch: each is a fork of one process that has imported it, and computed nothing.

`python()` is a program for tests to start in place of `sys.executable`, with -m, -c or a script. It asks the zygote for a fork
that gets its arguments, environment, folder and files, waits for it, passes SIGINT and SIGTERM on, and ends as the fork ends.
If it is killed, the fork is killed too; whoever kills it waits for that by reading the fork's output to its end.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import importlib
import json
import multiprocessing
import multiprocessing.spawn
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from functools import cache
from itertools import dropwhile
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from filelock import FileLock

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
def is_open(file):
    try:
        return os.fstat(file) is not None
    except OSError:
        return False
def pass_on(number, _):
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # it has just ended
        pass
files = [file for file in map(int, os.listdir("/dev/fd")) if is_open(file)]
with socket.socket(socket.AF_UNIX) as zygote:
    zygote.connect({address!r})
    request = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd(), "parent": os.getppid()}}
    socket.send_fds(zygote, [b"fork"], files)
    with zygote.makefile("rw") as stream:
        print(json.dumps(request | {{"files": files}}), file=stream, flush=True)
        pid = int(stream.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, pass_on)
        status = int(stream.readline())
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
MAX_FILES = 100  # of a process


@cache
def python() -> str:
    """The program; the workers of a test run share one zygote, which ends with the run."""
    worker = "PYTEST_XDIST_WORKER" in os.environ
    run = os.getppid() if worker else os.getpid()
    folder = Path(tempfile.gettempdir(), f"resnetlab-zygote-{run}")
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        client, address = folder / "python", str(folder / "socket")
        if not answers(address):
            Path(address).unlink(missing_ok=True)  # of one that was killed, for a run of the same number
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(address)
                listener.listen(64)  # who connects waits until torch is imported
                none, command = subprocess.DEVNULL, [sys.executable, __file__, str(listener.fileno()), str(run), client]
                started = subprocess.Popen(command, pass_fds=[listener.fileno()], stdin=none, stdout=none, stderr=none)
            started.returncode = 0  # it may outlive this worker, and nobody waits for it
            client.write_text(CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)
    return str(client)


def answers(address: str) -> bool:
    with socket.socket(socket.AF_UNIX) as zygote:
        try:
            zygote.connect(address)
        except OSError:
            return False
    return True


@contextlib.contextmanager
def spawning() -> Iterator[None]:
    """Lets multiprocessing's "spawn" start such processes too."""
    before = multiprocessing.spawn.get_executable()
    multiprocessing.set_executable(python())
    try:
        yield
    finally:
        multiprocessing.set_executable(before)


def serve(listener: socket.socket, run: int, client: str) -> None:
    """Forks until the test run has ended."""
    wake, woken = socket.socketpair()
    for end in (wake, woken):
        end.setblocking(False)
    signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, whose other processes get it too
    children: dict[socket.socket, int] = {}  # by the connection with the program that waits for one
    while is_alive(run):
        for ready in select.select([listener, wake, *children], [], [], 1)[0]:
            if ready is wake:
                wake.recv(4096)
            elif ready in children:  # the program was killed
                os.kill(children[ready], signal.SIGKILL)
            else:
                connection, _ = listener.accept()
                if (request := receive(connection)) is None:
                    continue
                if not (child := os.fork()):
                    for each in (listener, wake, woken, connection, *children):
                        each.close()
                    become(*request, client)
                children[connection] = child
                for file in request[1]:
                    os.close(file)
                send(connection, child)
        for connection, child in list(children.items()):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                del children[connection]
                send(connection, os.waitstatus_to_exitcode(status))
                connection.close()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """A request and its open files; None if the program has gone already."""
    try:
        with connection.makefile("r") as stream:
            _, files, _, _ = socket.recv_fds(connection, 4, MAX_FILES)
            return json.loads(stream.readline()), files
    except (OSError, ValueError):
        connection.close()
        return None


def send(connection: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # the program has gone
        connection.sendall(f"{number}\n".encode())


def become(request: dict[str, Any], files: list[int], client: str) -> NoReturn:
    """Runs what is asked for as a new interpreter would, and exits."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    above = [fcntl.fcntl(file, fcntl.F_DUPFD, 2 * MAX_FILES) for file in files]
    for file in files:
        os.close(file)
    for number, file in zip(request["files"], above, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    parent = request["parent"]
    os.getppid = lambda: parent
    sys.executable, code = client, 0
    multiprocessing.set_executable(client)
    arguments = dropwhile(lambda word: word.startswith("-") and word not in ("-c", "-m"), request["arguments"])
    how, *rest = arguments
    what = rest.pop(0) if how in ("-c", "-m") else how
    sys.argv = ["-c" if how == "-c" else what, *rest]
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif how == "-c":
            sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
        else:
            runpy.run_path(what, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


PRELOADED = (
    "resnetlab.cli.main", "resnetlab.training.train", "matplotlib.figure", "matplotlib.backends.backend_svg",
    "torch._dynamo",  # which torch.utils.checkpoint loads
    "torch.distributed.launcher.api", "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "resnetlab.serve.app", "resnetlab.serve.process",
)  # fmt: skip


if __name__ == "__main__":
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # of an extra
            importlib.import_module(name)
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
    shutil.rmtree(Path(sys.argv[3]).parent, ignore_errors=True)
