"""Pictures with boxes or masks in their splits, and what becomes of what cannot be right."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from residuum.data.stored import ON_BAD
from residuum.errors import DataError, unknown
from residuum.runtime import seed_for

HELD_OUT = 0.2  # of data without a part to judge by


class Marked(Protocol):
    """A picture with what is known of it."""

    @property
    def name(self) -> str:
        """Of its file below the data's folder."""

    def feed(self, digest: Any) -> None:
        """Feeds a hash with what is known."""


P = TypeVar("P", bound=Marked)


@dataclass(frozen=True)
class Parts(Generic[P]):
    """Marked pictures of the same classes.

    Attributes:
        judged: what `test` is called: "test", "val", or "held-out" where it was drawn from all pictures.
        val: judged while training; may be empty.
        skipped: name -> why, of what was left out.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[P, ...]
    val: tuple[P, ...]
    test: tuple[P, ...]
    judged: str
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of classes, names and what is known, the first 16 hex digits."""
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for split in (self.train, self.val, self.test):
            for picture in split:
                digest.update(picture.name.encode(errors="surrogateescape"))
                picture.feed(digest)
        return digest.hexdigest()[:16]

    @property
    def splits(self) -> dict[str, tuple[P, ...]]:
        """The splits by the names that people give."""
        return {k: v for k, v in {"train": self.train, "val": self.val, self.judged: self.test}.items() if v}


def arrange(name: str, classes: tuple[str, ...], parts: dict[str, list[P]], skipped: dict[str, str]) -> Parts[P]:
    """Splits called "train", "val", "test", or "" where all pictures stand together; a fifth of those is held out by name."""
    if "trainval" in parts and "test" in parts:  # 2015, appendix A: trained on both, judged by test
        return Parts(name, classes, tuple(parts["trainval"]), (), tuple(parts["test"]), "test", skipped)
    if "train" not in parts and (only := parts.get("", parts.get("trainval"))) is not None:
        rest, chosen = held_out(only, max(1, round(HELD_OUT * len(only))))
        return Parts(name, classes, rest, (), chosen, "held-out", skipped)
    judged = next((split for split in ("test", "val") if split in parts), None)
    if judged is None:
        return arrange(name, classes, {"": parts["train"]}, skipped)
    val = parts.get("val", []) if judged == "test" else []
    return Parts(name, classes, tuple(parts.get("train", [])), tuple(val), tuple(parts[judged]), judged, skipped)


def held_out(pictures: Sequence[P], count: int) -> tuple[tuple[P, ...], tuple[P, ...]]:
    """(rest, chosen): `count` chosen by a hash of their names, the same on every machine.

    Raises DataError where nothing would be left.
    """
    if not 0 < count < len(pictures):
        raise DataError(f"cannot hold out {count:,} of {len(pictures):,} pictures; hold out fewer, or give more.")
    chosen = set(sorted(range(len(pictures)), key=lambda i: seed_for(0, "held-out", pictures[i].name))[:count])
    return (
        tuple(p for i, p in enumerate(pictures) if i not in chosen),
        tuple(p for i, p in enumerate(pictures) if i in chosen),
    )


@dataclass
class Checker:
    """What becomes of a box, a mask or a picture that cannot be right: a stop, or a note and going on without it."""

    on_bad: str
    option: str = "--on-bad-box"
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_bad not in ON_BAD:
            raise unknown(self.option.strip("-").replace("-", "_"), self.on_bad, ON_BAD)

    def bad(self, what: str, why: str) -> None:
        """Raises DataError, or notes it; `what` names the file, and the place in it."""
        if self.on_bad == "stop":
            raise DataError(f"{what}: {why}; mend it, or go on without it: {self.option} skip.")
        self.skipped[what] = why
