"""One network on one split: every picture once, in order, in whole batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from residuum.data import sources
from residuum.data.dataset import Split
from residuum.errors import DataError, UsageError
from residuum.evaluation.metrics import Judgement
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.resnet import ResNet
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine, evaluating, pick_engine, to_device

SPLITS = ("test", "train")


def judge(
    net: ResNet,
    split: Split,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    engine: Engine,
    *,
    temperature: float = 1.0,
    batch: int = 256,
    progress: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """Shows every picture of a split to the network once.

    Args:
        split: pictures already at `preprocessing.size`, uint8 (N, h, w, C).
        progress: called with the number of pictures done so far.
    """
    scores, loss = [], 0.0
    with evaluating(net):
        for pixels, labels in zip(torch.split(split.images, batch), torch.split(split.labels, batch), strict=True):
            x = preprocessing.normalise(to_device(pixels, engine))  # (B, C, h, w)
            with engine.autocast():
                logits = net(x)
            logits = logits.float().cpu() / temperature  # (B, classes)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            scores.append(logits.softmax(1))
            progress(sum(map(len, scores)))
    return Judgement(classes, torch.cat(scores), split.labels, loss / len(split))


def prepared(split: Split, preprocessing: Preprocessing) -> Split:
    """The split with its pictures resized and cropped as the network wants them; uint8 (N, h, w, C)."""
    from PIL import Image

    if tuple(split.images.shape[1:]) == (*preprocessing.size, preprocessing.channels):
        return split
    pictures = (
        Image.fromarray(image.squeeze(-1).numpy() if image.shape[-1] == 1 else image.numpy()) for image in split.images
    )
    return Split(torch.stack([preprocessing(picture) for picture in pictures]), split.labels)


def evaluate(
    model: Bundle | str | Path,
    data: str,
    *,
    split: str = "test",
    data_dir: str | Path = "data",
    precision: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judgement:
    """Judges a model on a data set; `.to_json()` of the result gives its figures.

    Args:
        model: what `residuum.load` returned, or the path of a model file.
        data: a data set's name ("digits", "cifar10").
        split: "test" or "train".
        data_dir: where archives lie.
        progress: called with pictures done and pictures in all.

    Raises:
        DataError: the model and the data name different classes, or the archive is missing or damaged.
        ModelFileError: the model file is missing or damaged.
        UsageError: an unknown data set or split.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}; known: {', '.join(SPLITS)}.")
    bundle = model if isinstance(model, Bundle) else load_bundle(Path(model))
    source = sources.load(data, Path(data_dir))
    chosen: Split = getattr(source, split)
    chosen = Split(chosen.images, _by_name(chosen.labels, source.classes, bundle.classes))
    engine = pick_engine(precision, device)
    net: Any = engine.place(bundle.net)
    return judge(
        net,
        prepared(chosen, bundle.preprocessing),
        bundle.preprocessing,
        bundle.classes,
        engine,
        temperature=bundle.temperature,
        progress=lambda done: progress(done, len(chosen)),
    )


def _by_name(labels: torch.Tensor, data: tuple[str, ...], model: tuple[str, ...]) -> torch.Tensor:
    """Labels as positions in the model's classes, matched by name; raises DataError where the names differ."""
    if set(data) != set(model):
        only_data, only_model = sorted(set(data) - set(model)), sorted(set(model) - set(data))
        raise DataError(
            f"the data and the model name different classes: only in the data {_some(only_data)}, only in the model "
            f"{_some(only_model)}; evaluate on data with the model's classes."
        )
    return torch.tensor([model.index(name) for name in data])[labels]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
