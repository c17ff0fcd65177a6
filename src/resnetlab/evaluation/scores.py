"""The scores of networks for the images of a split: each image is read once and gives a protocol's views.

    split --read, a few at a time-->  images uint8 (H, W, C), each of its own size
          --views, per model------->  uint8 (B, h, w, C)
          --normalise, net--------->  softmax scores (B, classes), averaged over views

Memory is bounded by a batch and the scores. Processes share whole batches, so that every batch, and with it every rounding,
is the same for any number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from resnetlab.data.dataset import MemorySplit, Split
from resnetlab.data.device_decode import decode_images, decodes_on_device
from resnetlab.data.prefetch import default_workers, read_in_threads
from resnetlab.device import DeviceConfig, eval_mode, to_device
from resnetlab.errors import DataError, DivergedError
from resnetlab.evaluation.protocols import ONE_CROP, Protocol, generate_views, resize_shorter_side
from resnetlab.models.fold import fold_batchnorm
from resnetlab.models.model_file import compute_scores
from resnetlab.models.own_network import Network, OwnNetwork
from resnetlab.out_of_memory import compute_in_parts
from resnetlab.preprocessing import Preprocessing

SKIPPED = -1.0  # in place of the scores of an image that cannot be read
MAX_PIXELS = {"cpu": 2**20, "cuda": 2**24}  # of one forward pass
BATCH = 256  # images, at most
MAX_SCORES = 2**25  # of a model that every process keeps, 128 MB; of more it keeps what figures need
READ_BYTES = 2**26  # of decoded images in memory before they are resized


@dataclass(frozen=True, eq=False)
class Member:
    """A network that is evaluated.

    Attributes:
        net: folded and on the device.
        columns: for every class, the position of its logit in the network's own order.
        temperature: logits are divided by it.
        multi_label: scores are sigmoids, in place of a softmax.
    """

    net: Network
    preprocessing: Preprocessing
    columns: Tensor
    temperature: float = 1.0
    multi_label: bool = False

    @staticmethod
    def from_network(
        net: Network,
        preprocessing: Preprocessing,
        device_config: DeviceConfig,
        *,
        columns: Tensor | None = None,
        temperature: float = 1.0,
        multi_label: bool = False,
    ) -> Member:
        """A member with a folded copy of `net`, which stays as it is."""
        columns = torch.arange(net.spec.classes) if columns is None else columns
        copy = fold_batchnorm(net)
        device_config.place(copy)
        return Member(copy, preprocessing, columns, temperature, multi_label)


@dataclass(frozen=True, eq=False)
class ScoreSummary:
    """What the figures of images with one class each need of the scores: `summarise_scores` of each member's.

    Attributes:
        labels: of all images, int64 (N,).
        weights: of the members of an ensemble, whose mean scores are summarised last; () for none.
        temperature: the logits of scores at temperature 1 are divided by it, unless it is None.
    """

    labels: Tensor
    weights: tuple[float, ...] = ()
    temperature: float | None = None

    @staticmethod
    def if_many(
        labels: Tensor, classes: int, weights: tuple[float, ...] = (), temperature: float | None = None
    ) -> ScoreSummary | None:
        """The summary of scores of more than MAX_SCORES images and classes; None for fewer."""
        return ScoreSummary(labels, weights, temperature) if len(labels) * classes > MAX_SCORES else None

    def __call__(self, scores: list[Tensor], positions: list[int]) -> list[Tensor]:
        if self.temperature is not None:
            scores = [rescale_scores(each, self.temperature) for each in scores]
        if len(self.weights) > 1:
            scores = [*scores, average_scores(scores, self.weights)]
        return [summarise_scores(each, self.labels[positions]) for each in scores]


def summarise_scores(scores: Tensor, labels: Tensor) -> Tensor:
    """The score of each image's class, its place, the best score and its class; (B, 4) of the scores' type.

    Of equal scores the class that comes first is higher.
    """
    rows, best = torch.arange(len(labels)), scores.argmax(1)
    columns = scores[rows, labels], rank_classes(scores, labels), scores[rows, best], best
    return torch.stack([column.to(scores.dtype) for column in columns], 1)


def average_scores(scores: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The scores of an ensemble whose weights add up to 1."""
    return torch.stack([weight * each for weight, each in zip(weights, scores, strict=True)]).sum(0)


def rescale_scores(scores: Tensor, temperature: float) -> Tensor:
    """Softmax scores of temperature 1 with logits divided by `temperature`, float32."""
    return (take_logarithms(scores) / temperature).softmax(1).float()


def take_logarithms(scores: Tensor) -> Tensor:
    """The logarithms of scores in float64; a score of 0 counts as the smallest float32."""
    return scores.double().clamp_min(torch.finfo(torch.float32).tiny).log()


def rank_classes(scores: Tensor, labels: Tensor) -> Tensor:
    """The place of each image's class among its scores, from 1; of equal ones the class that comes first is higher.

    Args:
        scores: (B, classes).
        labels: int64 (B,).
    """
    true_scores = scores[torch.arange(len(labels)), labels][:, None]
    before = torch.arange(scores.shape[1]) < labels[:, None]
    return 1 + ((scores > true_scores) | ((scores == true_scores) & before)).sum(1)


def drop_skipped(
    split: Split, labels: Tensor, scores: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, str]]:
    """Labels and scores of the readable images, for each model; and the names of the others with the reasons.

    Raises DataError where none could, DivergedError where scores are not finite.
    """
    if not all(bool(each.isfinite().all()) for each in scores):
        raise DivergedError(
            "the network's scores are not finite: its training went wrong; try a tenth of the learning rate."
        )
    readable = (scores[0] != SKIPPED).all(1)
    if bool(readable.all()):
        return [(labels, each) for each in scores], {}
    if not bool(readable.any()):
        raise DataError("no image can be read; fix them: resnetlab data check.")
    names = [split.name_of(i) for i in torch.nonzero(~readable).flatten().tolist()]
    skipped = {name: split.errors.skipped.get(name, "could not be read") for name in names}
    return [(labels[readable], each[readable]) for each in scores], skipped


@torch.inference_mode()
def predict_scores(
    members: Sequence[Member],
    split: Split,
    device_config: DeviceConfig,
    protocol: Protocol = ONE_CROP,
    on_progress: Callable[[int], None] = lambda done: None,
    summary: ScoreSummary | None = None,
) -> list[Tensor]:
    """Softmax scores of every member for every image, each float32 (N, classes), in every process of `device_config.world`.

    The scores of an image that cannot be read, where the split skips such images, are SKIPPED.

    Args:
        summary: its rows, float32 (N, 4) of each member and then of the ensemble, are returned in place of the scores.
        on_progress: called with the number of images that all processes have done, as far as this one knows.

    Raises:
        DataError: an image cannot be read and the split does not skip such images.
        UsageError: the protocol's crop is larger than the image.
    """
    world, n = device_config.world, len(split)
    widths = [len(member.columns) for member in members]
    if summary:
        widths = [4] * (len(members) + (len(summary.weights) > 1))
    scores = [torch.zeros(n, width) for width in widths]
    counts = torch.zeros(n, dtype=torch.int32)
    batches = torch.split(torch.arange(n), _batch_size(members, device_config))
    own = batches[world.rank :: world.size]

    workers = 0 if isinstance(split, MemorySplit) else split.workers or default_workers(device_config)
    resize = _preprocess_ahead(members, protocol, device_config)
    on_device = decodes_on_device(split, device_config.device)

    def read_one(i: int) -> Tensor:
        return split.read_encoded(i) if on_device else resize(split.read_image(i))  # type: ignore[attr-defined]

    def read() -> Iterator[tuple[Tensor, list[int], list[Tensor]]]:  # in this thread, beside those that compute
        order = (i for indices in own for i in indices.tolist())
        read_image = stack.enter_context(read_in_threads(read_one, order, workers))
        for indices in own:
            for rows in scores:
                rows[indices] = SKIPPED  # until they are read
            for positions, images in _read_batches(split, indices.tolist(), read_image):
                yield indices, positions, images
            counts[indices] += 1

    def score(batch: tuple[Tensor, list[int], list[Tensor]]) -> tuple[int, list[int], list[Tensor]]:
        indices, positions, images = batch
        if on_device:
            read, images = decode_images(split, images, positions, device_config.device)
            positions, images = [positions[k] for k in read], [resize(image) for image in images]
        if not images:
            return int(indices[-1]) + 1, [], []
        found = [score_images(member, images, protocol, device_config).float() for member in members]
        return int(indices[-1]) + 1, positions, summary(found, positions) if summary else found

    # a network of the user's own may keep something of each call, so its batches go one after the other
    batches_at_once = 1 if any(isinstance(member.net, OwnNetwork) for member in members) else len(own)
    with contextlib.ExitStack() as stack, device_config.side_by_side_map(batches_at_once) as side_by_side:
        for done, positions, found in side_by_side(score, read()):
            for rows, values in zip(scores, found, strict=bool(positions)):
                rows[positions] = values
            on_progress(done)
    for rows in scores:
        world.all_reduce_(rows)  # every row was filled by one process and is zero in the others, so the sum is exact
    world.all_reduce_(counts)
    split.errors.skipped.update(world.merge_dicts(split.errors.skipped))
    if not bool((counts == 1).all()):
        raise RuntimeError("an image was not evaluated exactly once")  # a bug, never a fault of the data
    return scores


def _batch_size(members: Sequence[Member], device_config: DeviceConfig) -> int:
    """Images that are evaluated together; the same for any number of processes."""
    h, w = max(member.preprocessing.size for member in members)
    return max(1, min(BATCH, _max_pixels(device_config) // (h * w)))


def _max_pixels(device_config: DeviceConfig) -> int:
    return MAX_PIXELS.get(device_config.device.type, MAX_PIXELS["cuda"])


def _preprocess_ahead(
    members: Sequence[Member], protocol: Protocol, device_config: DeviceConfig
) -> Callable[[Tensor], Tensor]:
    """The resize that all members' views begin with, on a GPU, which would wait for one thread's; else nothing."""
    resizes = {
        (side, member.preprocessing.channels, member.preprocessing.interpolation)
        for member in members
        for side in protocol.sides_for(member.preprocessing)
    }
    if device_config.device.type == "cpu" or len(resizes) > 1:
        return lambda image: image
    ((side, *_),) = resizes
    return lambda image: resize_shorter_side(image, side, members[0].preprocessing)


def _read_batches(
    split: Split, indices: list[int], read_image: Callable[[int], Tensor]
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """The readable images at `indices` with their positions, all together or in groups of READ_BYTES."""
    start, size = 0, 8
    positions: list[int] = []
    images: list[Tensor] = []
    while start < len(indices):
        group = indices[start : start + size]
        new = dict(split.errors.read_each(group, read_image, split.name_of))
        positions, images, start = positions + list(new), images + list(new.values()), start + len(group)
        size = max(1, min(BATCH, READ_BYTES // max((image.nbytes for image in new.values()), default=1)))
        if images and (start == len(indices) or sum(image.nbytes for image in images) >= READ_BYTES):
            yield positions, images
            positions, images = [], []


def score_images(member: Member, images: list[Tensor], protocol: Protocol, device_config: DeviceConfig) -> Tensor:
    """The member's softmax scores, float64 (B, classes), for images uint8 (H, W, C): the mean over the protocol's views."""
    total = torch.zeros(len(images), len(member.columns), dtype=torch.float64)
    n_views = torch.zeros(len(images), dtype=torch.float64)
    by_scores = protocol.average == "scores"
    with eval_mode(member.net):
        for positions, pixels, mirrored in generate_views(images, protocol, member.preprocessing):
            batch = max(1, _max_pixels(device_config) // (pixels.shape[1] * pixels.shape[2]))
            compute = partial(_compute_logits, member, protocol, device_config, mirrored)
            for rows, views in zip(torch.split(positions, batch), torch.split(pixels, batch), strict=True):
                logits = compute_in_parts(compute, views, device_config.device)  # (B, classes, positions)
                values = compute_scores(logits, member.multi_label) if by_scores else logits
                total.index_add_(0, rows, values.mean(2))
                n_views.index_add_(0, rows, torch.ones(len(rows), dtype=torch.float64))
    mean = total / n_views[:, None]
    return mean if by_scores else compute_scores(mean, member.multi_label)


def _compute_logits(
    member: Member, protocol: Protocol, device_config: DeviceConfig, mirrored: bool, pixels: Tensor
) -> Tensor:
    """Logits of one view, divided by the temperature, in the order of the classes; float64 (B, classes, positions)."""
    x = member.preprocessing.normalise(to_device(pixels, device_config.device))  # (B, C, h, w)
    if mirrored:
        x = x.flip(3)  # after the mean is subtracted, so a per-pixel mean is mirrored too, as in training
    logits: Tensor
    with device_config.autocast():
        if not protocol.dense:
            logits = member.net(x)[:, :, None]
        elif protocol.positions == "map":
            logits = member.net.forward_class_maps(x).float().mean((2, 3))[:, :, None]
        else:
            logits = member.net.forward_class_maps(x, _training_map_size(member)).flatten(2)
    logits = logits.cpu().double()[:, member.columns]  # MPS has no float64
    return logits / member.temperature


def _training_map_size(member: Member) -> tuple[int, int]:
    """The height and width of the last map for an input of the training size."""
    device = next(member.net.parameters()).device
    with torch.autocast(device.type, enabled=False):
        last = member.net.forward_features(
            torch.zeros(1, member.preprocessing.channels, *member.preprocessing.size, device=device)
        )
    return last.shape[2], last.shape[3]
