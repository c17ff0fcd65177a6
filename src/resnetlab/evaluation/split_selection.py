"""Selects the images on which models are evaluated and calibrated, and reports those that they saw in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from resnetlab.data import sources
from resnetlab.data.dataset import Dataset, Split, split_stratified
from resnetlab.data.fingerprints import SeenImages, match_fingerprints, same_name_count
from resnetlab.errors import UsageError, unknown_name_error
from resnetlab.evaluation.scores import MAX_SCORES
from resnetlab.formatting import format_count, format_list
from resnetlab.models.model_file import TrainedModel
from resnetlab.preprocessing import RGB, PixelFormat


def common_pixel_format(models: Sequence[TrainedModel]) -> PixelFormat:
    """How images are read for models; raises UsageError where they differ in values as stored."""
    formats = {each.preprocessing.pixel_format if each.preprocessing.dtype else RGB for each in models}
    if len(formats) > 1:
        raise UsageError(
            f"the models take different images: {format_list(sorted(map(str, formats)))}; evaluate each alone."
        )
    return formats.pop()


def pick_split(source: Dataset, split: str, models: Sequence[TrainedModel]) -> tuple[str, Split]:
    """The name in the data and the images of a split; "test" is the split that the data are evaluated on.

    For a folder without val/ and test/ these are the images that the models' own runs held out, by their names, or all
    images where no model was trained on these data.

    Raises UsageError for an unknown split, or where every image was seen by one of the models.
    """
    splits = source.splits
    if split == "test" and split not in splits and source.all_images is not None:
        return _select_unseen(source, source.all_images, models)
    if split == "test" and split not in splits:
        split = source.evaluated_split
    if split not in splits and split == source.evaluated_split:
        return source.evaluated_split, source.test  # it exists, but is empty
    if split not in splits:
        names = dict.fromkeys(["test", *splits])
        raise UsageError(f"unknown split {split!r}; known: {', '.join(names)}.")
    return split, splits[split]


def _select_unseen(source: Dataset, images: Split, models: Sequence[TrainedModel]) -> tuple[str, Split]:
    """The name and the images of the part of a folder that no model has seen."""
    evaluated, name = torch.ones(len(images), dtype=torch.bool), "all"
    for model in models:
        seen, held_out = _match_images(model, source, images)
        if bool(held_out.any()):
            evaluated, name = evaluated & held_out, source.evaluated_split
        elif bool(seen.any()):
            evaluated, name = evaluated & ~seen, source.evaluated_split
    if not bool(evaluated.any()):
        raise UsageError(
            f"every image of {source.name} was seen in training by one of the models; evaluate on other images, or "
            "allow these: --split all."
        )
    return (name, images) if name == "all" else (name, images.subset(torch.nonzero(evaluated).flatten()))


def limit_fitted(images: Split, classes: int) -> Split:
    """The images to fit a temperature on: all, or as many, in proportion to the classes, as MAX_SCORES are of.

    One number needs no more, and every process keeps their scores.
    """
    most = MAX_SCORES // classes
    return images if len(images) <= most else images.subset(split_stratified(images.labels, most)[1])


def describe_overlap(
    source: Dataset, evaluated: Split, models: Sequence[TrainedModel], names: Sequence[str]
) -> list[str]:
    """Sentences on which of the evaluated images the models saw in training, or may have seen."""
    notes = []
    for model, name in zip(models, names, strict=True):
        about = model.data
        if n := int(_match_images(model, source, evaluated).seen.sum()):
            notes.append(
                f"{n:,} of these {len(evaluated):,} images {'was' if n == 1 else 'were'} seen in the training of {name}: "
                "expect more errors on others"
            )
        if source.all_images is None or not about or about.get("fingerprint") == source.fingerprint:
            continue
        seen, held_out = (int(mask.sum()) for mask in _match_images(model, source, source.all_images))
        if seen:
            listed = model.recipe.get("quarantine")
            notes.append(
                f"{source.name} has changed since {name} was trained on it (or has another quarantine list"
                f"{f': the run had --quarantine {listed}' if listed else ''}): of its "
                f"{len(source.all_images):,} images {seen:,} were seen in training, {held_out:,} held out"
            )
        if n := same_name_count(model.fingerprints, evaluated):
            notes.append(
                f"{format_count(n, 'image')} {'has the name' if n == 1 else 'have the names'} of some in the training of "
                f"{name}, but other sizes: counted as different images"
            )
        if "seen" not in model.fingerprints and about.get("name") == sources.short_name(source.name):
            notes.append(
                f"{name} was trained on {about['name']}, other than now, and its file does not say which images it saw"
            )
    return notes


def _match_images(model: TrainedModel, source: Dataset, images: Split) -> SeenImages:
    return match_fingerprints(model.fingerprints, model.data.get("fingerprint", ""), source, images)


def select_calibration_images(
    fit_on: str, source: Dataset, split: str, evaluated: Split, models: Sequence[TrainedModel]
) -> tuple[Split, Split, dict[str, Any]]:
    """The images to evaluate, those to fit temperatures on, and a description of the latter.

    Raises UsageError where an image would be in both, or where a model saw one of the latter in training.
    """
    advice = "take another split, or a number of images (as 1000), which are then fitted on and not evaluated."
    if fit_on.isdecimal():
        rest, chosen = split_stratified(evaluated.labels, int(fit_on), names=evaluated.names)
        held_out, about = evaluated.subset(chosen), {"split": f"set aside from {split}"}
        evaluated, advice = evaluated.subset(rest), "set images aside from another split: --split."
    else:
        splits = source.splits
        if fit_on not in splits:
            raise unknown_name_error("split to fit the temperature on", fit_on, splits)
        held_out, about = splits[fit_on], {"split": fit_on}
        if fit_on == split or not set(evaluated.names).isdisjoint(held_out.names):
            raise UsageError(
                f"the temperature cannot be fitted on {fit_on}, which holds images that are evaluated; {advice}"
            )
    if any(bool(_match_images(model, source, held_out).seen.any()) for model in models):
        where = split if fit_on.isdecimal() else fit_on
        raise UsageError(f"the temperature cannot be fitted on {where}, which the model was trained on; {advice}")
    held_out = limit_fitted(held_out, len(source.classes))
    return evaluated, held_out, about | {"n": len(held_out)}
