"""One model or several on one split: every picture once, by one protocol."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residuum.data import sources
from residuum.data.dataset import Pictures, Split
from residuum.data.reading import Views
from residuum.data.stored import Reading, Stored
from residuum.errors import DataError, DivergedError, UsageError
from residuum.evaluation.calibration import fit_temperature, provenance
from residuum.evaluation.choosing import pick_split, remarks, set_aside
from residuum.evaluation.comparison import Comparison, compare
from residuum.evaluation.metrics import Judgement
from residuum.evaluation.published import published
from residuum.evaluation.scores import SKIPPED, Member, scores
from residuum.evaluation.views import ONE_CROP, Protocol, parse
from residuum.models.bundle import Bundle, load_bundle
from residuum.models.resnet import ResNet
from residuum.preprocessing import Preprocessing
from residuum.runtime import Engine, pick_engine
from residuum.world import World, processes

Model = Bundle | str | Path


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What one model, or several as an ensemble, are worth on a split.

    Attributes:
        judgement: of the model, or of the ensemble.
        members: where there are several models: each with its name, weight (they add up to 1) and own judgement.
        choices: the protocol's open choices, for each model.
        bundles: the models as they were asked, with the temperatures that were fitted for this evaluation.
        notes: sentences on judged pictures that a model saw in training, and on what could not be told of them.
    """

    judgement: Judgement
    models: tuple[str, ...]
    weights: tuple[float, ...]
    members: tuple[Judgement, ...]
    data: str
    split: str
    protocol: Protocol
    choices: tuple[dict[str, Any], ...]
    bundles: tuple[Bundle, ...]
    pictures: Pictures
    notes: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return self.judgement.n

    @property
    def top1_error(self) -> float:
        return self.judgement.top1_error

    @property
    def top5_error(self) -> float:
        return self.judgement.top5_error

    def to_json(self) -> dict[str, Any]:
        """The figures as a plain dictionary; keys as in docs/json.md."""
        about = {
            "model": self.models[0] if len(self.models) == 1 else list(self.models),
            "data": self.data,
            "split": self.split,
            "protocol": str(self.protocol),
            "choices": list(self.choices),
            "notes": list(self.notes),
        }
        scaling = {
            "temperature": [bundle.temperature for bundle in self.bundles],
            "calibration": [dict(bundle.calibration) or None for bundle in self.bundles],
        }
        figures = about | self.judgement.to_json() | scaling
        seen = self.data, self.split, self.protocol, self.n + len(self.judgement.skipped)
        known = published(self.bundles[0], *seen) if len(self.models) == 1 else None
        if self.judgement.skipped:
            figures["skipped"] = dict(self.judgement.skipped)
        figures["published"] = known.to_json() if known else None
        if self.members:
            figures["members"] = [
                {"model": name, "weight": weight} | _brief(each)
                for name, weight, each in zip(self.models, self.weights, self.members, strict=True)
            ]
            figures["comparisons"] = [each.to_json() for each in self.comparisons]
        return figures

    @property
    def calibration(self) -> list[str]:
        """Of each model, a sentence on how far its scores were calibrated."""
        return [provenance(each.temperature, each.calibration, str(self.protocol)) for each in self.bundles]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every two members, and every member with the ensemble."""
        everyone = [*zip(self.models, self.members, strict=True), ("ensemble", self.judgement)] if self.members else []
        return [compare(a, b, name_a, name_b) for (name_a, a), (name_b, b) in combinations(everyone, 2)]


def judge(
    net: ResNet,
    split: Pictures,
    preprocessing: Preprocessing,
    classes: tuple[str, ...],
    engine: Engine,
    *,
    temperature: float = 1.0,
    world: World | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Judgement:
    """Shows every picture of a split to the network once, one crop each.

    Args:
        split: pictures of any size; those on disk are decoded batch by batch.
        world: the processes that share the pictures; each finds the same.
        progress: called with the number of pictures done so far.
    """
    member = Member.of(net, preprocessing, engine, temperature=temperature)
    (said,) = scores([member], split, engine, world=world, progress=progress)
    ((labels, said),), skipped = readable(split, split.labels, [said])
    return replace(Judgement.of(classes, said, labels), skipped=skipped)


def readable(
    split: Pictures, labels: Tensor, said: Sequence[Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], dict[str, str]]:
    """Labels and scores of the pictures that could be read, for each model; and the others by name, with the reason.

    Raises DataError where none could, DivergedError where scores are not finite.
    """
    if not all(bool(each.isfinite().all()) for each in said):
        raise DivergedError(
            "the network's scores are not finite: its training went wrong; try a tenth of the learning rate."
        )
    kept = (said[0] != SKIPPED).all(1)
    if bool(kept.all()):
        return [(labels, each) for each in said], {}
    if not bool(kept.any()):
        raise DataError("there is no readable picture to judge by; mend them: residuum data check.")
    why = split.skipped if isinstance(split, Stored) else {}
    names = split.take(torch.nonzero(~kept).flatten()).names
    return [(labels[kept], each[kept]) for each in said], {n: why.get(n, "could not be read") for n in names}


def prepared(split: Pictures, preprocessing: Preprocessing) -> Pictures:
    """A split in memory with its pictures resized and cropped as the network wants them; one on disk as it is."""
    if not isinstance(split, Split) or tuple(split.images.shape[1:]) == (*preprocessing.size, preprocessing.channels):
        return split
    pixels = [pixels for pixels, _ in Views(split, preprocessing).batches(256)]
    return replace(split, images=torch.cat(pixels)) if pixels else split


def evaluate(
    model: Model | Sequence[Model],
    data: str | Path,
    *,
    protocol: str = "1crop",
    weights: Sequence[float] | None = None,
    split: str = "test",
    fit_on: str | None = None,
    names: Sequence[str] | None = None,
    data_dir: str | Path = "data",
    on_bad_image: str = "stop",
    quarantine: str | Path = "",
    precision: str = "auto",
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Judges a model, or several as an ensemble, on a data set; `.to_json()` of the result gives its figures.

    Under torchrun the processes share the pictures, and each returns the same.

    Args:
        model: what `residuum.load` returned, or the path of a model file; or several of them, whose scores are averaged.
        data: a data set's name ("digits", "cifar10"), a folder of class folders, or a pattern of tar shards.
        protocol: how pictures are shown, see residuum.evaluation.views ("10crop", "multiscale:224,256,384,480,640").
        weights: of the members, in proportion; None for equal ones.
        split: "train" or "test", which is the split the data are judged by, whatever they call it (`Evaluation.split` says);
            of a folder whose hold-out was drawn, the pictures that the models' own runs held out.
        fit_on: fit each model's temperature first, on this split, or on so many pictures of the judged split ("1000"), which
            are then not judged; `Evaluation.bundles` carry it.
        names: what the models are called; by default their paths.
        data_dir: where archives lie.
        on_bad_image: "stop" at a picture that cannot be read, or "skip" it (`Judgement.skipped` lists it).
        quarantine: a list of pictures to leave out, as training has it.
        progress: called with pictures done and pictures in all.

    Raises:
        DataError: the models and the data name different classes, the split is empty or without labels, or the archive is
            missing or damaged.
        ModelFileError: a model file is missing or damaged.
        UsageError: an unknown data set, split or protocol; weights that are not one a model; a crop larger than the picture; a
            temperature fitted on pictures that are judged, or that the model learnt from.
    """
    chosen = parse(protocol)
    given: list[Model] = [model] if isinstance(model, Model) else list(model)
    shares = _shares(weights, len(given))
    bundles = [each if isinstance(each, Bundle) else load_bundle(Path(each)) for each in given]
    choices = tuple(chosen.to_json(bundle.preprocessing) for bundle in bundles)
    classes = bundles[0].classes
    names = _names(given) if names is None else list(names)
    columns = [_columns(bundle.classes, classes, name, names[0]) for bundle, name in zip(bundles, names, strict=True)]
    source = sources.load(str(data), Path(data_dir), Reading(on_bad_image, str(quarantine)))
    data = sources.unsigned(str(data))  # figures are given away
    split, pictures = pick_split(source, split, bundles)
    _by_name(pictures, source.classes, classes)
    if fit_on is not None:
        pictures, kept, about = set_aside(fit_on, source, split, pictures, bundles)
    labels = _by_name(pictures, source.classes, classes)
    notes = remarks(source, pictures, bundles, names)
    with processes() as world:
        engine = pick_engine(precision, device)
        if fit_on is not None:
            truth = _by_name(kept, source.classes, classes)
            bundles = calibrated(bundles, columns, kept, truth, engine, world, {"data": data, **about})
        asked = [
            Member.of(bundle.net, bundle.preprocessing, engine, columns=where, temperature=bundle.temperature)
            for bundle, where in zip(bundles, columns, strict=True)
        ]
        said = scores(
            asked, pictures, engine, protocol=chosen, world=world, progress=lambda done: progress(done, len(pictures))
        )
    heard, skipped = readable(pictures, labels, said)
    if skipped:
        pictures = pictures.take(torch.tensor([i for i, name in enumerate(pictures.names) if name not in skipped]))
    members = [Judgement.of(classes, each, truth) for truth, each in heard]
    together = torch.stack([w * each for w, (_, each) in zip(shares, heard, strict=True)]).sum(0)
    judgement = Judgement.of(classes, together, heard[0][0]) if len(members) > 1 else members[0]
    return Evaluation(
        judgement=replace(judgement, split=split, skipped=skipped),
        models=tuple(names),
        weights=shares,
        members=tuple(members) if len(members) > 1 else (),
        data=data,
        split=split,
        protocol=chosen,
        choices=choices,
        bundles=tuple(bundles),
        pictures=pictures,
        notes=tuple(notes),
    )


def calibrated(
    bundles: Sequence[Bundle],
    columns: Sequence[Tensor],
    split: Pictures,
    labels: Tensor,
    engine: Engine,
    world: World,
    about: dict[str, Any],
) -> list[Bundle]:
    """The models with the temperatures that fit a split best, one crop a picture; they themselves stay as they are."""
    asked = [
        Member.of(bundle.net, bundle.preprocessing, engine, columns=where)
        for bundle, where in zip(bundles, columns, strict=True)
    ]
    heard, skipped = readable(split, labels, scores(asked, split, engine, world=world))
    result = []
    for bundle, (truth, said) in zip(bundles, heard, strict=True):
        made = copy.copy(bundle)
        made.temperature = fit_temperature(Judgement.of(bundles[0].classes, said, truth).log_scores, truth)
        made.calibration = about | {"n": len(split) - len(skipped), "protocol": str(ONE_CROP)}
        result.append(made)
    return result


def _brief(judgement: Judgement) -> dict[str, Any]:
    figures = judgement.to_json()
    return {key: figures[key] for key in ("top1_error", "top1_interval", "top5_error", "loss", "calibration_error")}


def _names(models: Sequence[Model]) -> list[str]:
    return [f"model {i}" if isinstance(each, Bundle) else str(each) for i, each in enumerate(models, 1)]


def _shares(weights: Sequence[float] | None, n: int) -> tuple[float, ...]:
    """Weights that add up to 1."""
    if n == 0:
        raise UsageError("evaluate needs at least one model.")
    if weights is None:
        return (1 / n,) * n
    if len(weights) != n or not all(0 < w < float("inf") for w in weights):
        raise UsageError(f"weights are {n} numbers above 0, one for each model, not {', '.join(map(str, weights))}.")
    return tuple(w / sum(weights) for w in weights)


def _columns(own: tuple[str, ...], classes: tuple[str, ...], name: str, first: str) -> Tensor:
    """Where each of `classes` stands among a model's own; raises DataError where the names differ."""
    if differing := _differing(own, classes, name, first):
        raise DataError(
            f"the members of an ensemble name different classes: {differing}; take models of the same classes."
        )
    return torch.tensor([own.index(each) for each in classes])


def _by_name(split: Pictures, data: tuple[str, ...], model: tuple[str, ...]) -> Tensor:
    """Labels as positions in the model's classes, matched by name.

    Raises DataError where the names differ, a picture has no label, or there is no picture.
    """
    labels = split.labels
    if not len(split):
        raise DataError("there is no picture to judge; give a split that holds some.")
    if len(labels) != len(split) or int(labels.min()) < 0:
        raise DataError(
            "the pictures have no labels, so there is nothing to judge by; `residuum predict` takes such pictures."
        )
    if differing := _differing(data, model, "the data", "the model"):
        raise DataError(
            f"the data and the model name different classes: {differing}; evaluate on data with the model's classes."
        )
    return torch.tensor([model.index(name) for name in data])[labels]


def _differing(one: tuple[str, ...], other: tuple[str, ...], one_name: str, other_name: str) -> str:
    """What stands in one list of classes only; empty where both hold the same names."""
    only = sorted(set(one) - set(other)), sorted(set(other) - set(one))
    if not any(only):
        return ""
    return f"only in {one_name} {_some(only[0])}, only in {other_name} {_some(only[1])}"


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
