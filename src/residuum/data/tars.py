"""What a tar shard holds: as the index beside it says (NAME.index.json, data.pack writes it), or as the tar's headers do."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from residuum.data.decode import SUFFIXES
from residuum.errors import DataError

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
