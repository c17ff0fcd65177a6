"""Every error that a person can cause, drawn as a tree. Each message says what is wrong and what to do next.

ResiduumError            exit code 1
├── UsageError           exit code 2: a name, key, option or value that is not one we know
├── DataError            pictures, labels or archives that cannot be read
├── ModelFileError       a model file or checkpoint that is missing, damaged or not ours
├── RunError             a run folder that cannot be written, continued or shared
└── DivergedError        a loss that is no longer finite
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ResiduumError(Exception):
    """Base of all errors that the command line prints as one sentence."""

    exit_code = 1


class UsageError(ResiduumError, ValueError):
    """A name, key, option or value that is not one we know."""

    exit_code = 2


class DataError(ResiduumError):
    """Pictures, labels or archives that cannot be read."""


class ModelFileError(ResiduumError):
    """A model file or checkpoint that is missing, damaged or not ours."""


class RunError(ResiduumError):
    """A run folder that cannot be written, continued or shared."""


class DivergedError(ResiduumError):
    """A loss that is no longer finite."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not known; it offers the nearest known one, or lists them all."""
    names = list(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(names) + "."
    return UsageError(f"unknown {kind} {given!r}; {hint}")
