"""Downloads shards, with their indices and class names, to data_dir/shards, from a server or an object store.

All of them at first, or each before it is read, within a budget of disk space from which those that are read last are removed.

Shards that were downloaded before are used without a server. Only if one of the requested shards is missing or has another
length, the server is asked about all of them, so that shards of two packings are never mixed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from resnetlab.data import download
from resnetlab.data.object_store import strip_secrets
from resnetlab.data.tar_index import MAX_INDEX, index_path, scan_tar
from resnetlab.errors import DataError, ResNetLabError, UsageError
from resnetlab.formatting import parse_json
from resnetlab.run_folder import write_atomically
from resnetlab.stopping import StopSignal

CLASSES = "classes.txt"
AT_ONCE = 8  # small files fetched at once
FETCHED_AT_ONCE = 4  # shards fetched at once
SHARE = 0.9  # of the free space that shards may take, if no budget is given
LOOK_PAUSE = 0.5  # seconds between looks at what is needed next


@dataclass(frozen=True)
class RemoteShards:
    """Shards that are fetched when they are needed, by their numbers.

    Attributes:
        tars: where they are once they are fetched.
        sizes: in bytes, from their indices.
    """

    urls: tuple[str, ...]
    tars: tuple[Path, ...]
    sizes: tuple[int, ...]

    def fetch(self, shard: int) -> None:
        """Downloads a shard, unless it is here. Raises as `fetch_shards` does."""
        url, tar = self.urls[shard], self.tars[shard]
        with download.file_lock(tar):
            if not download.is_complete(tar):
                download.download_file(url, tar, _completeness_check(url, index_path(tar).read_bytes()))

    def present(self) -> list[int]:
        """The shards that are here."""
        return [shard for shard, tar in enumerate(self.tars) if tar.is_file()]

    def remove(self, shard: int) -> None:
        """Removes a shard from here; who still reads it keeps it open, or fetches it again."""
        with contextlib.suppress(OSError):
            self.tars[shard].unlink(missing_ok=True)

    def select(self, tars: Sequence[Path]) -> RemoteShards:
        """Some of the shards, numbered anew."""
        chosen = [self.tars.index(tar) for tar in tars]
        return RemoteShards(tuple(self.urls[k] for k in chosen), tuple(tars), tuple(self.sizes[k] for k in chosen))


def fetch_indices(urls: Sequence[str], data_dir: Path) -> RemoteShards:
    """Downloads the indices of shards, which are fetched later, and removes shards that are here in another version.

    Raises DataError if a shard has no index, or the server does not answer.
    """

    def fetch(place: tuple[str, Path]) -> int:
        (url, tar), index = place, index_path(place[1])
        try:
            if not (download.is_complete(index) and download.is_current(_sibling_url(url, index.name), index)):
                download.download_file(_sibling_url(url, index.name), index, limit=MAX_INDEX)
        except download.MissingFile as error:
            raise DataError(
                f"{strip_secrets(url)} has no index {index.name} beside it, which says what is in it; pack the images "
                "(resnetlab data pack), or leave out sampling=shards."
            ) from error
        if tar.is_file() and not (download.is_complete(tar) and download.is_current(url, tar)):
            tar.unlink()
        try:
            return int(parse_json(index.read_bytes())["bytes"])
        except (ValueError, KeyError, TypeError) as error:
            damaged = f"the index of {strip_secrets(url)} is damaged ({error})"
            raise DataError(f"{damaged}; pack the shards again.") from error

    tars = tuple(_local_path(url, data_dir, "-as-needed") for url in urls)
    tars[0].parent.mkdir(parents=True, exist_ok=True)
    with download.file_lock(tars[0].with_name("indices")), ThreadPoolExecutor(AT_ONCE) as pool:
        return RemoteShards(tuple(urls), tars, tuple(pool.map(fetch, zip(urls, tars, strict=True))))


def _sibling_url(url: str, name: str) -> str:
    """The address of a file beside a shard; keeps the query, such as a signature."""
    path, mark, query = url.partition("?")
    return path[: path.rfind("/") + 1] + name + mark + query


def fetch_shards(urls: Sequence[str], data_dir: Path) -> list[Path]:
    """Downloads shards and, if the server has them, their indices; returns the local files.

    Raises DataError if the server lacks a shard, drops it every time, or it arrives incomplete; RunError if it cannot be
    written.
    """
    tars = [_local_path(url, data_dir) for url in urls]
    known = {tar for tar in tars if download.is_complete(tar)}
    if known.issuperset(tars):
        return tars
    for url, tar in zip(urls, tars, strict=True):
        with download.file_lock(tar):
            complete = download.is_complete(tar)  # another process may have fetched it while this one waited
            if not complete or (tar in known and not download.is_current(url, tar)):
                _fetch_shard(url, tar)
                tar.with_name(CLASSES).unlink(missing_ok=True)
    return tars


def fetch_class_list(url: str, tar: Path) -> bytes:
    """The server's classes.txt beside a shard, empty if it has none; downloaded once."""
    file = tar.with_name(CLASSES)
    with download.file_lock(file):
        if not file.is_file():
            write_atomically(file, _fetch_small(_sibling_url(url, CLASSES), tar.parent) or b"")
        return file.read_bytes()


def _local_path(url: str, data_dir: Path, suffix: str = "") -> Path:
    base, name = strip_secrets(url).rsplit("/", 1)
    return data_dir / "shards" / (hashlib.sha256(base.encode()).hexdigest()[:12] + suffix) / name


def _fetch_shard(url: str, tar: Path) -> None:
    """Downloads a shard to `tar`, and its index if the server has one."""
    tar.unlink(missing_ok=True)
    index = index_path(tar)
    if (content := _fetch_small(_sibling_url(url, index.name), tar.parent)) is None:
        index.unlink(missing_ok=True)
    else:
        write_atomically(index, content)
    download.download_file(url, tar, _completeness_check(url, content))


def _fetch_small(url: str, folder: Path) -> bytes | None:
    """The content of a small file; None if the server does not have it."""
    try:
        return download.download_bytes(url, folder, MAX_INDEX)
    except download.MissingFile:
        return None


def _completeness_check(url: str, index: bytes | None) -> Callable[[Path], None]:
    """A check that a shard has arrived complete, for servers that do not send a file's length."""

    def check(part: Path) -> None:
        try:
            if index is None:
                scan_tar(part)  # raises DataError if the tar is truncated
            elif part.stat().st_size != parse_json(index)["bytes"]:
                raise DataError("its length is not what its index says")
        except (DataError, ValueError, KeyError, TypeError) as error:
            place = strip_secrets(url)
            raise DataError(f"{place} did not arrive whole, or its index is damaged ({error}); try again.") from error

    return check


class ShardFetcher:
    """Keeps the shards that are needed next on this machine's disk; whoever reads another one fetches it itself.

    Args:
        shards_from: step -> numbers of the shards that are needed from it on, in that order, without end.
        space: bytes that the shards may take; None for SHARE of what is free.
        at_once: how many shards must fit into it.

    Raises UsageError if they do not.
    """

    def __init__(
        self, remote: RemoteShards, shards_from: Callable[[int], Iterator[int]], space: int | None, at_once: int
    ) -> None:
        self._remote, self._shards_from = remote, shards_from
        free = shutil.disk_usage(remote.tars[0].parent).free
        self._space = int(SHARE * (free + sum(remote.sizes[k] for k in remote.present()))) if space is None else space
        # for readers that are faster than this, and fetch a shard themselves
        self._reserve = FETCHED_AT_ONCE * max(remote.sizes)
        need = min(sum(remote.sizes), at_once * max(remote.sizes)) + self._reserve
        if self._space < need:
            raise UsageError(
                f"{at_once + FETCHED_AT_ONCE} shards must fit on this machine's disk, {need / 1e9:.3g} GB, of which "
                f"{self._space / 1e9:.3g} GB may be used; make room, give more with --shard-space, or pack smaller shards."
            )
        self._step, self._closed, self._woken = 0, False, -LOOK_PAUSE
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def advance(self, step: int) -> None:
        """A step is about to be read."""
        self._step = step
        if (now := time.monotonic()) < self._woken + LOOK_PAUSE:
            return
        self._woken = now
        self._wake.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="shards", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Fetches nothing more; shards under way are completed."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        with ThreadPoolExecutor(FETCHED_AT_ONCE) as pool, contextlib.suppress(ResNetLabError, StopSignal):
            while not self._closed:  # an error is raised again where the shard is read
                self._wake.wait()
                self._wake.clear()
                while not self._closed and (missing := self._make_room()):
                    list(pool.map(self._remote.fetch, missing))

    def _make_room(self) -> list[int]:
        """The next shards to fetch, for which there is room."""
        wanted, size, space = dict[int, None](), 0, self._space - self._reserve
        for shard in itertools.islice(self._shards_from(self._step), len(self._remote.urls)):
            if shard not in wanted:
                size += self._remote.sizes[shard]
                if size > space:
                    break
                wanted[shard] = None
        present = self._remote.present()
        missing = [shard for shard in wanted if shard not in present][:FETCHED_AT_ONCE]
        excess = sum(self._remote.sizes[k] for k in (*present, *missing)) - space
        for shard in present:
            if excess > 0 and shard not in wanted:
                self._remote.remove(shard)
                excess -= self._remote.sizes[shard]
        return missing
