"""Epochs that go through tar shards a few at a time, so that a machine need not have all of them.

In every epoch the shards are shuffled and dealt to groups. A group gives an equal share of every step: the images of BLOCK of
its shards, shuffled together, then those of the next ones. So images are near each other that are in the same shards, which
`pack` has shuffled; across an epoch every image occurs once. Groups of unequal size begin their epochs at different steps.

The order is a function of the seed, the step and the number of groups. On a number of machines that divides it, each machine
reads the shards of its own groups alone; on any other the images are the same.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from resnetlab.data.disk_split import DiskSplit
from resnetlab.data.shards import ShardSource
from resnetlab.errors import UsageError
from resnetlab.random import make_generator

BLOCK = 4  # shards


@dataclass(frozen=True, eq=False)
class ShardOrder:
    """The order of the images of a split of shards.

    Attributes:
        members: of each shard that has images the positions in the split (`group_positions`).
        shards: the shards' numbers in the source.
    """

    members: tuple[Tensor, ...]
    shards: tuple[int, ...]
    groups: int
    seed: int
    batch: int

    @staticmethod
    def from_split(split: object, groups: int, seed: int, batch: int) -> ShardOrder:
        """Raises UsageError if the split has no shards, or too few, or a step cannot be shared by the groups."""
        if not isinstance(split, DiskSplit) or not isinstance(split.source, ShardSource):
            raise UsageError("sampling=shards is for tar shards; make them: resnetlab data pack DATA FOLDER.")
        of_image = torch.from_numpy(split.source.shard)[split.indices].long()
        found = torch.nonzero(of_image.bincount()).flatten().tolist()
        if batch % groups or groups > len(found):
            raise UsageError(
                f"shard_groups={groups} must divide the batch of {batch:,}, and be no more than the {len(found):,} shards."
            )
        return ShardOrder(group_positions(of_image), tuple(found), groups, seed, batch)

    def indices(self, step: int, positions: range) -> Tensor:
        """The split's images at these positions of a step, int64."""
        share, parts = self.batch // self.groups, list[Tensor]()
        for group in self.groups_of(positions):
            start, stop = (min(max(p - group * share, 0), share) for p in (positions.start, positions.stop))
            parts += self._read(group, step * share + start, step * share + stop)
        return torch.cat(parts).long()

    def groups_of(self, positions: range) -> range:
        """The groups that give these positions of every step."""
        share = self.batch // self.groups
        return range(positions.start // share, -(-positions.stop // share))

    def shards_from(self, step: int, positions: range) -> Iterator[int]:
        """The shards that these positions need from a step on, in the order in which they are needed, without end."""
        share = self.batch // self.groups
        blocks = [
            (start, group, key)
            for group in self.groups_of(positions)
            for start, key in [self._find(group, step * share)]
        ]
        heapq.heapify(blocks)
        while blocks:
            start, group, (epoch, block) = blocks[0]
            shards = self._block_shards(epoch, group, block)
            yield from (self.shards[k] for k in shards)
            end = start + sum(len(self.members[k]) for k in shards)
            heapq.heapreplace(blocks, (end, group, self._find(group, end)[1]))

    def first_images(self, count: int) -> Tensor:
        """Positions of images in the first shards of the first epoch, ascending: `count` or more if two blocks have them.

        So many shards fit on every machine's disk (`remote_shards.ShardFetcher`).
        """
        chosen: list[Tensor] = []
        for k in _shuffle_shards(self, 0)[: 2 * BLOCK]:
            chosen.append(self.members[k])
            if sum(map(len, chosen)) >= count:
                break
        return torch.cat(chosen).sort().values.long()

    def _read(self, group: int, position: int, stop: int) -> Iterator[Tensor]:
        """The images of a group from a position on, over all its epochs."""
        while position < stop:
            start, (epoch, block) = self._find(group, position)
            images = _shuffle_block(self, epoch, group, block)
            part = images[position - start : stop - start]
            yield part
            position += len(part)

    def _find(self, group: int, position: int) -> tuple[int, tuple[int, int]]:
        """Where the block of a position starts, and its epoch and number."""
        starts = _epoch_starts(self, group).copy()  # another thread, which fetches shards, may be in here too
        while starts[-1] <= position:
            shards = _shuffle_shards(self, len(starts) - 1)[group :: self.groups]
            starts.append(starts[-1] + sum(len(self.members[k]) for k in shards))
        _epoch_starts(self, group)[:] = starts
        epoch = bisect_right(starts, position) - 1
        start, block = starts[epoch], 0
        while True:
            end = start + sum(len(self.members[k]) for k in self._block_shards(epoch, group, block))
            if position < end:
                return start, (epoch, block)
            start, block = end, block + 1

    def _block_shards(self, epoch: int, group: int, block: int) -> list[int]:
        return _shuffle_shards(self, epoch)[group :: self.groups][BLOCK * block : BLOCK * (block + 1)]


def group_positions(groups: Tensor) -> tuple[Tensor, ...]:
    """Of each number that occurs in int64 (N,) its positions, ascending; int32, half the memory, where N allows it."""
    sizes, dtype = groups.bincount(), torch.int32 if len(groups) < 2**31 else torch.int64
    return torch.split(torch.argsort(groups, stable=True).to(dtype), sizes[sizes > 0].tolist())


@lru_cache(maxsize=64)
def _epoch_starts(order: ShardOrder, group: int) -> list[int]:
    """Positions at which a group's epochs start, as many as were asked for; grows."""
    return [0]


@lru_cache(maxsize=8)
def _shuffle_shards(order: ShardOrder, epoch: int) -> list[int]:
    found: list[int] = torch.randperm(
        len(order.members), generator=make_generator(order.seed, "shards", epoch)
    ).tolist()
    return found


@lru_cache(maxsize=64)
def _shuffle_block(order: ShardOrder, epoch: int, group: int, block: int) -> Tensor:
    images = torch.cat([order.members[k] for k in order._block_shards(epoch, group, block)])
    generator = make_generator(order.seed, "shard block", epoch, group, block)
    return images[torch.randperm(len(images), generator=generator)]
