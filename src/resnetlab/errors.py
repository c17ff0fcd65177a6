"""The errors that a user can cause. Each message says what is wrong and what to do next.

ResNetLabError            exit code 1
├── UsageError           exit code 2: an unknown name, key, option or value (UnknownNameError, ArgumentError)
├── DataError            images, labels or archives that cannot be read
├── ModelFileError       a model file or checkpoint that is missing, damaged or not of this program
├── RunError             a run folder that cannot be written, continued or shared
└── DivergedError        a loss that is no longer finite
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec, TypeVar

from resnetlab.peer_words import ANSWERS, NETWORK_ANSWERS, is_peer_word, translate

P = ParamSpec("P")
R = TypeVar("R")
PROCESS_GONE = "another process of this job is gone"  # of the processes that torchrun or --procs started


class ResNetLabError(Exception):
    """Base of all errors that the command line prints as one sentence."""

    exit_code = 1
    on_command_line = False  # set on this class while a command runs


_COMMAND = re.compile(r"(`[^`]*`|\b(?:resnetlab|torchrun|docker run|convmv|(?:uv )?pip) [^;`]*)")
_OPTION = re.compile(r"--([a-z][a-z-]*)(?: ([A-Z][A-Z.]+|\d[\w.,]*|skip|cpu)\b)?")


def name_arguments(text: str) -> str:
    """A message with the arguments of Python in place of options; commands in it stay as they are.

    >>> name_arguments("try --set lr=0.01, or --start-from FILE; go on with: resnetlab train --resume RUN")
    'try lr=0.01, or start_from=FILE; go on with: resnetlab train --resume RUN'
    """

    def rename(match: re.Match[str]) -> str:
        name = match[1].replace("-", "_")
        value = repr(match[2]) if (match[2] or "").islower() else match[2]
        return f"{name}={value}" if value else name

    parts = _COMMAND.split(text)
    return "".join(p if i % 2 else _OPTION.sub(rename, p.replace("--set ", "")) for i, p in enumerate(parts))


class UsageError(ResNetLabError, ValueError):
    """An unknown name, key, option or value."""

    exit_code = 2


class ArgumentError(UsageError, TypeError):
    """An argument that a function does not have, or one that it lacks; also a TypeError, as from any function."""


class UnknownNameError(UsageError, AttributeError):
    """A name that a module or an object does not have; also an AttributeError, as `hasattr` expects."""


class DataError(ResNetLabError):
    """Images, labels or archives that cannot be read."""


class DataErrors(DataError):
    """Several problems of a data set; the message has the first, and says what lists all.

    Attributes:
        problems: a sentence for each.
    """

    def __init__(self, data: str, problems: Sequence[str]) -> None:
        more = f" There are {len(problems) - 1:,} more" if len(problems) > 1 else ""
        hint = f"; `resnetlab data check {data}` lists all." if os.path.exists(data) else "."
        super().__init__(problems[0] + (more and more + hint))
        self.problems = tuple(problems)


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


def warn(sentence: str) -> None:
    """Gives a warning at the place that called the caller."""
    warnings.warn(sentence, UserWarning, stacklevel=3)


def unknown_name_error(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """The error for an unknown name; it suggests ours for another program's word, or the nearest, or lists them all."""
    names, word = list(known), str(given).replace("-", "_")
    same = [name for name in names if name.lower() == str(given).lower()]
    own = same or [own for own in [translate(word, names)] if own]
    near = own
    if not own and not (kind.startswith(("key", "argument")) and is_peer_word(word)):
        near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(names) + "."
    if not own and kind.startswith(("key", "argument")):
        answers = NETWORK_ANSWERS if "network" in kind else {}
        answer = answers.get(word) or ANSWERS.get(word, hint)
        if not kind.startswith("argument"):
            hint = answer
        elif {option.replace("-", "_") for option, _ in _OPTION.findall(answer)} <= {*names, "set"}:  # it has them all
            hint = name_arguments(answer)
    return UsageError(f"unknown {kind} {given!r}; {hint}")


class AnsweredAttributes:
    """An object that answers another program's word for one of its attributes."""

    attribute_answers: ClassVar[Mapping[str, str]]

    if not TYPE_CHECKING:  # a type checker would accept every attribute

        def __getattr__(self, name: str) -> Any:
            raise unknown_attribute_error(self, name, self.attribute_answers)


def unknown_attribute_error(owner: object, name: str, answers: Mapping[str, str]) -> UnknownNameError:
    """The error for an attribute that an object does not have, with our word for another program's."""
    hint = f"; use {answers[name]}." if name in answers else "."
    return UnknownNameError(f"{type(owner).__name__} has no attribute {name!r}{hint}")


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function that people call from Python: its errors end in one sentence, after few frames.

    Messages name its arguments, not the options of a command, unless a command runs. An argument that it does not have is
    answered as an unknown name is, by ArgumentError.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except ResNetLabError as error:
            if ResNetLabError.on_command_line:
                raise
            if error.args:
                error.args = (name_arguments(str(error.args[0])), *error.args[1:])
            raise error.with_traceback(None) from None
        except TypeError:
            if (wrong := _explain_arguments(function, args, kwargs)) is None:
                raise
            raise wrong from None

    return call


def _explain_arguments(
    function: Callable[..., Any], args: Sequence[Any], values: Mapping[str, Any]
) -> ArgumentError | None:
    """The error if a function cannot be called so, or a path is of another type; None if it can."""
    called, name = inspect.signature(function), function.__name__
    try:
        given = called.bind(*args, **values).arguments
    except TypeError as error:
        known = [p.name for p in called.parameters.values() if p.name != "self" and p.kind != p.VAR_KEYWORD]
        if unknown := [word for word in values if word not in known]:
            return ArgumentError(str(unknown_name_error(f"argument of {name}", unknown[0], known)))
        pair = " Images and labels are one pair: (X, y)." if "data" in known and "positional" in str(error) else ""
        return ArgumentError(f"{name}: {error}; its arguments: {', '.join(known)}.{pair}")
    for word, value in given.items():
        path = str(called.parameters[word].annotation).removesuffix(" | None") == "str | Path"
        if path and not isinstance(value, str | os.PathLike | None):
            return ArgumentError(f"{name}: {word} must be a path, not {value!r}.")
    return None


def suggest_path(path: str | Path) -> str:
    """The question whether a file or folder beside one that is not there is meant; "" where none has a similar name."""
    path = Path(path)
    try:
        names = [name for name in os.listdir(path.parent) if not name.startswith(".")]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.7)
    return f"; did you mean {str(path.with_name(near[0]))!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for another message; its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


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
