"""Files behind fsspec addresses: s3://, gs://, hf://, memory://, … Credentials are those that their packages find.

`data.download` fetches them as it fetches those of a server: once, resumed where it was dropped, and checked for changes.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import IO, Any

from resnetlab.errors import DataError, UsageError, missing_package

EXTRAS = {  # the package that opens addresses of a kind, and our extra that installs it
    "s3": ("s3fs", "remote"),
    "gs": ("gcsfs", "remote"),
    "hf": ("huggingface-hub", "hub"),
}
CREDENTIALS = {  # where the package of a kind of address looks for them
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "set HF_TOKEN",
    "http": "give a signed address, or download the files",
}
_USER = re.compile(r"(?<=://)(?:[^/@]*@|[^/@\[]*:(?!\d+/)[^@]*@)")  # a key after the colon may contain slashes
VERSION_KEYS = ("ETag", "etag", "md5Hash", "sha256", "LastModified", "last_modified", "mtime", "updated", "created")


def is_address(text: str) -> bool:
    """Whether a text is an address, of a server or of an object store.

    >>> is_address("s3://bucket/a.tar"), is_address("https://host/a.tar"), is_address("C:/a.tar"), is_address("hf:NAME")
    (True, True, False, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]+://", text) is not None


def is_store(url: str) -> bool:
    """Whether an address is of an object store, not of a server."""
    return is_address(url) and not url.startswith(("http://", "https://"))


def strip_secrets(url: str) -> str:
    """An address for messages: without its query, which may contain a signature, and without a user and password.

    >>> strip_secrets("https://me:secret@host/a.tar?signature=x")
    'https://host/a.tar'
    """
    return _USER.sub("", url.partition("?")[0], count=1)


def advise_on_password(text: str) -> str | None:
    """Where credentials belong that an address contains: "set AWS_ACCESS_KEY_ID and …"; None for an address without any.

    >>> advise_on_password("https://host:8080/a@1.tar"), advise_on_password("abfs://container@account/a.tar")
    (None, None)
    """
    user, protocol = _USER.search(text.partition("?")[0]), text.partition("://")[0]
    if user is None or (":" not in user[0] and not protocol.startswith("http")):
        return None
    variables = f"FSSPEC_{protocol.upper()}_USERNAME and FSSPEC_{protocol.upper()}_PASSWORD"
    return CREDENTIALS.get(protocol.replace("https", "http"), f"set {variables}")


def refuse_password(text: str) -> None:
    """Raises UsageError for an address with a password, which a run's recipe.toml would keep."""
    if (advice := advise_on_password(text)) is not None:
        raise UsageError(
            f"{strip_secrets(text)} is given with a password, which files would keep; leave it out, and {advice}."
        )


def strip_password(text: str) -> str:
    """An address without its password, but with its query; other texts as they are.

    >>> strip_password("https://me:secret@host/a.tar?part=1"), strip_password("abfs://container@account/a.tar")
    ('https://host/a.tar?part=1', 'abfs://container@account/a.tar')
    """
    return text if advise_on_password(text) is None else _USER.sub("", text, count=1)


@contextlib.contextmanager
def _open_store(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of an address, and the path in it.

    Raises UsageError without its package, FileNotFoundError, OSError for what may be temporary, DataError for other errors.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        yield fsspec.core.url_to_fs(url)
    except ImportError as error:
        if protocol in EXTRAS:
            raise missing_package(f"the address {strip_secrets(url)}", *EXTRAS[protocol]) from error
        raise UsageError(f"{strip_secrets(url)} cannot be opened: {_describe(error, url)}.") from error
    except PermissionError as error:
        raise DataError(
            f"{strip_secrets(url)} may not be read ({_describe(error, url)}); set the store's credentials."
        ) from error
    except (OSError, UsageError, DataError):
        raise
    except ValueError as error:
        raise UsageError(f"{strip_secrets(url)} is of no known kind ({_describe(error, url)}).") from error
    except Exception as error:  # the packages have errors of their own, such as for missing credentials
        raise DataError(f"{strip_secrets(url)} cannot be read: {_describe(error, url)}.") from error


def _describe(error: Exception, url: str) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace(url, strip_secrets(url)).rstrip(".")


def find_version(url: str) -> tuple[str, str, int]:
    """What differs between versions of a file, "", and its size in bytes, as a `download.FileVersion`."""
    with _open_store(url) as (store, path):
        store.invalidate_cache()
        info = store.info(path)
        version = next((str(info[key]) for key in VERSION_KEYS if info.get(key)), "")
        return version, "", int(info["size"])


@contextlib.contextmanager
def open_at(url: str, offset: int) -> Iterator[IO[bytes]]:
    """The file of an address, read from an offset on, in order."""
    with _open_store(url) as (store, path), store.open(path, "rb", cache_type="readahead") as file:
        file.seek(offset)
        yield file


def list_tars(url: str) -> list[str]:
    """The addresses of the tars in a folder of a store, "s3://bucket/shards/", sorted; raises DataError if there is none."""
    with _open_store(url) as (store, path):
        found = sorted(url + each.rpartition("/")[2] for each in store.glob(f"{path.rstrip('/')}/*.tar"))
    if not found:
        raise DataError(f"{strip_secrets(url)} holds no tar shard; give the folder of shards, or their pattern.")
    return found
