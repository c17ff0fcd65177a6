"""Downloads shards, with their indices and class names, to data_dir/shards, from a server or an object store.

Shards that were downloaded before are used without a server. Only if one of the requested shards is missing or has another
length, the server is asked about all of them, so that shards of two packings are never mixed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from resnetlab.data import download
from resnetlab.data.object_store import strip_secrets
from resnetlab.data.tar_index import MAX_INDEX, index_path, scan_tar
from resnetlab.errors import DataError
from resnetlab.formatting import parse_json
from resnetlab.run_folder import write_atomically

CLASSES = "classes.txt"


def _sibling_url(url: str, name: str) -> str:
    """The address of a file beside a shard; keeps the query (a signature, say)."""
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


def _local_path(url: str, data_dir: Path) -> Path:
    base, name = strip_secrets(url).rsplit("/", 1)
    return data_dir / "shards" / hashlib.sha256(base.encode()).hexdigest()[:12] / name


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
            raise DataError(
                f"{strip_secrets(url)} did not arrive whole, or its index is damaged ({error}); try again."
            ) from error

    return check
