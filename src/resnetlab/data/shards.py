"""Tar shards in WebDataset format: DATA is a brace pattern, local or over HTTP, or a folder of tars.

A sample is the files of one key (the path up to the first dot of its last part): an image, and its class in `key.cls` (a
number, or a name) or `key.json` ({"class": name, "name": …}). A word of the shards' names gives the split, train-000000.tar,
imagenet1k-validation-00.tar; shards with other names are one split. Samples are in the order of their keys, however the
shards were shuffled. data.tar_index reads one shard's samples; data.remote_shards downloads shards once.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray

from resnetlab.data import remote_shards
from resnetlab.data.dataset import Dataset
from resnetlab.data.decode import check_file_size
from resnetlab.data.disk_split import DiskSplit, FileNames, ReadOptions
from resnetlab.data.error_policy import ErrorPolicy
from resnetlab.data.folder import arrange_splits, guess_split, select_images
from resnetlab.data.object_store import is_address, is_store, list_tars, strip_secrets
from resnetlab.data.prefetch import prefetch
from resnetlab.data.remote_shards import RemoteShards
from resnetlab.data.slow_disk import map_files
from resnetlab.data.tar_index import MAX_INDEX, TarIndex, index_path, read_index
from resnetlab.data.text_files import decode_text
from resnetlab.device import count_cores
from resnetlab.errors import DataError
from resnetlab.formatting import format_count

READER_BYTES = 2**25  # of indices, 400,000 images, for each process that reads them: two seconds
UNFINISHED = ".packing"  # a folder beside the shards, while data.pack writes them
MAX_CLASSES = 1_000_000  # of numbers without names
ATTEMPTS = 3  # to open a tar that is fetched when it is needed


@dataclass(frozen=True, eq=False)
class ShardSource:
    """Images inside tars: the image i is `sizes[i]` bytes of `tars[shard[i]]` from `offsets[i]` on."""

    tars: tuple[Path, ...]
    names: Sequence[str]
    sizes: NDArray[np.int64]
    shard: NDArray[np.int32]
    offsets: NDArray[np.int64]
    remote: RemoteShards | None = None  # fetches a tar that is not there yet

    def read(self, i: int) -> bytes:
        tar = self.tars[self.shard[i]]
        check_file_size(int(self.sizes[i]), self.display_name(i))
        try:
            with self._open(int(self.shard[i])) as file:
                file.seek(int(self.offsets[i]))
                content = file.read(int(self.sizes[i]))
        except OSError as error:
            raise DataError(f"{tar} cannot be read ({error.strerror or error}).") from error
        if len(content) < self.sizes[i]:
            raise DataError(f"{tar} ends early, inside {self.names[i]}; copy or pack it again.")
        return content

    def _open(self, shard: int) -> IO[bytes]:
        for _ in range(ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return open(self.tars[shard], "rb")
            if self.remote is None:
                break
            self.remote.fetch(shard)  # it may be removed again before it is opened
        return open(self.tars[shard], "rb")

    def display_name(self, i: int) -> str:
        return f"{self.tars[self.shard[i]]}/{self.names[i]}"


def is_shard_pattern(data: str) -> bool:
    """Whether DATA is a pattern or a folder of tar shards."""
    if is_address(data) or data.endswith(".tar"):
        return True
    if not Path(data).is_dir() or not any(Path(data).glob("*.tar")):
        return False
    # class folders take precedence
    return not any(p.is_dir() and not p.name.startswith(".") for p in Path(data).iterdir())


def load_shards(data: str, data_dir: Path, read_options: ReadOptions) -> Dataset:
    """Loads tar shards; raises DataError if one is missing, damaged or of other classes, or a key occurs twice."""
    if is_store(data) and data.endswith("/"):
        places = list_tars(data)
    else:
        places = sorted(map(str, Path(data).glob("*.tar"))) if Path(data).is_dir() else list(expand_braces(data))
    remote = None
    if is_address(data):
        if read_options.as_needed:
            remote = remote_shards.fetch_indices(places, data_dir)
            for number in (k for k, tar in enumerate(remote.tars) if _split_of(tar) != "train"):
                remote.fetch(number)  # evaluations read all of them
        tars = list(remote.tars) if remote else remote_shards.fetch_shards(places, data_dir)
        data = strip_secrets(data)  # no signature in messages
    else:
        tars = [Path(place) for place in places]
        if missing := next((tar for tar in tars if not tar.is_file()), None):
            pattern = "give the shards as a pattern such as train-{000000..000009}.tar."
            raise DataError(f"{missing} is not there; {pattern}")
    for folder in {tar.parent for tar in tars}:
        if (folder / UNFINISHED).is_dir():
            again = f"pack it again into the same folder: resnetlab data pack DATA {folder}"
            raise DataError(f"{folder} was not packed to its end; {again}")
    indices = dict(zip(tars, _share_classes(_read_indices(tars)), strict=True))
    classes = _shard_classes(indices, places[0], tars[0])
    if len(classes) < 2 and not read_options.one_class:
        raise DataError(f"{data} has one class only, {classes[0]}; a classifier needs two or more.")
    groups: dict[str, list[Path]] = {}
    for tar in tars:
        groups.setdefault(_split_of(tar), []).append(tar)
    if "" in groups and len(groups) > 1:
        raise DataError(
            f"{data} mixes shards called train, val or test with others; name all of them by their split, or none."
        )
    for paths in groups.values() if Path(data).is_dir() else ():
        packed = indices[paths[0]].shards
        if packed is not None and packed > len(paths):
            raise DataError(
                f"{data} holds {len(paths):,} of {packed:,} shards such as {paths[0].name}; copy the others too."
            )
    if all(index.classes is None for index in indices.values()):
        _require_same_labels(groups, indices)
    splits = {split: _make_shard_split(paths, indices, classes, read_options) for split, paths in groups.items()}
    splits = select_images(data, splits, classes, read_options)
    if remote is not None and "train" in splits:
        train = splits["train"]
        assert isinstance(train.source, ShardSource)
        splits["train"] = replace(train, source=replace(train.source, remote=remote.select(groups["train"])))
    return arrange_splits(data, classes, splits)


def _share_classes(indices: Iterable[TarIndex]) -> Iterator[TarIndex]:
    """The indices, with equal lists of classes kept once."""
    known: dict[tuple[str, ...] | None, tuple[str, ...] | None] = {}
    for index in indices:
        yield index._replace(classes=known.setdefault(index.classes, index.classes))


def _read_indices(tars: Sequence[Path]) -> Iterator[TarIndex]:
    """The content of every shard, in order, read by several processes where that takes seconds."""
    size = sum(file.stat().st_size for file in map(index_path, tars) if file.is_file())
    readers = min(count_cores(), len(tars), size // READER_BYTES)
    # another way of starting a process runs the user's script again, and a process that may have none is one of many
    if readers < 2 or multiprocessing.get_start_method() != "fork" or multiprocessing.current_process().daemon:
        yield from map_files(read_index, tars)
        return
    length = -(-len(tars) // (8 * readers))
    parts = [tars[start : start + length] for start in range(0, len(tars), length)]
    found = prefetch(partial(_read_some, parts), range(len(parts)), readers)
    with contextlib.closing(found):  # type: ignore[type-var]  # a generator
        for part in found:
            if part.error is not None:
                raise part.error
            yield from part.indices


@dataclass(frozen=True)
class _IndexPart:
    """What a process has read, or the error, which a worker would raise with its traceback."""

    indices: list[TarIndex]
    error: DataError | None = None


def _read_some(parts: Sequence[Sequence[Path]], part: int) -> _IndexPart:
    try:
        return _IndexPart(list(_share_classes(map(read_index, parts[part]))))
    except DataError as error:
        return _IndexPart([], error)


def _split_of(tar: Path) -> str:
    """The split that a word of a shard's name means; "" if none does. Raises DataError if two words mean different ones."""
    found = {split: word for word in re.split(r"[-_.\s\d]+", tar.name) if (split := guess_split(word))}
    if len(found) > 1:
        raise DataError(f"the name of {tar} says {' and '.join(found.values())}; rename it after its one split.")
    return next(iter(found), "")


def _require_same_labels(groups: dict[str, list[Path]], indices: dict[Path, TarIndex]) -> None:
    """Raises DataError if splits of shards that list no classes have different ones."""
    found = {split: {str(label) for tar in tars for label in indices[tar].labels} for split, tars in groups.items()}
    for (one, first), (two, second) in itertools.combinations(found.items(), 2):
        if first != second:
            only = [", ".join(sorted(a - b)) or "none" for a, b in ((first, second), (second, first))]
            raise DataError(
                f"the shards called {one} and {two} hold different classes: only in {one} {only[0]}, only in {two} {only[1]}; "
                "give both the same classes."
            )


def expand_braces(pattern: str) -> Iterator[str]:
    """train-{000..002}.tar -> train-000.tar, train-001.tar, train-002.tar; {train,val} lists; several braces multiply."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        if i % 2 == 0:
            choices.append([part])
        elif numbers := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = numbers.groups()
            choices.append([str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    if any(c in part for part in parts[::2] for c in "{}"):
        raise DataError(f"{pattern} has an unmatched brace, or braces inside braces, which are not supported.")
    if not all(choices):
        raise DataError(f"{pattern} names no shard: a range in braces must rise, such as {{000000..000009}}.")
    return map("".join, itertools.product(*choices))


def _shard_classes(indices: dict[Path, TarIndex], place: str, tar: Path) -> tuple[str, ...]:
    """The class names that all shards share; `place` is the address or path of the first shard, `tar` its local file."""
    known = {index.classes: tar for tar, index in indices.items()}
    if len(known) > 1:
        (one, first), (two, second) = list(known.items())[:2]
        only = [", ".join(sorted(set(a or ()) - set(b or ()))) or "none" for a, b in ((one, two), (two, one))]
        raise DataError(
            f"{first} and {second} have different class lists: only in the first {only[0]}, only in the second {only[1]}; "
            "pack them together."
        )
    if (classes := next(iter(known))) is not None:
        return classes
    labels = {label for index in indices.values() for label in index.labels}
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted(map(str, labels)))
    if any(isinstance(label, str) for label in labels):
        raise DataError(f"some samples in {tar.parent} have numbers and some have names for classes; pack them again.")
    if (classes := _read_class_list(place, tar)) or (last := max(map(int, labels))) < MAX_CLASSES:
        return classes or tuple(map(str, range(last + 1)))
    raise DataError(f"a sample in {tar.parent} is of class {last:,}; more than {MAX_CLASSES:,} classes are not read.")


def _read_class_list(place: str, tar: Path) -> tuple[str, ...]:
    """The lines of classes.txt beside the shards; () if it is missing."""
    file = tar.with_name(remote_shards.CLASSES)
    try:
        if file.exists() and file.stat().st_size > MAX_INDEX:
            raise ValueError(f"it has more than {MAX_INDEX:,} bytes")
        content = remote_shards.fetch_class_list(place, tar) if is_address(place) else file.read_bytes()
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise DataError(f"the class names in {file} cannot be read ({error}); fix the file, or remove it.") from error
    return tuple(line.strip() for line in decode_text(content, file).split("\n") if line.strip())


def _make_shard_split(
    tars: list[Path], indices: dict[Path, TarIndex], classes: tuple[str, ...], read_options: ReadOptions
) -> DiskSplit:
    """A split of the samples of some shards, in the order of their keys."""
    parts = [indices[tar] for tar in tars]
    keys = [key for part in parts for key in part.keys]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    shard = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.keys) for part in parts])[order]
    for (i, one), (k, two) in itertools.pairwise(enumerate(order)):
        if keys[one] == keys[two]:
            places = f"{tars[shard[i]]} and {tars[shard[k]]}"
            raise DataError(f"two samples have the key {keys[one]}, in {places}; pack them together.")
    names = [name for part in parts for name in part.names]
    names = [names[i] for i in order]
    label_of: dict[str | int, int] = {name: i for i, name in enumerate(classes)} | {i: i for i in range(len(classes))}
    numbers = np.concatenate([_number_classes(part, label_of) for part in parts])[order]
    if len(unknown := np.flatnonzero(numbers[:, 0] < 0)):
        i = int(unknown[0])
        label = parts[shard[i]].labels[-1 - numbers[i, 0]]
        raise DataError(
            f"{names[i]} in {tars[shard[i]]} is of class {label}, but there are {format_count(len(classes), 'class')}, "
            "counted from 0; fix its label, or the list of classes."
        )
    if len(set(names)) < len(names):
        twice = next(one for one, two in itertools.pairwise(sorted(names)) if one == two)
        raise DataError(f"two samples have the name {twice}, in {tars[0].parent}; give each a name of its own.")
    offsets, sizes = numbers[:, 1].copy(), numbers[:, 2].copy()
    source = ShardSource(tuple(tars), FileNames(names), sizes, shard, offsets)
    labels = torch.from_numpy(numbers[:, 0].copy())
    errors = ErrorPolicy(read_options.on_bad)
    return DiskSplit(source, torch.arange(len(labels)), labels, errors, read_options.workers)


def _number_classes(index: TarIndex, label_of: Mapping[str | int, int]) -> NDArray[np.int64]:
    """The index's numbers with each sample's class in place of its label: -1 - position where the label is no class."""
    classes = np.array([label_of.get(label, -1 - i) for i, label in enumerate(index.labels)], np.int64)
    return np.column_stack([classes[index.numbers[:, 0]], index.numbers[:, 1:]])
