"""What detection and segmentation share: the network they start from, and the training pictures' statistics."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from residuum.data.parts import Marked, Parts, held_out
from residuum.errors import DataError, UsageError
from residuum.models.bundle import load_bundle
from residuum.models.resnet import ResNet, assemble
from residuum.models.spec import specification
from residuum.runtime import seed_for

MOST = 256  # pictures that the statistics are taken from

P = TypeVar("P", bound=Marked)


class Start(NamedTuple):
    """The network to start from, mean and deviation of channels in units of [0, 1], and a digest of its weights ("": none)."""

    net: ResNet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    digest: str


def start(
    net: str,
    changes: Mapping[str, Any],
    start_from: Path | None,
    init: str,
    seed: int,
    bn: str,
    pictures: Iterator[Tensor],
) -> Start:
    """A classifier from its model file, with the preprocessing it knows; or a new network, and the statistics of pictures.

    Args:
        net, changes: the network and what is changed in its specification.
        start_from: a classifier's model file; None starts from random weights.
        bn: "live", or "fixed", which needs the statistics of a model file.
        pictures: training pictures, uint8 (H, W, 3); read only where there is no model file.

    Raises:
        UsageError: the file holds another network, or none is given where BN is fixed.
        ModelFileError: it cannot be read.
    """
    spec = specification(net, **{"channels": 3, "classes": 1} | dict(changes))
    if start_from is None:
        if bn == "fixed":
            raise UsageError(
                "bn=fixed keeps the statistics of a classifier, but there is none: give --start-from MODEL, or --set bn=live."
            )
        mean, std = statistics(pictures)
        return Start(assemble(spec, init=init, seed=seed_for(seed, "init")), mean, std, "")
    bundle = load_bundle(start_from)
    if replace(bundle.spec, classes=1) != replace(spec, classes=1):
        raise UsageError(
            f"{start_from} holds another network than {net}; name its own with --net, and with --set what it changes in it."
        )
    kept = bundle.preprocessing
    average = kept.mean if kept.mean.ndim == 1 else kept.mean.mean((0, 1))
    digest = hashlib.sha256()
    for tensor in bundle.net.state_dict().values():
        digest.update(tensor.contiguous().numpy().tobytes())
    return Start(bundle.net.train(), tuple(average.tolist()), tuple(kept.std.tolist()), digest.hexdigest()[:16])


def divided(data: Parts[P], held: int) -> tuple[tuple[P, ...], tuple[P, ...], dict[str, list[str]]]:
    """The pictures to train on and those judged meanwhile, and the names in splits that were drawn here.

    Raises DataError where there are none, UsageError where pictures are to be held out of data that have a part for it.
    """
    if not data.train:
        raise DataError(f"{data.name} has no train split; there is nothing to learn from.")
    drawn = {"held-out": [p.name for p in data.test]} if data.judged == "held-out" else {}
    if not held:
        return data.train, data.val, drawn
    if data.val:
        raise UsageError(f"{data.name} has a val split, which is judged while training; leave out held_out={held}.")
    train, kept = held_out(data.train, held)
    return train, kept, drawn | {"judged while training": [p.name for p in kept]}


def readable(
    pictures: Sequence[P], read: Callable[[P], Tensor], on_bad: str, skipped: dict[str, str]
) -> Iterator[Tensor]:
    """Some MOST pictures spread over all, as `read` gives them; one that cannot be read is noted, or stops the work."""
    for picture in pictures[:: max(1, len(pictures) // MOST)]:
        try:
            yield read(picture)
        except DataError as error:
            if on_bad == "stop":
                raise
            skipped[picture.name] = str(error)


def statistics(pictures: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over pictures of any sizes, uint8 (H, W, 3), in units of [0, 1]."""
    total, squares, n = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0
    for pixels in pictures:
        wide = pixels.reshape(-1, 3).to(torch.int64)
        total, squares, n = total + wide.sum(0), squares + wide.square().sum(0), n + len(wide)
    if not n:
        raise DataError("no training picture can be read.")
    mean = total.double() / n / 255
    std = (squares.double() / n / 255**2 - mean.square()).clamp_min(1e-12).sqrt()
    return tuple(round(v, 6) for v in mean.tolist()), tuple(max(round(v, 6), 1e-6) for v in std.tolist())
