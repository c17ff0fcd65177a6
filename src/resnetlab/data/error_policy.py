"""The one place that decides what an image or annotation that cannot be used does: stop the work, or be left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TypeVar

from resnetlab.errors import DataError, unknown_name_error

ON_BAD = ("stop", "skip")

Item = TypeVar("Item")
T = TypeVar("T")


@dataclass(eq=False)
class ErrorPolicy:
    """Stops at images or annotations that cannot be used, or skips and lists them.

    Attributes:
        on_bad: "stop" raises a DataError that names the image; "skip" leaves it out.
        option: the command's option that decides this.
        skipped: name -> reason, of what was skipped so far.
    """

    on_bad: str = "stop"
    option: str = "--on-bad-image"
    skipped: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.on_bad not in ON_BAD:
            raise unknown_name_error(self.option.strip("-").replace("-", "_"), self.on_bad, ON_BAD)

    def handle(self, unreadable: Mapping[str, str]) -> None:
        """Lists images (name -> reason) as skipped. Raises DataError for the first one under "stop"."""
        if unreadable and self.on_bad == "stop":
            reason = next(iter(unreadable.values())).rstrip(".")
            raise DataError(f"{reason}; fix or remove it, or go on without it: {self.option} skip.")
        self.skipped.update(unreadable)

    def reject(self, what: str, why: str) -> None:
        """Lists an annotation as skipped; `what` names the file and the place in it. Raises DataError under "stop"."""
        if self.on_bad == "stop":
            raise DataError(f"{what}: {why}; fix it, or go on without it: {self.option} skip.")
        self.skipped[what] = why

    def read_each(
        self, items: Iterable[Item], read: Callable[[Item], T], name_of: Callable[[Item], str] = attrgetter("name")
    ) -> Iterator[tuple[Item, T]]:
        """Yields each item with `read(item)`; handles the items for which it raises DataError."""
        for item in items:
            try:
                result = read(item)
            except DataError as error:
                self.handle({name_of(item): str(error)})
            else:
                yield item, result
