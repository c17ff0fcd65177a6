"""The errors that a user can cause. Each message says what is wrong and what to do next.

ResNetLabError            exit code 1
├── UsageError           exit code 2: an unknown name, key, option or value
├── DataError            images, labels or archives that cannot be read
├── ModelFileError       a model file or checkpoint that is missing, damaged or not of this program
├── RunError             a run folder that cannot be written, continued or shared
└── DivergedError        a loss that is no longer finite
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from resnetlab.peer_words import ANSWERS, translate

PROCESS_GONE = "another process of this job is gone"  # of the processes that torchrun or --procs started


class ResNetLabError(Exception):
    """Base of all errors that the command line prints as one sentence."""

    exit_code = 1
    on_command_line = False  # set on this class while a command runs


_COMMAND = re.compile(r"(`[^`]*`|\b(?:resnetlab|torchrun|docker run|convmv|(?:uv )?pip) [^;`]*)")
_OPTION = re.compile(r"--([a-z][a-z-]*)(?: ([A-Z][A-Z.]+|\d[\w.,]*)\b)?")


def name_arguments(text: str) -> str:
    """A message with the arguments of Python in place of options; commands in it stay as they are.

    >>> name_arguments("try --set lr=0.01, or --start-from FILE; go on with: resnetlab train --resume RUN")
    'try lr=0.01, or start_from=FILE; go on with: resnetlab train --resume RUN'
    """

    def rename(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        return f"{name}={match[2]}" if match[2] else name

    parts = _COMMAND.split(text)
    return "".join(p if i % 2 else _OPTION.sub(rename, p.replace("--set ", "")) for i, p in enumerate(parts))


@contextlib.contextmanager
def python_messages() -> Iterator[None]:
    """Errors of a function that Python calls name its arguments, not the options of a command, unless a command runs."""
    try:
        yield
    except ResNetLabError as error:
        if not ResNetLabError.on_command_line and error.args:
            error.args = (name_arguments(str(error.args[0])), *error.args[1:])
        raise


class UsageError(ResNetLabError, ValueError):
    """An unknown name, key, option or value."""

    exit_code = 2


class DataError(ResNetLabError):
    """Images, labels or archives that cannot be read."""


class ModelFileError(ResNetLabError):
    """A model file or checkpoint that is missing, damaged or not of this program."""


class RunError(ResNetLabError):
    """A run folder that cannot be written, continued or shared."""


class NoSpaceError(RunError):
    """The disk is full.

    Attributes:
        hint: how to go on; empty if it is the same command again.
    """

    def __init__(self, path: Path, hint: str = "") -> None:
        super().__init__(f"no space left to write {path}; free some, then {hint or 'run the same command again.'}")
        self.path, self.hint = path, hint


class DivergedError(ResNetLabError):
    """A loss that is no longer finite."""


def unknown_name_error(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """The error for an unknown name; it suggests ours for another program's word, or the nearest, or lists them all."""
    names, word = list(known), str(given).replace("-", "_")
    same = [name for name in names if name.lower() == str(given).lower()]
    own = same or [own for own in [translate(word, names)] if own]
    near = own or difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(names) + "."
    if not own and kind.startswith("key"):
        hint = ANSWERS.get(word, hint)
    return UsageError(f"unknown {kind} {given!r}; {hint}")


def missing_package(what: str, package: str | None, extra: str) -> UsageError:
    """The error for `what` (an option, a command, a file), which needs a package that an extra of ours installs."""
    return UsageError(f"{what} needs the package {package}; install it with: {install_hint(extra)}")


def install_hint(extra: str) -> str:
    """The command that installs an extra of this package from the place that the package itself was installed from."""
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import urlsplit
    from urllib.request import url2pathname

    name = __name__.partition(".")[0]
    try:
        package = distribution(name)
        installer, origin = package.read_text("INSTALLER") or "", package.read_text("direct_url.json") or "{}"
    except PackageNotFoundError:  # run from its source
        installer, origin = "", "{}"
    install = "uv pip install" if installer.strip() == "uv" else "pip install"
    source = json.loads(origin)
    url = source.get("url", "")
    if source.get("dir_info", {}).get("editable"):
        return f"{install} -e '{url2pathname(urlsplit(url).path)}[{extra}]'"
    if vcs := source.get("vcs_info"):
        url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
    return f"{install} '{name}[{extra}]" + (f" @ {url}'" if url else "'")
