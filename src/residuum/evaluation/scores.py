"""What networks say of the pictures of a split: each picture read once, shown as a protocol says, whatever shares the work.

    split --read, a few at a time-->  pictures uint8 (H, W, C), each of its own size
          --views, per model------->  uint8 (B, h, w, C)
          --normalise, net--------->  softmax scores (B, classes), averaged over views

Memory is bounded by a batch and by the scores that are kept. Processes share whole batches, so that every batch, and with it
every rounding, is the same under any number of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from residuum.data.dataset import Pictures
from residuum.data.stored import Stored
from residuum.errors import DataError
from residuum.evaluation.views import ONE_CROP, Protocol, views
from residuum.models.fold import folded
from residuum.models.resnet import ResNet
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine, evaluating, to_device
from residuum.world import World

SKIPPED = -1.0  # in place of the scores of a picture that cannot be read
PIXELS = {"cpu": 2**20, "cuda": 2**24}  # shown to a network at once
BATCH = 256  # pictures, at most
READ_BYTES = 2**26  # of decoded pictures that are held before they are resized


@dataclass(frozen=True, eq=False)
class Member:
    """A network that is asked.

    Attributes:
        net: folded and placed on the engine's device.
        columns: for every class, where its logit stands in the network's own order.
        temperature: logits are divided by it.
    """

    net: ResNet
    preprocessing: Preprocessing
    columns: Tensor
    temperature: float = 1.0

    @staticmethod
    def of(
        net: ResNet,
        preprocessing: Preprocessing,
        engine: Engine,
        *,
        columns: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Member:
        """A member that leaves `net` as it is and answers faster."""
        everything = torch.arange(net.spec.classes) if columns is None else columns
        twin = folded(net)
        engine.place(twin)
        return Member(twin, preprocessing, everything, temperature)


@torch.inference_mode()
def scores(
    members: Sequence[Member],
    split: Pictures,
    engine: Engine,
    *,
    protocol: Protocol = ONE_CROP,
    world: World | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Tensor]:
    """Softmax scores of every member for every picture, each float32 (N, classes), in every process.

    A picture that cannot be read, where the split says to skip such, has SKIPPED for scores.

    Args:
        progress: called with the number of pictures done so far, by all processes together as far as this one can tell.

    Raises:
        DataError: a picture cannot be read and is not to be skipped.
        UsageError: the protocol's crop is larger than the picture.
    """
    world = world or World()
    n = len(split)
    kept = [torch.zeros(n, len(member.columns)) for member in members]
    counted = torch.zeros(n, dtype=torch.int32)
    done = 0
    batches = torch.split(torch.arange(n), _batch(members, engine))
    for turn, indices in enumerate(batches):
        done += len(indices)
        if turn % world.size != world.rank:
            continue
        for rows in kept:
            rows[indices] = SKIPPED  # until they are read
        for where, pictures in _read(split, indices.tolist()):
            for rows, member in zip(kept, members, strict=True):
                rows[where] = answer(member, pictures, protocol, engine).float()
        counted[indices] += 1
        progress(done)
    for rows in kept:
        world.sum_(rows)  # every row was filled by one process and is zero in the others, so the sum is exact
    world.sum_(counted)
    if isinstance(split, Stored):
        split.skipped.update(world.union(split.skipped))
    if not bool((counted == 1).all()):
        raise RuntimeError("a picture was not judged exactly once")  # a mistake of ours, never of the data
    return kept


def _batch(members: Sequence[Member], engine: Engine) -> int:
    """Pictures that are judged together; it does not depend on how many processes there are."""
    h, w = max(member.preprocessing.size for member in members)
    return max(1, min(BATCH, _pixels(engine) // (h * w)))


def _pixels(engine: Engine) -> int:
    return PIXELS.get(engine.device.type, PIXELS["cuda"])


def _read(split: Pictures, indices: list[int]) -> Iterator[tuple[list[int], list[Tensor]]]:
    """The readable pictures at `indices`, with their positions, all together or in parts of READ_BYTES."""
    start, size = 0, 8
    where: list[int] = []
    held: list[Tensor] = []
    while start < len(indices):
        part = indices[start : start + size]
        good, pictures = _decoded(split, part)
        where, held, start = where + good, held + pictures, start + len(part)
        size = max(1, min(BATCH, READ_BYTES // max((picture.nbytes for picture in pictures), default=1)))
        if held and (start == len(indices) or sum(picture.nbytes for picture in held) >= READ_BYTES):
            yield where, held
            where, held = [], []


def _decoded(split: Pictures, indices: list[int]) -> tuple[list[int], list[Tensor]]:
    """The pictures at `indices` that can be read; raises DataError for another, unless the split says to skip and note it."""
    if not isinstance(split, Stored):
        return indices, split.pictures(indices)
    good, pictures = [], []
    for i in indices:
        try:
            pictures += split.pictures([i])
            good.append(i)
        except DataError as error:
            if split.reading.on_bad == "stop":
                raise DataError(
                    f"{str(error).rstrip('.')}; mend or remove it, or go on without it: --on-bad-image skip."
                ) from error
            split.skipped[split.name(i)] = str(error)
    return good, pictures


def answer(member: Member, pictures: list[Tensor], protocol: Protocol, engine: Engine) -> Tensor:
    """The member's softmax scores, float64 (B, classes), of pictures uint8 (H, W, C): the mean over the protocol's views."""
    total = torch.zeros(len(pictures), len(member.columns), dtype=torch.float64)
    n_views = torch.zeros(len(pictures), dtype=torch.float64)
    by_scores = protocol.average == "scores"
    with evaluating(member.net):
        for where, pixels, mirrored in views(pictures, protocol, member.preprocessing):
            at_once = max(1, _pixels(engine) // (pixels.shape[1] * pixels.shape[2]))
            for rows, part in zip(torch.split(where, at_once), torch.split(pixels, at_once), strict=True):
                logits = _logits(member, part, mirrored, protocol, engine)  # (B, classes, positions)
                said = logits.softmax(1) if by_scores else logits
                total.index_add_(0, rows, said.mean(2))
                n_views.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
    mean = total / n_views[:, None]
    return mean if by_scores else mean.softmax(1)


def _logits(member: Member, pixels: Tensor, mirrored: bool, protocol: Protocol, engine: Engine) -> Tensor:
    """Logits of one view, divided by the temperature, in the order of the classes; float64 (B, classes, positions)."""
    x = member.preprocessing.normalise(to_device(pixels, engine))  # (B, C, h, w)
    if mirrored:
        x = x.flip(3)  # after the mean, which a per-pixel mean is mirrored with, as in training
    logits: Tensor
    with engine.autocast():
        if not protocol.dense:
            logits = member.net(x)[:, :, None]
        elif protocol.positions == "map":
            logits = member.net.class_maps(x).float().mean((2, 3))[:, :, None]
        else:
            logits = member.net.class_maps(x, _trained_map(member)).flatten(2)
    logits = logits.double().cpu()[:, member.columns]
    return logits / member.temperature


def _trained_map(member: Member) -> tuple[int, int]:
    """The size of the last map for an input of the training size."""
    device = member.net.fc.weight.device
    with torch.autocast(device.type, enabled=False):
        last = member.net.last_map(
            torch.zeros(1, member.preprocessing.channels, *member.preprocessing.size, device=device)
        )
    return last.shape[2], last.shape[3]
