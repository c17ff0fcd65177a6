"""Test protocols as values: which views of an image a network gets, and how its scores for them are averaged.

    1crop            the centre, S pixels on a side, of the image with its shorter side at R
    10crop           the four corners and the centre of the WHOLE resized image, and their mirror images
    dense:320        the centre 320x320 of the image with its shorter side at 320, fully convolutional (2016 §5)
    multiscale:224,256,384,480,640
                     the whole image at each shorter side, fully convolutional, and its mirror image (2015 §4.1)
    flip             1crop and its mirror image

S and R are the model's own (its preprocessing); `1crop:256` and `10crop:256` give another R. Options follow with "+":
`+flip`, `+noflip`, `+logits` (logits are averaged over views, not softmax scores), `+window` (fully convolutional: softmax at
every position of a score map whose every position saw S pixels, averaged; without it the logits are averaged over the last
map's positions, which is a global average pool). What the papers leave open, and our defaults: docs/differences.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnetlab.errors import UsageError, unknown_name_error
from resnetlab.preprocessing import (
    MAX_INPUT_SIDE,
    Preprocessing,
    center_offset,
    round_to_bytes,
)

KINDS = ("1crop", "10crop", "dense", "multiscale")
OPTIONS = ("flip", "noflip", "logits", "window")
EXAMPLES = ("1crop", "10crop", "dense:320", "multiscale:224,256,384,480,640", "flip")


class Window(NamedTuple):
    """A part of an image, in pixels; `mirrored` flips it left to right."""

    top: int
    left: int
    height: int
    width: int
    mirrored: bool


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Which views of an image a network gets.

    Attributes:
        kind: of KINDS.
        sides: shorter sides in pixels; empty for the model's own R (crops only).
        flip: whether every view is also mirrored.
        average: over views, of "scores" (softmax) or "logits".
        positions: of fully convolutional views: "map" (logits averaged over the last map) or "window" (scores of every window).
    """

    kind: str = "1crop"
    sides: tuple[int, ...] = ()
    flip: bool = False
    average: str = "scores"
    positions: str = "map"

    @property
    def dense(self) -> bool:
        """Whether the network is applied fully convolutionally."""
        return self.kind in ("dense", "multiscale")

    def count_views(self, size: int) -> float:
        """How many square images of `size` pixels a square image's views are together."""
        whole = sum((side / size) ** 2 for side in self.sides or (size,))
        crops = len(self.sides or (size,)) * (5 if self.kind == "10crop" else 1)
        return (whole if self.dense else crops) * (1 + self.flip)

    def __str__(self) -> str:
        """The shortest text that `parse_protocol` reads as this value."""
        text = self.kind + (":" + ",".join(map(str, self.sides)) if self.sides else "")
        if self.flip != _default_flip(self.kind):
            text += "+flip" if self.flip else "+noflip"
        return text + "+logits" * (self.average == "logits") + "+window" * (self.positions == "window")

    def to_json(self, preprocessing: Preprocessing) -> dict[str, Any]:
        """Every option, as applied to a model; keys as in docs/json.md."""
        return {
            "kind": self.kind,
            "sides": list(self.sides_for(preprocessing)),
            "crop": list(preprocessing.size) if not self.dense else None,
            "flip": self.flip,
            "average": self.average,
            "positions": self.positions if self.dense else None,
        }

    def sides_for(self, preprocessing: Preprocessing) -> tuple[int, ...]:
        """The shorter sides that a model's images are resized to.

        Raises UsageError where one is smaller than the crop, or than the input that the network was trained on.
        """
        sides, smallest = self.sides or (preprocessing.resize,), max(preprocessing.size)
        if min(sides) < smallest:
            raise UsageError(
                f"protocol {self}: the model sees {smallest} pixels on a side, but an image with its shorter side at "
                f"{min(sides)} has fewer; take {smallest} or more."
            )
        return sides


def _default_flip(kind: str) -> bool:
    return kind in ("10crop", "multiscale")


def parse_protocol(text: str) -> Protocol:
    """Reads a protocol.

    >>> parse_protocol("multiscale:224,256+noflip").sides
    (224, 256)

    Raises UsageError for an unknown protocol or option, and for options that exclude each other.
    """
    text = str(text)
    head, *options = text.split("+")
    if head == "flip":
        head, options = "1crop", ["flip", *options]
    kind, colon, sizes = head.partition(":")
    if kind not in KINDS:
        raise unknown_name_error("protocol", text, EXAMPLES)
    try:
        sides = tuple(int(part) for part in sizes.split(",")) if colon else ()
    except ValueError:
        raise UsageError(f"protocol {text!r}: sizes are whole numbers of pixels, such as {EXAMPLES[3]}.") from None
    for option in options:
        if option not in OPTIONS:
            raise unknown_name_error("option of a protocol", option, OPTIONS)
    protocol = Protocol(
        kind=kind,
        sides=sides,
        flip="noflip" not in options and ("flip" in options or _default_flip(kind)),
        average="logits" if "logits" in options else "scores",
        positions="window" if "window" in options else "map",
    )
    _check_consistency(protocol, text, set(options))
    return protocol


def _check_consistency(protocol: Protocol, text: str, options: set[str]) -> None:
    """Raises UsageError where the parts of a protocol exclude each other."""
    if protocol.dense and not protocol.sides:
        raise UsageError(f"protocol {text!r} needs shorter sides in pixels, such as dense:320 or {EXAMPLES[3]}.")
    if protocol.kind != "multiscale" and len(protocol.sides) > 1:
        raise UsageError(f"protocol {text!r}: only multiscale takes several sizes.")
    if (protocol.sides and min(protocol.sides) < 1) or len(set(protocol.sides)) < len(protocol.sides):
        raise UsageError(f"protocol {text!r}: sizes must be different numbers from 1 up.")
    if protocol.sides and max(protocol.sides) > MAX_INPUT_SIDE:
        raise UsageError(f"protocol {text!r}: sizes go up to {MAX_INPUT_SIDE:,} pixels.")
    if "window" in options and not protocol.dense:
        raise UsageError(f"protocol {text!r}: window is for dense and multiscale only.")
    if {"flip", "noflip"} <= options or (protocol.kind == "10crop" and "noflip" in options):
        raise UsageError(f"protocol {text!r} cannot be both mirrored and not; leave one of them out.")


ONE_CROP = Protocol()


def generate_windows(protocol: Protocol, height: int, width: int, size: tuple[int, int]) -> Iterator[Window]:
    """The windows of a resized image, mirrored ones last, in the order of torchvision's TenCrop.

    A mirrored window is the same part of the mirrored image: a centre that is half a pixel off is off to the other side.

    Args:
        height, width: of the resized image, in pixels.
        size: (h, w) of the network's input.
    """
    if protocol.kind == "multiscale":
        h, w = height, width
    else:
        h, w = (min(height, width),) * 2 if protocol.kind == "dense" else size
    corners = [(center_offset(height, h), center_offset(width, w))]
    if protocol.kind == "10crop":
        bottom, right = height - h, width - w
        corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), *corners]
    for mirrored in (False, True) if protocol.flip else (False,):
        for top, left in corners:
            yield Window(top, width - w - left if mirrored else left, h, w, mirrored)


def generate_views(
    images: list[Tensor], protocol: Protocol, preprocessing: Preprocessing
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Every view of every image, in groups of one size that fit one batch.

    Args:
        images: uint8 (H, W, C), each of its own size.

    Yields:
        Positions of the images, int64 (B,); their views, uint8 (B, h, w, C), not mirrored yet; whether they are to be.
        Every image has equally many views.
    """
    for side in protocol.sides_for(preprocessing):
        stacks = list(_stack_by_size([resize_shorter_side(image, side, preprocessing) for image in images]))
        windows = [
            generate_windows(protocol, stack.shape[1], stack.shape[2], preprocessing.size) for _, stack in stacks
        ]
        for row in zip(*windows, strict=True):
            groups: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for (positions, stack), (top, left, h, w, _) in zip(stacks, row, strict=True):
                groups.setdefault((h, w), []).append((positions, stack[:, top : top + h, left : left + w]))
            for group in groups.values():
                positions = torch.cat([each for each, _ in group])
                crops = [crop for _, crop in group]
                yield positions, torch.cat(crops) if len(crops) > 1 else crops[0], row[0].mirrored


def resize_shorter_side(image: Tensor, side: int, preprocessing: Preprocessing) -> Tensor:
    """(H, W, C) with its shorter side resized to `side` pixels, in the channels of the preprocessing; uint8 or float32."""
    if min(image.shape[:2]) == side and image.shape[2] == preprocessing.channels:
        return image
    if image.is_floating_point():
        return preprocessing.resize_pixels(image, side)
    if image.device.type != "cpu":
        return round_to_bytes(preprocessing.resize_pixels(image.float(), side))
    return preprocessing.resize_bytes(image, side)


def _stack_by_size(images: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Images of one size stacked, with their positions."""
    groups: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.shape, []).append(i)
    for where in groups.values():
        yield torch.tensor(where), torch.stack([images[i] for i in where])
