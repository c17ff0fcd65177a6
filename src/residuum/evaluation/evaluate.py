"""One network on one split: every picture once, in order, in whole batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from residuum.data import sources
from residuum.data.dataset import Dataset, Pictures, Split
from residuum.data.reading import Views
from residuum.data.stored import Reading, Stored
from residuum.errors import DataError, UsageError
from residuum.evaluation.metrics import Judgement
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.resnet import ResNet
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine, evaluating, pick_engine, to_device


def judge(
    net: ResNet,
    split: Pictures,
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
        split: pictures of any size; those on disk are decoded batch by batch.
        progress: called with the number of pictures done so far.
    """
    scores, truth, loss = [], [], 0.0
    with evaluating(net):
        for pixels, labels in Views(split, preprocessing).batches(batch):
            x = preprocessing.normalise(to_device(pixels, engine))  # (B, C, h, w)
            with engine.autocast():
                logits = net(x)
            logits = logits.float().cpu() / temperature  # (B, classes)
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            scores.append(logits.softmax(1))
            truth.append(labels)
            progress(sum(map(len, scores)))
    if not truth:
        raise DataError("there is no readable picture to judge by; mend them: residuum data check.")
    known = torch.cat(truth)
    return Judgement(classes, torch.cat(scores), known, loss / len(known))


def prepared(split: Pictures, preprocessing: Preprocessing) -> Pictures:
    """A split in memory with its pictures resized and cropped as the network wants them; one on disk as it is."""
    if not isinstance(split, Split) or tuple(split.images.shape[1:]) == (*preprocessing.size, preprocessing.channels):
        return split
    pixels = [pixels for pixels, _ in Views(split, preprocessing).batches(256)]
    return replace(split, images=torch.cat(pixels)) if pixels else split


def evaluate(
    model: Bundle | str | Path,
    data: str,
    *,
    split: str = "test",
    data_dir: str | Path = "data",
    on_bad_image: str = "stop",
    precision: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Judgement:
    """Judges a model on a data set; `.to_json()` of the result gives its figures.

    Args:
        model: what `residuum.load` returned, or the path of a model file.
        data: a data set's name ("digits", "cifar10") or a folder of class folders.
        split: "train" or "test", which is the split the data are judged by, whatever they call it (`Judgement.split` says).
        data_dir: where archives lie.
        on_bad_image: "stop" at a picture that cannot be read, or "skip" it (`Judgement.skipped` lists it).
        progress: called with pictures done and pictures in all.

    Raises:
        DataError: the model and the data name different classes, or the archive is missing or damaged.
        ModelFileError: the model file is missing or damaged.
        UsageError: an unknown data set or split.
    """
    bundle = model if isinstance(model, Bundle) else load_bundle(Path(model))
    source = sources.load(data, Path(data_dir), Reading(on_bad_image))
    name, chosen = pick_split(source, split, bundle)
    chosen = chosen.labelled(_by_name(chosen.labels, source.classes, bundle.classes))
    engine = pick_engine(precision, device)
    net: Any = engine.place(bundle.net)
    judgement = judge(
        net,
        prepared(chosen, bundle.preprocessing),
        bundle.preprocessing,
        bundle.classes,
        engine,
        temperature=bundle.temperature,
        progress=lambda done: progress(done, len(chosen)),
    )
    skipped = dict(chosen.skipped) if isinstance(chosen, Stored) else {}
    return replace(judgement, split=name, skipped=skipped)


def pick_split(source: Dataset, split: str, bundle: Bundle) -> tuple[str, Pictures]:
    """The split of a name, and what it is called where it comes from; "test" is the one that the data are judged by.

    Of a folder without val/ and test/ that is the part held out, or every picture where the model learnt on other data.
    """
    splits = source.splits
    if split == "test" and split not in splits:
        foreign = "all" in splits and bundle.data.get("fingerprint") != source.fingerprint
        split = "all" if foreign else source.judged
    if split not in splits:
        known = dict.fromkeys(["test", *splits])
        raise UsageError(f"unknown split {split!r}; known: {', '.join(known)}.")
    return split, splits[split]


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
