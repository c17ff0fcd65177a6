"""The images of training step t and their augmentation: functions of (seed, step, position) only.

A step's batch does not depend on the number of processes that share it: each process takes a range of positions
(`rank_positions`) and gives each position the augmentation that one process with all of them would give it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnetlab.data import crops, trivial_augment
from resnetlab.data.augment import Augmentation
from resnetlab.data.batch_copier import BatchCopier
from resnetlab.data.crops import Crop, resize_crop
from resnetlab.data.dataset import MemorySplit, Split
from resnetlab.data.device_decode import decode_images, decodes_on_device, pack_images, unpack_images
from resnetlab.data.own_transform import Transform, TransformedReader
from resnetlab.data.prefetch import BatchReader, LoadedBatch, Prefetcher, preprocess_image, stack_images
from resnetlab.data.remote_shards import ShardFetcher
from resnetlab.data.shard_order import BLOCK, ShardOrder, group_positions
from resnetlab.data.shards import ShardSource
from resnetlab.device import DeviceConfig, to_device
from resnetlab.distributed import World
from resnetlab.errors import DataError, UsageError
from resnetlab.formatting import format_count
from resnetlab.preprocessing import Preprocessing
from resnetlab.process_place import read_process_place
from resnetlab.random import SAMPLING_VERSION, KeyedPermutation, StepDraws, keyed_epoch, make_generator, seed_for


class Batch(NamedTuple):
    """Input of one step.

    Attributes:
        images: float32 (B, C, h, w) in channels-last memory.
        labels: int64 (B,); for mixed images the class with the largest share.
        targets: targets of the loss: the labels, or for mixed images float32 (B, classes), rows sum to 1.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor


EpochOrder = Callable[[int, int, int], Tensor | KeyedPermutation]  # (seed, n, epoch) -> n indices


def step_indices(
    seed: int, n: int, batch: int, step: int, epoch_indices: EpochOrder | None = None, positions: range | None = None
) -> Tensor:
    """Indices of the `batch` images of step `step`, or of those at `positions` of it; int64 (batch,).

    The epochs are permutations of all images (or `epoch_indices`), one after the other. A batch may span two of them, so no
    batch is short.
    """
    epoch_indices = epoch_indices or _permutation
    chunks = []
    own = range(batch) if positions is None else positions
    position, end = step * batch + own.start, step * batch + own.stop
    while position < end:
        epoch, start = divmod(position, n)
        stop = min(n, start + end - position)
        chunks.append(epoch_indices(seed, n, epoch)[start:stop].long())
        position += stop - start
    return torch.cat(chunks)


def rank_positions(batch_size: int, world: World) -> range:
    """The positions of a step that one process takes: whole pairs, divided as evenly as possible.

    Pairs (0 and 1, 2 and 3, …) stay together because mixing combines them. If the ranges differ in length, the mean over the
    step is the mean of the processes' means weighted by their lengths. Raises UsageError with fewer pairs than processes.
    """
    if batch_size // 2 < world.size:
        raise UsageError(
            f"a batch of {batch_size:,} cannot be shared by {world.size:,} processes; each needs at least two images: "
            f"--set batch={2 * world.size}."
        )
    start, end = (2 * (batch_size // 2 * rank // world.size) for rank in (world.rank, world.rank + 1))
    return range(start, batch_size if world.rank == world.size - 1 else end)


def _permute(seed: int, n: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=make_generator(seed, "order", epoch))


_permutation = lru_cache(maxsize=2)(_permute)  # a batch spans two epochs at most unless it is larger than the data set


@dataclass(frozen=True, eq=False)
class BalancedEpochs:
    """Epochs in which every class has equally many images: those of small classes occur several times, of large ones some.

    Over all epochs the images of a class occur equally often, since each class has epochs of its own.

    Attributes:
        members: of each class the indices of its images (`group_positions`).
    """

    members: tuple[Tensor, ...]

    @staticmethod
    def from_labels(labels: Tensor) -> BalancedEpochs:
        """For labels int64 (N,); classes without an image are left out."""
        return BalancedEpochs(group_positions(labels))

    @property
    def length(self) -> int:
        """Images of an epoch: about as many as there are, and a whole number for each class."""
        return max(1, round(sum(map(len, self.members)) / len(self.members))) * len(self.members)

    def __call__(self, seed: int, n: int, epoch: int) -> Tensor:
        """The n = `length` indices of an epoch, of the type of `members`."""
        return _balanced_epoch(self, seed, n, epoch)


@lru_cache(maxsize=2)  # a step takes a small part of an epoch
def _balanced_epoch(epochs: BalancedEpochs, seed: int, n: int, epoch: int) -> Tensor:
    each = n // len(epochs.members)
    chosen = [
        images[step_indices(seed_for(seed, "balanced", c), len(images), each, epoch, _permute)]
        for c, images in enumerate(epochs.members)
    ]
    return torch.cat(chosen)[_permute(seed, n, epoch)]


class RandomStream(NamedTuple):
    """Random numbers in [0, 1), `per_image` for each image of a step; `use` is part of their seed."""

    use: str
    per_image: int
    dtype: torch.dtype = torch.float64

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The numbers of n images, (n, per_image)."""
        return torch.rand(n, self.per_image, generator=generator, dtype=self.dtype)


@dataclass(frozen=True)
class Sampler:
    """The images of a step that one process takes, and their random numbers. Picklable, so that workers can run it.

    Attributes:
        n: images of the data set.
        batch_size: images of a step, over all processes.
        positions: the positions of the step that this process takes.
        balanced: draws equally many images of every class; None for permutations of all.
        keyed: permutations that take no memory (random.KeyedPermutation).
        shards: an order that goes through shards a few at a time.
        version: of the random numbers (random.StepDraws).
    """

    n: int
    batch_size: int
    seed: int
    positions: range
    streams: tuple[RandomStream, ...] = ()
    balanced: BalancedEpochs | None = None
    keyed: bool = False
    shards: ShardOrder | None = None
    version: int = SAMPLING_VERSION

    def indices(self, step: int) -> Tensor:
        """Indices of this process's images; int64 (len(positions),)."""
        if self.shards is not None:
            return self.shards.indices(step, self.positions)
        n = self.n if self.balanced is None else self.balanced.length
        epochs = keyed_epoch if self.keyed else self.balanced
        return step_indices(self.seed, n, self.batch_size, step, epochs, self.positions)

    def __call__(self, step: int) -> list[tuple[Any, ...]]:
        """(index, random numbers of each stream) of each image."""
        own = torch.arange(self.positions.start, self.positions.stop)
        draws = StepDraws(self.seed, step, self.batch_size, own, self.version)
        numbers = [draws(stream.use, stream.draw)[0].tolist() for stream in self.streams]
        return list(zip(self.indices(step).tolist(), *numbers, strict=True))


def read_train_image(
    split: Split,
    preprocessing: Preprocessing,
    crop: Crop,
    index: int,
    crop_draws: list[float],
    augment_draws: list[float] | None = None,
) -> Tensor:
    """Image `index` of a split, decoded, cropped and, given `augment_draws`, augmented; uint8 (h, w, C)."""
    size = preprocessing.size[0]
    if crop.kind == "centre":
        pixels = preprocess_image(preprocessing, split.read_image(index))
    else:
        pixels = resize_crop(split.read_region(index, lambda h, w: crop.compute_box(h, w, size, crop_draws)), size)
    return pixels if augment_draws is None else trivial_augment.trivial_augment(pixels, augment_draws)


def crop_image(pixels: Tensor, preprocessing: Preprocessing, crop: Crop, draws: list[float]) -> Tensor:
    """A decoded image (H, W, C), cropped and resized for the network where it is; (h, w, C)."""
    if crop.kind == "centre":
        return preprocess_image(preprocessing, pixels)
    return crop(pixels, preprocessing.size[0], draws)


@dataclass(eq=False)
class TrainLoader:
    """Training batches of a split.

    Attributes:
        batch_size: images in a step, over all processes of `device_config.world`; `batch` returns the images of this one.
        transform: a function of the user's own that changes each image.
        shard_groups: for sampling "shards".
        shard_space: bytes of this machine's disk that fetched shards may take; None for most of what is free.
        version: of the random numbers (random.StepDraws).
    """

    split: Split
    preprocessing: Preprocessing
    augmentation: Augmentation
    batch_size: int
    seed: int
    device_config: DeviceConfig
    sampling: str = "shuffle"
    transform: Transform | None = None
    shard_groups: int = 1
    shard_space: int | None = None
    version: int = SAMPLING_VERSION

    def __post_init__(self) -> None:
        _ = self._fetcher  # raises if shards do not suit the sampling, or too few of them fit on this machine's disk

    def batch(self, step: int) -> Batch:
        """This process's images of step `step`, augmented, normalised and mixed, on the device.

        Images that cannot be read are missing from it if they are to be skipped.
        """
        sampler = self._sampler
        indices, device = sampler.indices(step), self.device_config.device
        one_by_one = self.augmentation.trivial_augment or self.augmentation.crop.kind != "centre" or self.transform
        if self._on_device is not None and not one_by_one:
            chosen, read = to_device(indices, device), torch.arange(len(indices))
            pixels, labels = (x.index_select(0, chosen) for x in self._on_device)
        else:
            if self._fetcher is not None:
                self._fetcher.advance(step)
            loaded = self._prefetcher.get(step)
            if decodes_on_device(self.split, device):
                loaded = self._decode_and_crop(loaded, sampler(step))
            if not loaded.positions:
                raise DataError(
                    f"none of the {format_count(len(indices), 'image')} of step {step:,} can be read; fix "
                    "them: resnetlab data check."
                )
            read = torch.tensor(loaded.positions)
            pixels = loaded.samples if loaded.samples.device.type == "cuda" else self._copier(loaded.samples)
            labels = to_device(self.split.labels[indices[read]], device)
        positions = sampler.positions.start + read
        draws = StepDraws(self.seed, step, self.batch_size, positions, self.version)
        images = self.augmentation(pixels, self.preprocessing, draws)
        if not self.augmentation.mixing:
            return Batch(images, labels, labels)
        images, targets = self.augmentation.mixing(images, labels, self.seed, step, positions)
        return Batch(images, targets.argmax(1), targets)

    def _decode_and_crop(self, loaded: LoadedBatch[Any], arguments: list[tuple[Any, ...]]) -> LoadedBatch[Tensor]:
        """The images of a step that are decoded and cropped on the device, by their index and random numbers."""
        chosen = [arguments[position] for position in loaded.positions]
        indices, device = [index for index, *_ in chosen], self.device_config.device
        read, images = decode_images(self.split, unpack_images(loaded.samples), indices, device)
        crop = self.augmentation.crop
        cropped = [crop_image(x, self.preprocessing, crop, chosen[k][1]) for k, x in zip(read, images, strict=True)]
        return LoadedBatch(stack_images(cropped), [loaded.positions[k] for k in read], {})

    @cached_property
    def _on_device(self) -> tuple[Tensor, Tensor] | None:
        """Images and labels of a split in memory, moved to the device; None for images in files."""
        if not isinstance(self.split, MemorySplit):
            return None
        device = self.device_config.device
        return to_device(self.split.images, device), to_device(self.split.labels, device)

    @cached_property
    def _copier(self) -> BatchCopier:
        return BatchCopier(self.device_config.device)

    @cached_property
    def _sampler(self) -> Sampler:
        streams = [RandomStream("crop", crops.NUM_DRAWS)]
        if self.augmentation.trivial_augment:
            streams.append(RandomStream("trivial", trivial_augment.NUM_DRAWS))
        if self.transform is not None:
            streams.append(RandomStream("transform", 1))
        positions = rank_positions(self.batch_size, self.device_config.world)
        balanced = BalancedEpochs.from_labels(self.split.labels) if self.sampling == "balanced" else None
        keyed, order = self.sampling == "keyed", None
        if self.sampling == "shards":
            order = ShardOrder.from_split(self.split, self.shard_groups, self.seed, self.batch_size)
        return Sampler(
            len(self.split),
            self.batch_size,
            self.seed,
            positions,
            tuple(streams),
            balanced,
            keyed,
            order,
            self.version,
        )

    @cached_property
    def _fetcher(self) -> ShardFetcher | None:
        """In the first process of a machine, if its shards are elsewhere."""
        source, world, place = getattr(self.split, "source", None), self.device_config.world, read_process_place()
        order = self._sampler.shards if self.sampling == "shards" else None
        remote = source.remote if isinstance(source, ShardSource) else None
        if order is None or remote is None or not place.is_first_here:
            return None
        last = replace(world, rank=world.rank + place.local_size - 1)
        ends = rank_positions(self.batch_size, world).start, rank_positions(self.batch_size, last).stop
        here = range(*ends)
        needed = partial(order.shards_from, positions=here)
        return ShardFetcher(remote, needed, self.shard_space, 2 * BLOCK * len(order.groups_of(here)))

    @cached_property
    def _prefetcher(self) -> Prefetcher[Any]:
        split, pin = self.split, self.device_config.device.type == "cuda"
        if decodes_on_device(split, self.device_config.device):
            sampler = replace(self._sampler, streams=())  # numbers are drawn where images are cropped
            encoded = BatchReader(sampler, split.read_encoded, split.name_of, pack_images)
            return Prefetcher(encoded, split.errors, split.workers)
        read: Callable[..., Tensor] = partial(read_train_image, split, self.preprocessing, self.augmentation.crop)
        if self.transform is not None:
            read = TransformedReader(read, self.transform)
        reader = BatchReader(self._sampler, read, split.name_of, stack_images)
        return Prefetcher(reader, split.errors, split.workers, pin)

    @property
    def seconds_reading(self) -> float:
        """Seconds that this process has spent reading images, or waiting for its workers to."""
        return self._prefetcher.seconds

    def close(self) -> None:
        """Stops the workers, if any."""
        self._prefetcher.close()
        if self._fetcher is not None:
            self._fetcher.close()
