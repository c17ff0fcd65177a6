"""Data that one process of a machine loads, and all of them keep in memory once.

The first process of a machine writes what it loaded, with every array as it is, into a temporary file that only its user can
read; all processes of the machine map that file into their memory, where its pages are the same.
"""

from __future__ import annotations

import contextlib
import mmap
import pickle
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from resnetlab.distributed import World
from resnetlab.process_place import read_process_place
from resnetlab.run_folder import temporary_folder

T = TypeVar("T")
ALIGNMENT = 64  # bytes


@contextlib.contextmanager
def share_loading(world: World) -> Iterator[Callable[[Callable[[], T]], T]]:
    """Gives a function that calls the function it gets in the first process of each machine, and returns its result in all.

    The first process has its turn first (`World.first_process_first`), so what the body downloads is there for the others.
    Where the file cannot be written, every process loads for itself.
    """
    place = read_process_place()
    first = place.is_first_here
    with contextlib.ExitStack() as stack:
        if place.local_size == 1:
            folder = None
        else:
            own = str(stack.enter_context(temporary_folder(Path(gettempdir()), "resnetlab-data-"))) if first else ""
            key = str(world.rank - place.local_rank)
            folder = Path(world.merge_dicts({key: own} if first else {}).get(key, ""))

        def load_once(load: Callable[[], T]) -> T:
            if folder is None:
                return load()
            if first:
                value = load()
                with contextlib.suppress(OSError):
                    _write_value(value, folder)
            else:
                value = None
            try:
                return cast(T, _map_value(folder))
            except OSError:
                return load() if value is None else value

        with world.first_process_first():
            yield load_once
        if folder is not None:
            world.all_reduce_max(0)  # the others have mapped the file


class _ArrayPickler(pickle.Pickler):
    """Keeps the memory of tensors out of the pickle, as pickle itself does that of arrays."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is Tensor and value.device.type == "cpu" and not value.requires_grad:
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _write_value(value: object, folder: Path) -> None:
    """Writes the arrays of a value into one file, and the rest of it, with the places of the arrays, into another."""
    buffers: list[pickle.PickleBuffer] = []
    ends = [0]
    with open(folder / "rest", "wb") as rest, open(folder / "arrays", "wb") as arrays:
        _ArrayPickler(rest, 5, buffer_callback=buffers.append).dump(value)
        for buffer in buffers:
            size = arrays.write(buffer.raw())
            arrays.write(bytes(-size % ALIGNMENT))
            ends += [ends[-1] + size, ends[-1] + size + -size % ALIGNMENT]
        arrays.write(bytes(1))  # an empty file cannot be mapped
    (folder / "ends").write_bytes(pickle.dumps(ends))


def _map_value(folder: Path) -> Any:
    """What `_write_value` wrote. A process that changes an array has a copy of the pages that it changes."""
    ends = pickle.loads((folder / "ends").read_bytes())  # written last
    with open(folder / "arrays", "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    places = list(pairwise(ends))[::2]
    return pickle.loads((folder / "rest").read_bytes(), buffers=[memory[start:end] for start, end in places])
