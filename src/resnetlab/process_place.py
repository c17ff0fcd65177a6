"""The place of this process among those that a launcher such as torchrun has started."""

from __future__ import annotations

import os
from typing import NamedTuple


class ProcessPlace(NamedTuple):
    """What the launcher's environment variables say; without a launcher, the only process.

    Attributes:
        rank: number among all processes; the first one prints and writes files.
        size: number of processes.
        local_rank: number among those on this machine.
        local_size: processes on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_first_here(self) -> bool:
        """Whether it is the first process on its machine."""
        return self.local_rank == 0


def read_process_place() -> ProcessPlace:
    """The place of this process."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    place = ProcessPlace(*(int(os.environ.get(name, default)) for name, default in names.items()))
    return place if place.size > 1 else place._replace(local_size=1)  # which a batch system may have left to a shell
