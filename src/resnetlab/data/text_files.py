"""Reads text and JSON that people and their tools wrote: byte order marks, UTF-16 (PowerShell's `>`), CRLF.

The one place for all lists, class files and annotations.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

from resnetlab.data.decode import check_regular_file
from resnetlab.errors import DataError
from resnetlab.formatting import parse_json

MAX_PEEKED = 2**24  # bytes
PEEK = 2**16  # bytes of a file that show whose it is
PEEKED_FILES = 50  # of a folder, that are looked into to see whose they are
BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_bytes(file: Path) -> bytes:
    """A file's content; raises a DataError that names it if it cannot be read, or is a pipe."""
    check_regular_file(file)
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file} is not there.") from None
    except PermissionError:
        raise DataError(f"{file} cannot be read: no permission.") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}).") from error


def find_encoding(start: bytes) -> str:
    """The encoding of a text by its first bytes; UTF-8 without a byte order mark."""
    return next((encoding for mark, encoding in BYTE_ORDER_MARKS.items() if start.startswith(mark)), "utf-8")


def read_text(file: Path) -> str:
    """A text without byte order mark; raises DataError if it cannot be read or is not UTF-8."""
    return decode_text(read_bytes(file), file)


def decode_text(content: bytes, file: Path | str) -> str:
    """The text of a file's content, without byte order mark; raises DataError, naming the file, if it is not UTF-8."""
    try:
        return content.decode(find_encoding(content))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not valid UTF-8 (byte {error.start:,}); save it as UTF-8.") from error


def read_lines(file: Path) -> list[str]:
    """The lines of a text without spaces around them; empty lines are left out."""
    return [line for line in map(str.strip, re.split("[\r\n]", read_text(file))) if line]


def peek_text(file: Path) -> str:
    """The begin of a text that may be of any program, without what is not valid in its encoding."""
    with file.open("rb") as stream:
        start = stream.read(PEEK)
    return start.decode(find_encoding(start), "replace")


def has_patterns(file: Path, first: str, *others: str) -> bool:
    """Whether a text that may be of any program has one pattern in its begin, and others anywhere in it.

    What a tool writes before all else is looked for in the begin, and what only some images have (a box) anywhere: the first
    thousand images may have none.
    """
    text = peek_text(file)
    if not re.search(first, text, re.DOTALL):
        return False
    if all(re.search(pattern, text) for pattern in others):
        return True
    content = file.read_bytes()
    text = content.decode(find_encoding(content), "replace")
    return all(re.search(pattern, text) for pattern in others)


def peek_lines(file: Path) -> list[str]:
    """The lines of a text that may be of any program, such as a note in Latin-1; none if it is large or cannot be read."""
    try:
        return read_lines(file) if file.stat().st_size < MAX_PEEKED else []
    except (DataError, OSError):
        return []


def read_json(file: Path) -> Any:
    """The content of a JSON file; raises DataError if it is broken."""
    text = read_text(file)
    try:
        return parse_json(text)
    except ValueError as error:
        raise DataError(f"{file} is broken JSON ({error}); write it again.") from error
