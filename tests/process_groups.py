"""Functions called in several processes that form a process group."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from resnetlab.distributed import World, join_process_group

LIMIT = 40  # seconds


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def call_in_processes(size: int, function: Callable[[World], Any], machines: int = 1) -> list[Any]:
    """What the function returns in each of `size` processes, which seem to be on so many machines."""
    context, here = multiprocessing.get_context("fork"), size // machines
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    pipes, processes = [], []
    for rank in range(size):
        receiving, sending = context.Pipe(duplex=False)
        values = {key: str(value) for key, value in (common | {"RANK": rank, "LOCAL_RANK": rank % here}).items()}
        processes.append(context.Process(target=_take_part, args=(function, values, sending), daemon=True))
        processes[-1].start()
        sending.close()
        pipes.append(receiving)
    try:
        return [_receive(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.join(LIMIT)
            process.kill()


def _take_part(function: Callable[[World], Any], environment: dict[str, str], pipe: Any) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        with join_process_group() as world:
            result = function(world)
        pipe.send((result, ""))
    except BaseException:
        pipe.send((None, traceback.format_exc()))


def _receive(pipe: Any) -> Any:
    assert pipe.poll(LIMIT), "a process does not end"
    result, error = pipe.recv()
    assert not error, error
    return result


def sizes(groups: Sequence[Any]) -> list[int]:
    return [torch.distributed.get_world_size(group) for group in groups]
