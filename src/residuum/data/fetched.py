"""Shards at an address as local files, with their indices and class names, in data_dir/shards.

What was fetched before is used without a server. Only where a shard of those asked for is missing, or is not as long as it
arrived, the server is asked about all of them, so that shards of two packings are never mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from residuum.data import remote
from residuum.data.tars import index_of, scan
from residuum.errors import DataError
from residuum.records import write_atomically

CLASSES = "classes.txt"


def is_address(place: str) -> bool:
    """Whether a shard, or a pattern of them, is at a server."""
    return place.startswith(("http://", "https://"))


def _sibling(url: str, name: str) -> str:
    """The address of a file beside a shard; it keeps its query (a signature, say)."""
    path, mark, query = url.partition("?")
    return path[: path.rfind("/") + 1] + name + mark + query


def local(places: Sequence[str], data_dir: Path) -> list[Path]:
    """The shards at some addresses as local files, their indices beside them where the server has any.

    Raises DataError where the server lacks one, drops it every time, or it does not arrive whole; RunError where it cannot be
    written.
    """
    tars = [_place(place, data_dir) for place in places]
    known = {tar for tar in tars if remote.is_whole(tar)}
    if known.issuperset(tars):
        return tars
    for place, tar in zip(places, tars, strict=True):
        with remote.alone(tar):
            whole = remote.is_whole(tar)  # another process may have fetched it while this one waited
            if not whole or (tar in known and not remote.is_current(place, tar)):
                _fetch(place, tar)
                tar.with_name(CLASSES).unlink(missing_ok=True)
    return tars


def beside(place: str, tar: Path) -> bytes:
    """What the server has as classes.txt beside a shard, empty where it has none; asked for once."""
    kept = tar.with_name(CLASSES)
    with remote.alone(kept):
        if not kept.is_file():
            write_atomically(kept, _small(_sibling(place, CLASSES), tar.parent) or b"")
        return kept.read_bytes()


def _place(place: str, data_dir: Path) -> Path:
    base, name = remote.shown(place).rsplit("/", 1)
    return data_dir / "shards" / hashlib.sha256(base.encode()).hexdigest()[:12] / name


def _fetch(place: str, tar: Path) -> None:
    """A shard that is whole appears at `tar`, with its index, or none."""
    tar.unlink(missing_ok=True)
    index = index_of(tar)
    if (content := _small(_sibling(place, index.name), tar.parent)) is None:
        index.unlink(missing_ok=True)
    else:
        write_atomically(index, content)
    remote.download(place, tar, _check(place, content))


def _small(url: str, folder: Path) -> bytes | None:
    """A small file of a server; None where it has none."""
    try:
        return remote.read(url, folder)
    except remote.NotThere:
        return None


def _check(place: str, index: bytes | None) -> Callable[[Path], None]:
    """Whether a shard has arrived whole: not every server says how long a file is."""

    def check(part: Path) -> None:
        try:
            if index is None:
                scan(part)  # it ends as a tar does
            elif part.stat().st_size != json.loads(index)["bytes"]:
                raise DataError("its length is not what its index says")
        except (DataError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{remote.shown(place)} did not arrive whole, or its index is damaged ({error}); try again."
            ) from error

    return check
