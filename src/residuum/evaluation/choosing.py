"""Which pictures models are judged on, and calibrated on: on none unsaid that they saw in training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from residuum.data import marks, sources
from residuum.data.dataset import Dataset, Pictures, stratified
from residuum.errors import UsageError, unknown
from residuum.models.bundle import Bundle


def pick_split(source: Dataset, split: str, bundles: Sequence[Bundle]) -> tuple[str, Pictures]:
    """The split of a name, and what it is called where it comes from; "test" is the one that the data are judged by.

    Of a folder without val/ and test/ that are the pictures that the models' own runs held out, told by their names, or every
    picture where no model learnt on these data.

    Raises UsageError for an unknown split, or where there is no picture that no model has seen.
    """
    splits = source.splits
    if split == "test" and split not in splits and source.whole is not None:
        return _unseen(source, source.whole, bundles)
    if split == "test" and split not in splits:
        split = source.judged
    if split not in splits and split == source.judged:
        return source.judged, source.test  # there, but empty
    if split not in splits:
        names = dict.fromkeys(["test", *splits])
        raise UsageError(f"unknown split {split!r}; known: {', '.join(names)}.")
    return split, splits[split]


def _unseen(source: Dataset, whole: Pictures, bundles: Sequence[Bundle]) -> tuple[str, Pictures]:
    """The pictures of a folder that no model has seen, and how they are called."""
    judged, name = torch.ones(len(whole), dtype=torch.bool), "all"
    for bundle in bundles:
        seen, kept = marks.known(bundle.data, source, whole)
        if bool(kept.any()):
            judged, name = judged & kept, source.judged
        elif bool(seen.any()):
            judged, name = judged & ~seen, source.judged
    if not bool(judged.any()):
        raise UsageError(
            f"every picture of {source.name} was seen in training by one of the models; judge on other pictures, or on these "
            "all the same: --split all."
        )
    return (name, whole) if name == "all" else (name, whole.take(torch.nonzero(judged).flatten()))


def remarks(source: Dataset, judged: Pictures, bundles: Sequence[Bundle], names: Sequence[str]) -> list[str]:
    """Sentences on which of the judged pictures the models knew before, and what could not be told."""
    said = []
    for bundle, name in zip(bundles, names, strict=True):
        about = bundle.data
        if n := int(marks.known(about, source, judged).seen.sum()):
            said.append(
                f"{n:,} of these {len(judged):,} pictures were seen in the training of {name}: expect more errors on others"
            )
        if source.whole is None or not about or about.get("fingerprint") == source.fingerprint:
            continue
        seen, kept = (int(mask.sum()) for mask in marks.known(about, source, source.whole))
        if seen:
            said.append(
                f"{source.name} has changed since {name} was trained on it (or has another quarantine list): of its "
                f"{len(source.whole):,} pictures {seen:,} were seen in training, {kept:,} held out"
            )
        if n := marks.namesakes(about, judged):
            said.append(
                f"{n:,} pictures are called as some in the training of {name}, but have other sizes: taken for others"
            )
        if "seen" not in about and about.get("name") == sources.short_name(source.name):
            said.append(
                f"{name} was trained on {about['name']}, other than now, and its file does not say which pictures it saw"
            )
    return said


def _seen(source: Dataset, pictures: Pictures, bundles: Iterable[Bundle]) -> bool:
    return any(bool(marks.known(bundle.data, source, pictures).seen.any()) for bundle in bundles)


def set_aside(
    fit_on: str, source: Dataset, split: str, judged: Pictures, bundles: Sequence[Bundle]
) -> tuple[Pictures, Pictures, dict[str, Any]]:
    """The pictures that are judged, those that temperatures are fitted on, and what the latter are.

    Raises UsageError where a picture would be in both, or a model saw one in training that it would be fitted on.
    """
    otherwise = "take another split, or a number of pictures (as 1000), which are then fitted on and not judged."
    if fit_on.isdecimal():
        rest, chosen = stratified(judged.labels, int(fit_on), names=judged.names)
        kept, about = judged.take(chosen), {"split": f"set aside from {split}", "n": len(chosen)}
        judged, otherwise = judged.take(rest), "set pictures aside from another split: --split."
    else:
        splits = source.splits
        if fit_on not in splits:
            raise unknown("split to fit the temperature on", fit_on, splits)
        kept, about = splits[fit_on], {"split": fit_on, "n": len(splits[fit_on])}
        if fit_on == split or not set(judged.names).isdisjoint(kept.names):
            raise UsageError(
                f"the temperature cannot be fitted on {fit_on}, which holds pictures that are judged; {otherwise}"
            )
    if _seen(source, kept, bundles):
        where = split if fit_on.isdecimal() else fit_on
        raise UsageError(f"the temperature cannot be fitted on {where}, from which the model learnt; {otherwise}")
    return judged, kept, about
