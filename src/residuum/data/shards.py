"""Tar shards in WebDataset's form: DATA is a brace pattern, local or over HTTP, or a folder of tars.

A sample is the files of one key (the path up to the first dot of its last part): a picture, and its class in `key.cls` (a
number, or a name) or `key.json` ({"class": name, "name": …}). Beside NAME.tar an index NAME.index.json (data.pack writes it)
says where each picture's bytes lie; without one the tar's headers are read through. Splits are told by the shards' names,
train-000000.tar, val-000000.tar; with other names all pictures stand together. Samples are in the order of their keys, however
the shards were shuffled. Shards at an address are fetched once, into data_dir/shards.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from residuum.data import remote
from residuum.data.dataset import Dataset
from residuum.data.decode import SUFFIXES
from residuum.data.folder import SPLITS, arrange
from residuum.data.stored import Names, Reading, Stored
from residuum.errors import DataError
from residuum.records import write_atomically

FORMAT = 1


class Sample(NamedTuple):
    """Where one picture lies: `size` bytes of a tar from `offset` on. `label` is a number where the shard gives no name."""

    key: str
    name: str
    label: str | int
    offset: int
    size: int


class Index(NamedTuple):
    """What a shard holds; `classes` is None where the shard does not say them all."""

    samples: list[Sample]
    classes: tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class Shards:
    """Pictures inside tars: the picture i is `sizes[i]` bytes of `tars[shard[i]]` from `offsets[i]` on."""

    tars: tuple[Path, ...]
    names: Sequence[str]
    sizes: NDArray[np.int64]
    shard: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def read(self, i: int) -> bytes:
        tar = self.tars[self.shard[i]]
        try:
            with open(tar, "rb") as file:
                file.seek(int(self.offsets[i]))
                content = file.read(int(self.sizes[i]))
        except OSError as error:
            raise DataError(f"{tar} cannot be read ({error.strerror or error}).") from error
        if len(content) < self.sizes[i]:
            raise DataError(f"{tar} ends early, inside {self.names[i]}; copy or pack it again.")
        return content

    def label(self, i: int) -> str:
        return f"{self.tars[self.shard[i]]}/{self.names[i]}"


def is_pattern(data: str) -> bool:
    """Whether DATA names tar shards."""
    if _is_address(data) or data.endswith(".tar"):
        return True
    if not Path(data).is_dir() or not any(Path(data).glob("*.tar")):
        return False
    return not any(p.is_dir() and not p.name.startswith(".") for p in Path(data).iterdir())  # class folders go first


def _is_address(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _sibling(place: str, name: str) -> str:
    """The address or path of a file beside a shard; an address keeps its query (a signature, say)."""
    path, mark, query = place.partition("?") if _is_address(place) else (place, "", "")
    return path[: path.rfind("/") + 1] + name + mark + query


def load(data: str, data_dir: Path, reading: Reading) -> Dataset:
    """The data set in tar shards; raises DataError where one is missing, damaged or of other classes, or a key stands twice."""
    places = sorted(map(str, Path(data).glob("*.tar"))) if Path(data).is_dir() else list(expand(data))
    tars = [(place, _local(place, data_dir)) for place in places]
    indices = {tar: read_index(tar) for _, tar in tars}
    classes = _classes(indices, _sibling(places[0], "classes.txt"), tars[0][1])
    if len(classes) < 2:
        raise DataError(f"{data} has one class only, {classes[0]}; a classifier needs two or more.")
    groups: dict[str, list[Path]] = {}
    for _, tar in tars:
        stem = re.sub(r"[-_.]?\d*\.tar$", "", tar.name)
        groups.setdefault(stem if stem in SPLITS else "", []).append(tar)
    if "" in groups and len(groups) > 1:
        raise DataError(
            f"{data} mixes shards called train, val or test with others; name all of them by their split, or none."
        )
    if all(index.classes is None for index in indices.values()):
        _same_labels(groups, indices)
    splits = {split: _split(paths, indices, classes, reading) for split, paths in groups.items()}
    return arrange(data, classes, splits)


def _same_labels(groups: dict[str, list[Path]], indices: dict[Path, Index]) -> None:
    """Raises DataError where splits of shards that list no classes hold different ones."""
    found = {split: {str(s.label) for tar in tars for s in indices[tar].samples} for split, tars in groups.items()}
    for (one, first), (two, second) in itertools.combinations(found.items(), 2):
        if first != second:
            only = [", ".join(sorted(a - b)) or "none" for a, b in ((first, second), (second, first))]
            raise DataError(
                f"the shards called {one} and {two} hold different classes: only in {one} {only[0]}, only in {two} {only[1]}; "
                "give both the same classes."
            )


def expand(pattern: str) -> Iterator[str]:
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
    if not all(choices):
        raise DataError(f"{pattern} names no shard: a range in braces must rise, such as {{000000..000009}}.")
    return map("".join, itertools.product(*choices))


def _local(place: str, data_dir: Path) -> Path:
    """The shard as a local file, with its index beside it; fetched where `place` is an address."""
    if not _is_address(place):
        if not Path(place).is_file():
            raise DataError(f"{place} is not there; give the shards as a pattern such as train-{{000000..000009}}.tar.")
        return Path(place)
    base, name = place.partition("?")[0].rsplit("/", 1)
    tar = data_dir / "shards" / hashlib.sha256(base.encode()).hexdigest()[:12] / name
    index = index_of(tar)
    with remote.alone(tar):
        content = _small(_sibling(place, index.name), index, cached=tar.is_file())
        if content is None:
            index.unlink(missing_ok=True)
        elif not index.is_file() or index.read_bytes() != content:
            tar.unlink(missing_ok=True)  # packed anew since it was fetched
            write_atomically(index, content)
        if not tar.is_file():
            _fetch(place, tar)
    return tar


def _small(url: str, kept: Path, *, cached: bool) -> bytes | None:
    """A small file of a server, None where it has none; what was `kept` where it does not answer and all is `cached`."""
    try:
        return remote.read(url, kept.parent, patient=not cached)
    except remote.NotThere:
        return None
    except DataError:
        if not cached:
            raise
        return kept.read_bytes() if kept.is_file() else None


def _fetch(place: str, tar: Path) -> None:
    """A shard that is whole appears at `tar`, or none: not every server says how long a file is."""
    fresh = tar.with_name(f"{tar.name}.new")
    try:
        remote.download(place, fresh)
        if not index_of(tar).is_file():  # else its length stands there, and is compared when it is read
            scan(fresh)
        elif fresh.stat().st_size != json.loads(index_of(tar).read_bytes())["bytes"]:
            raise DataError("its length is not what its index says")
        os.replace(fresh, tar)
    except (DataError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, remote.NotThere) or place in str(error):
            raise
        raise DataError(f"{place} did not arrive whole, or its index is damaged ({error}); try again.") from error
    finally:
        fresh.unlink(missing_ok=True)


def index_of(tar: Path) -> Path:
    """Where a shard's index lies."""
    return tar.with_name(tar.name.removesuffix(".tar") + ".index.json")


def read_index(tar: Path) -> Index:
    """What a shard holds, from the index beside it or from the tar itself."""
    file = index_of(tar)
    if not file.is_file():
        return scan(tar)
    try:
        values = json.loads(file.read_text())
        index = Index([Sample(*sample) for sample in values["samples"]], tuple(values["classes"]))
        length = int(values["bytes"])
        for sample in index.samples:
            _valid(sample, length)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the index {file} cannot be read ({error}); remove it, or pack the shards again.") from error
    if (found := tar.stat().st_size) != length:
        raise DataError(
            f"{tar} has {found:,} bytes, its index says {length:,}: it ends early or is another; copy it again."
        )
    return index


def _valid(sample: Sample, length: int) -> Sample:
    """The sample; raises ValueError where a value is none that it may have in a tar of `length` bytes."""
    key, name, label, offset, size = sample
    if not (isinstance(key, str) and isinstance(name, str)):
        raise ValueError(f"the key and the name must be text, not {key!r} and {name!r}")
    if type(label) not in (str, int) or label == "":
        raise ValueError(f"the class must be a name or a number, not {label!r}")
    if not (type(offset) is type(size) is int and 0 <= offset <= offset + size <= length):
        raise ValueError(f"{name} cannot lie at {offset!r} with {size!r} bytes")
    return sample


def scan(tar: Path) -> Index:
    """What a shard without an index holds."""
    pictures: dict[str, tuple[int, int, str]] = {}
    about: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(tar, "r:") as file:
            for member in file:
                folder, _, last = member.name.rpartition("/")
                stem, _, kind = last.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if not member.isfile():
                    continue
                if os.path.splitext(last)[1].lower() in SUFFIXES:
                    if key in pictures:
                        raise DataError(f"{tar} has two pictures of the key {key}; give each sample a key of its own.")
                    pictures[key] = (member.offset_data, member.size, member.name)
                elif kind in ("cls", "json"):
                    if kind in about.setdefault(key, {}):
                        raise DataError(f"{tar} has two files {member.name}; give each sample a key of its own.")
                    about[key][kind] = file.extractfile(member).read()  # type: ignore[union-attr]
            ended = file.offset
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{tar} ends early or is no tar ({error}); copy or pack it again.") from error
    last_byte = max((offset + size for offset, size, _ in pictures.values()), default=0)
    if not pictures or tar.stat().st_size < max(last_byte, ended) + 512:  # a whole tar ends with empty blocks
        raise DataError(f"{tar} ends early or holds no picture; copy or pack it again.")
    if lost := sorted(set(about) - set(pictures)):
        raise DataError(
            f"{lost[0]} in {tar} has a class and no picture that is read ({len(lost):,} such); links inside a tar are not "
            f"followed, and pictures end in {', '.join(sorted(SUFFIXES))}."
        )
    return Index([_sample(tar, key, where, about.get(key, {})) for key, where in pictures.items()], None)


def _sample(tar: Path, key: str, where: tuple[int, int, str], about: dict[str, bytes]) -> Sample:
    offset, size, name = where
    try:
        values = json.loads(about.get("json", b"{}"))
        text = about.get("cls", b"").decode().strip()
        told: str | int = int(text) if text.removeprefix("-").isdecimal() else text
        label = values.get("class", told)
        if type(label) is type(told) and told not in ("", label):
            raise ValueError(f"{key}.cls says {told}, {key}.json {label}")
        if label != "":
            return _valid(Sample(key, values.get("name", name), label, offset, size), tar.stat().st_size)
    except (ValueError, AttributeError) as error:
        raise DataError(f"the class of {key} in {tar} cannot be read ({error}); pack it again.") from error
    raise DataError(f"{key} in {tar} has no class: there is neither {key}.cls nor a class in {key}.json.")


def _classes(indices: dict[Path, Index], beside: str, tar: Path) -> tuple[str, ...]:
    """The class names that all shards share."""
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
    labels = {sample.label for index in indices.values() for sample in index.samples}
    if all(isinstance(label, str) for label in labels):
        return tuple(sorted(map(str, labels)))
    if any(isinstance(label, str) for label in labels):
        raise DataError(f"some samples beside {beside} have numbers and some have names for classes; pack them again.")
    names = _names_beside(beside, tar)
    return names or tuple(map(str, range(max(map(int, labels)) + 1)))


def _names_beside(place: str, tar: Path) -> tuple[str, ...]:
    """The lines of classes.txt beside the shards; none where it is not there."""
    kept = tar.with_name("classes.txt")
    try:
        if _is_address(place):
            content = _small(place, kept, cached=kept.is_file()) or b""
            write_atomically(kept, content)  # empty where there is none: that is then known without the server
        else:
            content = Path(place).read_bytes()
        text = content.decode()
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise DataError(f"the class names in {place} cannot be read ({error}); mend the file, or remove it.") from error
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def _split(tars: list[Path], indices: dict[Path, Index], classes: tuple[str, ...], reading: Reading) -> Stored:
    """The samples of some shards, in the order of their keys."""
    rows = [(sample, number) for number, tar in enumerate(tars) for sample in indices[tar].samples]
    rows.sort(key=lambda row: row[0].key)
    for (one, a), (two, b) in itertools.pairwise(rows):
        if one.key == two.key:
            raise DataError(f"two samples have the key {one.key}, in {tars[a]} and {tars[b]}; pack them together.")
    place: dict[str | int, int] = {name: i for i, name in enumerate(classes)}
    place |= {i: i for i in range(len(classes))}
    for sample, number in rows:
        if sample.label not in place:
            raise DataError(
                f"{sample.name} in {tars[number]} is of class {sample.label}, but there are {len(classes)} classes."
            )
    names = sorted(sample.name for sample, _ in rows)
    if twice := [one for one, two in itertools.pairwise(names) if one == two]:
        raise DataError(f"two samples have the name {twice[0]}, in {tars[0].parent}; give each a name of its own.")
    quarantined = reading.quarantined()
    where = [i for i, (sample, _) in enumerate(rows) if sample.name not in quarantined]
    numbers = np.array([[number, sample.offset, sample.size] for sample, number in rows], dtype=np.int64).reshape(-1, 3)
    source = Shards(tuple(tars), Names(s.name for s, _ in rows), numbers[:, 2], numbers[:, 0], numbers[:, 1])
    labels = torch.tensor([place[sample.label] for sample, _ in rows])
    if emptied := set(labels.tolist()) - set(labels[where].tolist()):
        raise DataError(f"the quarantine list leaves no picture of class {classes[min(emptied)]} in {tars[0].parent}.")
    return Stored(source, torch.tensor(where, dtype=torch.long), labels[where], reading)
