"""Files over HTTP: fetched once, in full, with patience; what has arrived is kept when a connection drops."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from residuum.errors import DataError
from residuum.records import writing_error

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts, of which there is one more
TIMEOUT = 30  # seconds without a byte
PIECE = 1 << 20  # bytes read at once
ABSENT = (403, 404, 410)  # stores that do not let their contents be listed say 403 of what is not there


class NotThere(DataError):
    """The server answers that it has no such file, or none for us."""


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


def download(url: str, target: Path, md5: str | None = None, *, patient: bool = True) -> Path:
    """Fetches a file; the finished one appears at `target` at once, or not at all.

    Raises:
        NotThere: the server does not have it.
        DataError: the server refuses, drops the connection every time, or sends another file; with the URL.
        RunError: no space or no permission to write.
    """
    part = target.with_name(f"{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_error(target, error) from error
    with alone(target):  # what another process left of it is gone on with only when that process is done
        _patiently(url, part, patient)
        if md5 is not None and checksum(part) != md5:
            part.unlink()
            raise DataError(f"{url} is not the file that was published (its MD5 is not {md5}); fetch it elsewhere.")
        os.replace(part, target)
    return target


def _patiently(url: str, part: Path, patient: bool) -> None:
    pauses = PAUSES if patient else ()
    version = ""
    for pause in (*pauses, None):
        try:
            version = _fetch(url, part, version)
            return
        except _Dropped as error:
            version, why = error.version, str(error)
        except HTTPError as error:
            if error.code in ABSENT:
                raise NotThere(f"{url} cannot be fetched: the server says {error.code} {error.reason}.") from error
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DataError(f"{url} cannot be fetched: the server says {error.code} {error.reason}.") from error
            why = f"the server says {error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            why = str(getattr(error, "reason", None) or error or type(error).__name__)
        if pause is None:
            raise DataError(f"{url} cannot be fetched: {why} ({len(pauses) + 1} attempts); try again later.")
        time.sleep(pause)


class _Dropped(OSError):
    """The connection ended before the file did; `version` is the file's, to go on with the same one only."""

    def __init__(self, message: str, version: str) -> None:
        super().__init__(message)
        self.version = version


def _fetch(url: str, part: Path, version: str) -> str:
    """Goes on with `part` where it ends, if the server still has that version; raises _Dropped where it ends early."""
    have = part.stat().st_size if part.exists() else 0
    wanted = {"Range": f"bytes={have}-"} | ({"If-Range": version} if version else {})
    request = Request(url, headers=wanted if have else {})
    try:
        answer = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # what we have is longer than the file: begin again
            part.unlink(missing_ok=True)
        raise
    with answer:
        if have and answer.status != 206:
            have = 0  # the server sends it from the start
        if have and not (answer.headers.get("Content-Range") or f"bytes {have}-").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError("the server sent another part of the file than was asked for")
        tag = answer.headers.get("ETag") or ""
        version = "" if tag.startswith("W/") else tag  # a weak one does not promise the same bytes
        length = answer.headers.get("Content-Length")
        with open(part, "ab" if have else "wb") as file:
            got = 0
            while piece := answer.read(PIECE):
                file.write(piece)
                got += len(piece)
    if length is not None and got < int(length):
        raise _Dropped(f"the connection was dropped after {have + got:,} of {have + int(length):,} bytes", version)
    return version


def read(url: str, folder: Path, *, patient: bool = True) -> bytes:
    """A small file; `folder` is for what has arrived. With `patient` false one attempt is made."""
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}.{os.getpid()}"
    try:
        return download(url, target, patient=patient).read_bytes()
    finally:
        for name in (target.name, f"{target.name}.part", f".{target.name}.lock"):
            target.with_name(name).unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """MD5 of a file, as publishers of archives print it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
