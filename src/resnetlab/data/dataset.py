"""Data sets: splits of images with labels and names, in memory or on disk (data.disk_split), and class names."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.jpeg_region import ChooseBox, cut_out
from resnetlab.errors import DataError, UsageError, unknown_name_error
from resnetlab.formatting import find_name_problem, format_count
from resnetlab.preprocessing import PixelFormat
from resnetlab.random import seed_for, seeds_for

A_TENTH = -1  # number of images to hold out: a tenth, where the data have no split to evaluate on while training
DECODE_ON = ("cpu", "device")  # what decodes the images on disk
MAX_TENTH = 1_000  # images: their error is known to 1.6 % or better (its standard deviation)
GROUP = "group"  # the column whose equal values stay together in every split
Columns = Mapping[str, NDArray[np.object_]]  # name -> one text per image


class Split(ABC):
    """A split: images with labels and names. What differs is where the images are.

    Attributes:
        labels: int64 (N,), positions in the data set's `classes`.
        errors: handles images that cannot be read, and lists those that were skipped so far.
        workers: processes that decode while the network computes; 0 decodes in this one.
        columns: the other columns of a table, a text per image; GROUP, if there are groups.
    """

    labels: Tensor
    errors: ErrorPolicy
    workers: int
    columns: Columns

    @property
    @abstractmethod
    def names(self) -> Sequence[str]:
        """One per image: the file's path below the data set's folder, or "test/12"."""

    @abstractmethod
    def name_of(self, i: int) -> str:
        """names[i], without building the list of all names."""

    @property
    @abstractmethod
    def pixel_format(self) -> PixelFormat:
        """How images are read: 8-bit RGB at first."""

    @abstractmethod
    def read_image(self, i: int) -> Tensor:
        """Image i, decoded, uint8 or float32 (H, W, C), at its own size; raises DataError if it cannot be read."""

    def read_region(self, i: int, choose_box: ChooseBox) -> Tensor:
        """The part (h, w, C) of image i that a crop shows, as `read_image` gives it."""
        return cut_out(self.read_image(i), choose_box)

    @abstractmethod
    def find_pixel_format(self, channels: int = 0) -> PixelFormat:
        """How the values of the first readable image are read so that nothing is lost (data.decode); raises DataError."""

    @abstractmethod
    def update_hash(self, digest: Any) -> None:
        """Updates a hash with the contents of the split."""

    @abstractmethod
    def _select(self, indices: Tensor) -> dict[str, Any]:
        """The fields that say which images these are, of the images at `indices`."""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> Self:
        """The images at `indices`, in that order."""
        columns = {name: values[indices.numpy()] for name, values in self.columns.items()}
        return self._replace(labels=self.labels[indices], columns=columns, **self._select(indices))

    def with_pixel_format(self, pixel_format: PixelFormat) -> Self:
        """The same images, read in this way; raises DataError where they are in memory and of another kind."""
        return self._replace(pixel_format=pixel_format)

    def without_skipped(self) -> Self:
        """The split without the images that were skipped."""
        if not (skipped := self.errors.skipped):
            return self
        return self.subset(torch.tensor([i for i, name in enumerate(self.names) if name not in skipped]).long())

    def _replace(self, **values: Any) -> Self:
        return cast(Self, replace(cast(Any, self), **values))


@dataclass(frozen=True, eq=False)
class MemorySplit(Split):
    """Images of one size, held in memory.

    Attributes:
        images: uint8 (N, H, W, C), or float32 of values of `dtype`.
        name: prefix of the images' names: "test" gives "test/0", "test/1", …
        indices: the images' numbers, int64 (N,); None counts from 0.
    """

    images: Tensor
    labels: Tensor
    name: str = "images"
    indices: Tensor | None = None
    errors: ErrorPolicy = field(default_factory=ErrorPolicy)
    workers: int = 0
    columns: Columns = field(default_factory=dict)
    dtype: str = ""

    @property
    def pixel_format(self) -> PixelFormat:
        return PixelFormat(self.images.shape[3], self.dtype)

    def find_pixel_format(self, channels: int = 0) -> PixelFormat:
        if channels not in (0, self.pixel_format.channels):
            raise DataError(f"the images have {self.pixel_format}, not {format_count(channels, 'channel')}.")
        return self.pixel_format

    def with_pixel_format(self, pixel_format: PixelFormat) -> MemorySplit:
        if (self.dtype or pixel_format.dtype) and self.pixel_format != pixel_format:
            raise DataError(f"the images have {self.pixel_format}, where {pixel_format} are expected.")
        return self

    @property
    def names(self) -> Sequence[str]:
        return [f"{self.name}/{i}" for i in (range(len(self)) if self.indices is None else self.indices.tolist())]

    def name_of(self, i: int) -> str:
        return f"{self.name}/{i if self.indices is None else int(self.indices[i])}"

    def read_image(self, i: int) -> Tensor:
        return self.images[i]

    def update_hash(self, digest: Any) -> None:
        digest.update(self.labels.numpy().tobytes())
        digest.update(self.images.numpy().data)

    def _select(self, indices: Tensor) -> dict[str, Any]:
        return {"images": self.images[indices], "indices": indices if self.indices is None else self.indices[indices]}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Splits of the same classes for training, validation and testing.

    Attributes:
        train: empty if the data are for evaluation only.
        test: evaluated once, at the end of a run.
        val: evaluated while training; None if the data have no such split.
        evaluated_split: the name of `test` in the source: "test", "val", or "held-out" if it was drawn from all images.
        all_images: all images, if `test` was drawn from them.
        label_sets: where an image has several classes, or none: float32 (sets, classes) of 0 and 1, which the splits' labels
            are positions in (data.label_sets); None where each has one.
        fingerprint: SHA-256 of the classes and the contents of the splits, the first 16 hex digits.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    val: Split | None = None
    evaluated_split: str = "test"
    all_images: Split | None = None
    label_sets: Tensor | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        if problem := find_name_problem(self.classes):
            raise DataError(f"{self.name} cannot be used: {problem}; give each class a name of its own.")
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        if self.label_sets is not None:
            digest.update(self.label_sets.numpy().tobytes())
        for split in (self.train, self.test, *([self.val] if self.val is not None else [])):
            split.update_hash(digest)
        object.__setattr__(self, "fingerprint", digest.hexdigest()[:16])

    def with_pixel_format(self, pixel_format: PixelFormat) -> Dataset:
        """The same images, read in this way; raises DataError where some are in memory and of another kind."""
        others = {k: split for k, split in self._fields().items() if split.pixel_format != pixel_format}
        if not others:
            return self
        return replace(self, **{k: split.with_pixel_format(pixel_format) for k, split in others.items()})

    def with_decode_on(self, decode_on: str) -> Dataset:
        """The same images; "device" lets the GPU that trains or evaluates decode those on disk (data.device_decode).

        Raises UsageError for a word that is not in DECODE_ON, or images that are not on disk.
        """
        if decode_on not in DECODE_ON:
            raise unknown_name_error("decode_on", decode_on, DECODE_ON)
        if decode_on == "cpu":
            return self
        on_disk = {name: split for name, split in self._fields().items() if hasattr(split, "decode_on")}
        if not on_disk:
            raise UsageError("decode_on=device is for images on disk; leave it out.")
        return replace(self, **{name: replace(split, decode_on=decode_on) for name, split in on_disk.items()})

    def _fields(self) -> dict[str, Any]:
        """The splits by the names of their fields."""
        splits = {name: getattr(self, name) for name in ("train", "test", "val", "all_images")}
        return {name: split for name, split in splits.items() if split is not None}

    def describe_few_images(self) -> str:
        """Why these images can be evaluated, but not trained on; "" if there are enough."""
        if self.all_images is None or len(self.train):
            return ""
        return (
            f"{format_count(len(self.test), 'image')} of {format_count(len(self.classes), 'class')} are too few to hold some "
            "of each out for a test; add images (two of each class or more), or give the splits train/ and val/."
        )

    @property
    def splits(self) -> dict[str, Split]:
        """The splits that have images, by name."""
        splits = {"train": self.train, "val": self.val, self.evaluated_split: self.test, "all": self.all_images}
        return {name: split for name, split in splits.items() if split is not None and len(split)}


def count_held_out(requested: int, images: int, classes: int) -> int:
    """How many of the training images to hold out: `requested`, or for A_TENTH a tenth of them.

    That is at least one of each class and at most MAX_TENTH, and none where it would be more than a fifth.
    """
    if requested != A_TENTH:
        return requested
    count = min(MAX_TENTH, max(classes, images // 10))
    return count if 5 * count <= images else 0


def hold_out(split: Split, count: int, *, by_name: bool = False) -> tuple[Tensor, Tensor]:
    """Positions of the images of a split that stay and of about `count` that are held out, whole groups if there are groups.

    Args:
        by_name: choose by the images' names instead of their positions (`split_stratified`).
    """
    if GROUP in split.columns:
        return split_groups(split.labels, split.columns[GROUP], count)
    return split_stratified(split.labels, count, names=split.names if by_name else ())


def split_groups(labels: Tensor, groups: NDArray[np.object_], count: int) -> tuple[Tensor, Tensor]:
    """As `split_stratified`, but images of one group stay together, so that `count` and the proportions are met nearly.

    Groups are taken in a random order that depends on their names, each if that brings the chosen classes nearer to their
    shares and leaves some of each. Raises DataError if nothing would be chosen.
    """
    names, codes, members = _sort_into_groups(groups, labels)
    left = labels.bincount().double().numpy()  # of each class
    missing = left * count / len(labels)
    chosen = np.zeros(len(names), bool)
    for group in sorted(range(len(names)), key=lambda g: seed_for(0, "group", str(names[g]))):
        own = np.bincount(members[group], minlength=len(left))
        nearer = np.abs(missing - own).sum() < np.abs(missing).sum()
        if nearer and not ((left == own) & (left > 0)).any():  # some of every class must stay
            left, missing, chosen[group] = left - own, missing - own, True
    if not chosen.any():
        raise DataError(
            f"{len(labels):,} images in {len(names):,} groups cannot be divided so that about {count:,} are held out and no "
            "group is split; give the splits yourself, or smaller groups."
        )
    mask = torch.from_numpy(chosen[codes])
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()


def _sort_into_groups(groups: NDArray[Any], labels: Tensor) -> tuple[NDArray[Any], NDArray[Any], list[NDArray[Any]]]:
    """The different groups, the index of each image's group, and the labels of each group's images."""
    names, codes, sizes = np.unique(groups.astype(str), return_inverse=True, return_counts=True)
    members = labels.numpy()[np.argsort(codes, kind="stable")]
    return names, codes, np.split(members, np.cumsum(sizes)[:-1])


def take_fold(data: Dataset, fold: str) -> Dataset:
    """The data set whose test is fold K of N ("K/N") of all its images, or of its training images if others are for testing.

    The folds are stratified (or whole groups), of about equal size, and the same on every machine.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", fold)
    number, total = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= total or total < 2:
        raise UsageError(f"fold must be K/N with K from 1 to N, such as 2/5, not {fold!r}.")
    pool = data.train if data.all_images is None else data.all_images
    of_fold = assign_folds(pool, total)
    chosen, rest = torch.nonzero(of_fold == number - 1).flatten(), torch.nonzero(of_fold != number - 1).flatten()
    if unseen := set(pool.labels.tolist()) - set(pool.labels[rest].tolist()):
        raise DataError(f"without fold {fold} class {data.classes[min(unseen)]} has no image; take fewer folds.")
    return replace(
        data, train=pool.subset(rest), test=pool.subset(chosen), val=None, evaluated_split="held-out", all_images=pool
    )


def assign_folds(split: Split, total: int) -> Tensor:
    """Of each image the number of its fold, int64 (N,), from 0; raises DataError if there are fewer images or groups."""
    keys = split.columns[GROUP] if GROUP in split.columns else np.array(split.names, str)
    names, codes, members = _sort_into_groups(keys, split.labels)
    if len(names) < total:
        raise DataError(f"{len(names):,} images or groups cannot be divided into {total} folds; take fewer.")
    shares = split.labels.bincount().double().numpy() / total
    filled, of_name = np.zeros((total, len(shares))), np.zeros(len(names), np.int64)
    order = sorted(range(len(names)), key=lambda i: (-len(members[i]), seed_for(0, "fold", str(names[i]))))
    for i in order:  # the largest first, each into the fold that it brings nearest to its share
        own = np.bincount(members[i], minlength=len(shares))
        gain = ((filled + own - shares) ** 2 - (filled - shares) ** 2).sum(1)
        of_name[i] = int(np.lexsort((filled.sum(1), gain))[0])
        filled[of_name[i]] += own
    return torch.from_numpy(of_name[codes])


def split_stratified(labels: Tensor, count: int, seed: int = 0, names: Sequence[str] = ()) -> tuple[Tensor, Tensor]:
    """Splits positions into (rest, chosen), `count` chosen in proportion to the classes, the same on every machine.

    Args:
        labels: int64 (N,).
        count: how many to choose, from 1 to N - 1.
        seed: another seed chooses others.
        names: if given, the choice depends on the images' names instead of their positions, so that adding an image
            changes it little.

    Returns:
        Two ascending int64 tensors of positions.

    Raises:
        DataError: no image would be left.
    """
    n = len(labels)
    if not 0 < count < n:
        raise DataError(f"cannot hold out {count:,} of {n:,} images; hold out at least 1 and fewer than all.")
    sizes = torch.bincount(labels)
    quotas = sizes * count // n
    remainders = sizes * count % n  # the largest remainders get one more, until `count` is reached
    quotas[torch.argsort(remainders, descending=True, stable=True)[: count - int(quotas.sum())]] += 1
    shuffled = torch.argsort(torch.from_numpy(seeds_for(seed, "stratified", names or range(n))))
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]  # class after class, each shuffled
    place_in_class = torch.arange(n) - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[by_class[place_in_class < quotas.repeat_interleave(sizes)]] = True
    return torch.nonzero(~mask).flatten(), torch.nonzero(mask).flatten()
