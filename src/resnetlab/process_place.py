"""The place of this process among those that a launcher such as torchrun has started."""

from __future__ import annotations

import os
from typing import NamedTuple

from resnetlab.errors import UsageError


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
    """The place of this process; raises UsageError for a variable that is not a number."""
    alone, numbers = ProcessPlace(0, 1, 0, 1), []
    for name, default in zip(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), alone, strict=True):
        text = os.environ.get(name) or default
        try:
            numbers.append(int(text))
        except ValueError:
            raise UsageError(
                f"the environment variable {name} is {text!r}, not a number; launchers such as torchrun set it: unset it."
            ) from None
    place = ProcessPlace(*numbers)
    return place if place.size > 1 else alone  # whatever a batch system has left of the others in a shell
