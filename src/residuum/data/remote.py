"""Files over HTTP: fetched once, in full, with patience; what has arrived is kept when a connection drops."""

from __future__ import annotations

import hashlib
import os
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from residuum.errors import DataError
from residuum.records import writing_error

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts, of which there is one more
TIMEOUT = 30  # seconds without a byte
PIECE = 1 << 20  # bytes read at once


def download(url: str, target: Path, md5: str | None = None) -> Path:
    """Fetches a file; the finished one appears at `target` at once, or not at all.

    Raises:
        DataError: the server does not have it, drops the connection every time, or sends another file; with the URL.
        RunError: no space or no permission to write.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_error(target, error) from error
    for pause in (*PAUSES, None):
        try:
            _fetch(url, part)
            break
        except HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DataError(f"{url} cannot be fetched: the server says {error.code} {error.reason}.") from error
            why = f"the server says {error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            why = str(getattr(error, "reason", None) or error or type(error).__name__)
        if pause is None:
            raise DataError(f"{url} cannot be fetched: {why} ({len(PAUSES) + 1} attempts); try again later.")
        time.sleep(pause)
    if md5 is not None and checksum(part) != md5:
        part.unlink()
        raise DataError(f"{url} is not the file that was published (its MD5 is not {md5}); fetch it elsewhere.")
    os.replace(part, target)
    return target


def _fetch(url: str, part: Path) -> None:
    """Goes on with `part` where it ends; raises OSError where the connection ends before the file does."""
    have = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # what we have is longer than the file: begin again
            part.unlink(missing_ok=True)
        raise
    with answer:
        if have and answer.status != 206:
            have = 0  # the server sends it from the start
        length = answer.headers.get("Content-Length")
        with open(part, "ab" if have else "wb") as file:
            got = 0
            while piece := answer.read(PIECE):
                file.write(piece)
                got += len(piece)
    if length is not None and got < int(length):
        raise OSError(f"the connection was dropped after {have + got:,} of {have + int(length):,} bytes")


def read(url: str, folder: Path) -> bytes:
    """A small file; `folder` is for what has arrived."""
    target = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        return download(url, target).read_bytes()
    finally:
        target.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """MD5 of a file, as publishers of archives print it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
