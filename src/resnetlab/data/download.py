"""Downloads files of servers and object stores once, with retries; what has arrived is kept if a connection drops.

While a file NAME is fetched, NAME.part holds what has arrived. Two hidden files stay beside it: .NAME.lock, locked by the
process that fetches, and .NAME.origin, which records the server's version of the file (ETag, Last-Modified) and its length.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from email.message import Message
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from resnetlab.data import object_store
from resnetlab.data.object_store import strip_secrets
from resnetlab.errors import DataError
from resnetlab.formatting import parse_json
from resnetlab.run_folder import hold_lock, move_into_place, temporary_folder, write_atomically, writing
from resnetlab.stopping import check_stop

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds between attempts, of which there is one more
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 20  # bytes read at once
ABSENT = {
    403: "it is not there, or the address may not be read (a signed one may have expired)",
    404: "it is not there",
    410: "it is not there any more",
}  # stores that do not allow listing answer 403 for a missing file

T = TypeVar("T")


class MissingFile(DataError):
    """The server has no such file, or denies access to it."""


class FileVersion(NamedTuple):
    """The version of a file on a server: ETag and Last-Modified, "" if absent, and its size in bytes, -1 if unknown."""

    etag: str = ""
    last_modified: str = ""
    size: int = -1

    @property
    def validator(self) -> str:
        """The value for If-Range, with which a server checks that its bytes are unchanged; weak ETags do not promise that."""
        return self.last_modified if self.etag.startswith("W/") else self.etag or self.last_modified


@contextlib.contextmanager
def file_lock(target: Path) -> Iterator[None]:
    """Waits until no other process fetches `target`. Raises RunError if its folder cannot be written."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with hold_lock(target.with_name(f".{target.name}.lock")):
        yield


def download_file(
    url: str, target: Path, check: Callable[[Path], None] = lambda part: None, limit: int | None = None
) -> Path:
    """Downloads a file to `target`, where it appears once it is complete; an older one is removed. Hold `file_lock` meanwhile.

    Args:
        check: raises DataError if the file that has arrived is not complete; without a length from the server this is treated
            as a dropped connection.
        limit: most bytes.

    Raises:
        MissingFile: the server does not have it.
        DataError: the server refuses, drops the connection every time, or sends another file; with the URL.
        RunError: no space or no permission to write.
    """
    part = target.with_name(f"{target.name}.part")
    with writing(target):
        target.unlink(missing_ok=True)  # from here on .NAME.origin describes the new file
        if not _read_version(target).validator:  # which file it is a part of is unknown
            part.unlink(missing_ok=True)
        _retry(url, lambda: _fetch(url, part, target, check, limit))
        _write_version(target, _read_version(target)._replace(size=part.stat().st_size))
        move_into_place(part, target)
    return target


def is_complete(target: Path) -> bool:
    """Whether a file is there as it was downloaded; does not ask the server."""
    return target.is_file() and target.stat().st_size == _read_version(target).size


def is_current(url: str, target: Path) -> bool:
    """Whether the server still has the version that was downloaded; raises DataError if it does not answer."""
    known = _read_version(target)
    if object_store.is_store(url):
        return _retry(url, lambda: FileVersion(*object_store.find_version(url)) == known)
    conditions = {"If-None-Match": known.etag, "If-Modified-Since": known.last_modified}
    request = Request(url, headers={name: value for name, value in conditions.items() if value})

    def ask() -> bool:
        try:
            with urlopen(request, timeout=TIMEOUT) as response:
                now = _parse_headers(response.headers)
                return now[:2] == known[:2] and now.size in (known.size, -1)
        except HTTPError as error:
            if error.code == 304:
                error.close()
                return True
            raise

    return _retry(url, ask)


def _retry(url: str, attempt: Callable[[], T]) -> T:
    """Returns what `attempt` returns, trying again with pauses while errors may be temporary."""
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except _WriteError:
            raise
        except HTTPError as error:
            error.close()
            reason = f"the server says {error.code} {error.reason}"
            if error.code in ABSENT:
                raise MissingFile(f"{strip_secrets(url)} cannot be fetched: {reason}: {ABSENT[error.code]}.") from error
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DataError(f"{strip_secrets(url)} cannot be fetched: {reason}.") from error
        except FileNotFoundError as error:
            raise MissingFile(f"{strip_secrets(url)} cannot be fetched: {ABSENT[404]}.") from error
        except (OSError, HTTPException) as error:
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        for _ in range(round(10 * (pause or 0))):
            check_stop()
            time.sleep(0.1)
    raise DataError(f"{strip_secrets(url)} cannot be fetched: {reason} ({len(PAUSES) + 1} attempts); try again later.")


class _WriteError(OSError):
    """What arrived could not be written; retrying would not help."""


def _fetch(url: str, part: Path, target: Path, check: Callable[[Path], None], limit: int | None) -> None:
    """Continues `part` if the server still has that version of the file; raises OSError if it ends early."""
    have, known = part.stat().st_size if part.exists() else 0, _read_version(target)
    if object_store.is_store(url):
        now = FileVersion(*object_store.find_version(url))
        have = have if now == known and have < now.size else 0
        _write_version(target, now)
        with object_store.open_at(url, have) as file:
            size = _append(file, part, have, url, limit)
        return _check_arrived(part, check, size, now.size)
    headers = {"Range": f"bytes={have}-"} | ({"If-Range": known.validator} if known.validator else {})
    try:
        response = urlopen(Request(url, headers=headers if have else {}), timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the part is longer than the file: start again
            part.unlink(missing_ok=True)
        raise
    with response:
        now = _parse_headers(response.headers)
        if have and response.status == 206:
            if not _is_continuation(response.headers.get("Content-Range") or "", have, now, known):
                part.unlink()
                raise OSError("the server sent a part of another file, or another part, than was asked for")
        else:  # the server sends it from the start
            have = 0
            _write_version(target, now)
        size = _append(response, part, have, url, limit)
    return _check_arrived(part, check, size, None if now.size < 0 else have + now.size)


def _check_arrived(part: Path, check: Callable[[Path], None], received: int, size: int | None) -> None:
    """Raises OSError if the connection was dropped, DataError if a complete file is damaged; `size` is None if unknown."""
    if size is not None and received < size:
        raise OSError(f"the connection was dropped after {received:,} of {size:,} bytes")
    try:
        check(part)
    except DataError as error:
        if size is None:
            raise OSError(f"the connection was dropped after {received:,} bytes, or the file is damaged") from error
        part.unlink()
        raise


def _is_continuation(content_range: str, have: int, now: FileVersion, known: FileVersion) -> bool:
    """Whether a partial response is the rest, "bytes 30-99/100", of the file whose first `have` bytes are here."""
    total = content_range.rpartition("/")[2]
    same_size = known.size < 0 or not total.isdecimal() or int(total) == known.size
    starts_here = not content_range or content_range.startswith(f"bytes {have}-")
    return starts_here and same_size and now[:2] in (known[:2], ("", ""))


def _append(source: IO[bytes], part: Path, have: int, url: str, limit: int | None) -> int:
    """Writes the rest of a source behind the first `have` bytes of `part`, and returns how many bytes that has then.

    Raises DataError once more than `limit` bytes come.
    """
    try:
        file = open(part, "ab" if have else "wb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise _WriteError(*error.args) from error
    received = 0
    with file:
        while chunk := source.read(CHUNK):
            check_stop()
            received += len(chunk)
            if limit is not None and received > limit:
                raise DataError(f"{strip_secrets(url)} has more than {limit:,} bytes, far more than such a file needs.")
            try:
                file.write(chunk)
                file.flush()
            except OSError as error:
                raise _WriteError(*error.args) from error
    return have + received


def _parse_headers(headers: Message) -> FileVersion:
    length = headers.get("Content-Length", "")
    size = int(length) if length.isdecimal() else -1
    return FileVersion(headers.get("ETag", ""), headers.get("Last-Modified", ""), size)


def _read_version(target: Path) -> FileVersion:
    """The recorded version of a file; an empty one if the record is missing or damaged."""
    try:
        etag, last_modified, size = parse_json(target.with_name(f".{target.name}.origin").read_bytes())
        return FileVersion(str(etag), str(last_modified), int(size))
    except (OSError, ValueError, TypeError):
        return FileVersion()


def _write_version(target: Path, version: FileVersion) -> None:
    write_atomically(target.with_name(f".{target.name}.origin"), json.dumps(version) + "\n")


def download_bytes(url: str, folder: Path, limit: int) -> bytes:
    """The content of a small file; `folder` must exist and holds it temporarily.

    Raises as `download_file` does, and DataError for more than `limit` bytes, of which no more are read.
    """
    with temporary_folder(folder, ".small-") as place:
        return download_file(url, place / "file", limit=limit).read_bytes()


def compute_md5(path: Path) -> str:
    """MD5 of a file, as publishers of archives print it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def md5_check(url: str, md5: str) -> Callable[[Path], None]:
    """A `check` for `download_file`: raises DataError if the file is not the published one."""

    def check(part: Path) -> None:
        if compute_md5(part) != md5:
            raise DataError(f"{url} is not the file that was published (its MD5 is not {md5}); fetch it elsewhere.")

    return check
