"""Files over HTTP: fetched once, in full, with patience; what has arrived is kept when a connection drops.

While a file NAME is fetched NAME.part holds what has arrived. Two hidden files stay beside it: .NAME.lock, held by the process
that fetches, and .NAME.origin, which says what version of the file the server sent (ETag, Last-Modified) and how long it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from residuum.errors import DataError
from residuum.records import write_atomically, writing_error

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts, of which there is one more
TIMEOUT = 30  # seconds without a byte
PIECE = 1 << 20  # bytes read at once
ABSENT = {
    403: "it is not there, or the address may not be read (a signed one may have expired)",
    404: "it is not there",
    410: "it is not there any more",
}  # stores that do not let their contents be listed say 403 of what is not there

T = TypeVar("T")


class NotThere(DataError):
    """The server answers that it has no such file, or none for us."""


class Origin(NamedTuple):
    """Which version of a file a server sends: ETag and Last-Modified, "" where it has none, and bytes, -1 where not told."""

    tag: str = ""
    date: str = ""
    size: int = -1

    @property
    def version(self) -> str:
        """By which a server can tell whether it still has the same bytes; a weak tag does not promise that."""
        return self.date if self.tag.startswith("W/") else self.tag or self.date


def shown(url: str) -> str:
    """An address as messages have it: without its query, which may be a signature."""
    return url.partition("?")[0]


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Waits until no other process fetches `target`. Raises RunError where its folder cannot be written."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = open(target.with_name(f".{target.name}.lock"), "w")  # noqa: SIM115 - closed below, which releases the lock
    except OSError as error:
        raise writing_error(target, error) from error
    with file:
        with contextlib.suppress(OSError):  # a file system without locks: go on without
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download(url: str, target: Path, check: Callable[[Path], None] = lambda part: None) -> Path:
    """Fetches a file; an older one goes, and the new one appears at `target` when it is whole. `alone` keeps others out.

    Args:
        check: raises DataError where the file that has arrived is not whole; where the server told no length that is taken for
            a dropped connection.

    Raises:
        NotThere: the server does not have it.
        DataError: the server refuses, drops the connection every time, or sends another file; with the URL.
        RunError: no space or no permission to write.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        target.unlink(missing_ok=True)  # what is kept of the version is from now on the new one's
        if not _origin(target).version:  # of which file it is a part cannot be told
            part.unlink(missing_ok=True)
        _patiently(url, lambda: _fetch(url, part, target, check))
        _keep(target, _origin(target)._replace(size=part.stat().st_size))
        os.replace(part, target)
    except OSError as error:
        raise writing_error(target, error) from error
    return target


def is_whole(target: Path) -> bool:
    """Whether a file lies there as it was fetched; no server is asked."""
    return target.is_file() and target.stat().st_size == _origin(target).size


def is_current(url: str, target: Path) -> bool:
    """Whether the server still has the file as it was fetched; raises DataError where it does not answer."""
    kept = _origin(target)
    asked = {"If-None-Match": kept.tag, "If-Modified-Since": kept.date}
    request = Request(url, headers={name: value for name, value in asked.items() if value})

    def ask() -> bool:
        try:
            with urlopen(request, timeout=TIMEOUT) as answer:
                now = _told(answer.headers)
                return now[:2] == kept[:2] and now.size in (kept.size, -1)
        except HTTPError as error:
            if error.code == 304:
                error.close()
                return True
            raise

    return _patiently(url, ask)


def _patiently(url: str, attempt: Callable[[], T]) -> T:
    """What an attempt gives; as many are made as a server's bad moment may need."""
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except _Unwritten:
            raise
        except HTTPError as error:
            error.close()
            said = f"{shown(url)} cannot be fetched: the server says {error.code} {error.reason}"
            if error.code in ABSENT:
                raise NotThere(f"{said}: {ABSENT[error.code]}.") from error
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DataError(f"{said}.") from error
            why = f"the server says {error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            why = str(getattr(error, "reason", None) or error or type(error).__name__)
        if pause is not None:
            time.sleep(pause)
    raise DataError(f"{shown(url)} cannot be fetched: {why} ({len(PAUSES) + 1} attempts); try again later.")


class _Unwritten(OSError):
    """What arrived could not be written: no matter of the server's."""


def _fetch(url: str, part: Path, target: Path, check: Callable[[Path], None]) -> None:
    """Goes on with `part` where it ends, if the server still has that version; raises OSError where it ends early."""
    have, kept = part.stat().st_size if part.exists() else 0, _origin(target)
    wanted = {"Range": f"bytes={have}-"} | ({"If-Range": kept.version} if kept.version else {})
    try:
        answer = urlopen(Request(url, headers=wanted if have else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # what we have is longer than the file: begin again
            part.unlink(missing_ok=True)
        raise
    with answer:
        now = _told(answer.headers)
        if have and answer.status == 206:
            if not _goes_on(answer.headers.get("Content-Range") or "", have, now, kept):
                part.unlink()
                raise OSError("the server sent a part of another file, or another part, than was asked for")
        else:  # the server sends it from the start
            have = 0
            _keep(target, now)
        length = answer.headers.get("Content-Length")
        got = _write(iter(lambda: answer.read(PIECE), b""), part, "ab" if have else "wb")
    if length is not None and got < int(length):
        raise OSError(f"the connection was dropped after {have + got:,} of {have + int(length):,} bytes")
    try:
        check(part)
    except DataError as error:
        if length is None:
            raise OSError(f"the connection was dropped after {have + got:,} bytes, or the file is damaged") from error
        part.unlink()
        raise


def _goes_on(place: str, have: int, now: Origin, kept: Origin) -> bool:
    """Whether an answer to a request for a part is the rest, "bytes 30-99/100", of the file that the beginning is of."""
    total = place.rpartition("/")[2]
    same_size = kept.size < 0 or not total.isdecimal() or int(total) == kept.size
    return (not place or place.startswith(f"bytes {have}-")) and same_size and now[:2] in (kept[:2], ("", ""))


def _write(pieces: Iterator[bytes], part: Path, mode: str) -> int:
    """Bytes written."""
    try:
        file = open(part, mode)  # noqa: SIM115 - closed below
    except OSError as error:
        raise _Unwritten(*error.args) from error
    got = 0
    with file:
        for piece in pieces:
            try:
                file.write(piece)
                file.flush()
            except OSError as error:
                raise _Unwritten(*error.args) from error
            got += len(piece)
    return got


def _told(headers: Message) -> Origin:
    length = headers.get("Content-Length", "")
    return Origin(headers.get("ETag", ""), headers.get("Last-Modified", ""), int(length) if length.isdecimal() else -1)


def _origin(target: Path) -> Origin:
    """What is kept of a file's version; nothing where that is not there or damaged."""
    try:
        return Origin(*json.loads(target.with_name(f".{target.name}.origin").read_bytes()))
    except (OSError, ValueError, TypeError):
        return Origin()


def _keep(target: Path, origin: Origin) -> None:
    write_atomically(target.with_name(f".{target.name}.origin"), json.dumps(origin) + "\n")


def read(url: str, folder: Path) -> bytes:
    """A small file; `folder`, which is there, is for what has arrived. Raises as `download` does."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".small-") as place:
        return download(url, Path(place) / "file").read_bytes()


def checksum(path: Path) -> str:
    """MD5 of a file, as publishers of archives print it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def published(url: str, md5: str) -> Callable[[Path], None]:
    """A check for `download`: the file is the one that was published."""

    def check(part: Path) -> None:
        if checksum(part) != md5:
            raise DataError(f"{url} is not the file that was published (its MD5 is not {md5}); fetch it elsewhere.")

    return check
