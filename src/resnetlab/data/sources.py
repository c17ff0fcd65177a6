"""Loads a data set by its name, folder, table, archive or pattern of shards."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from resnetlab.data import archives, cifar, digits, folder, objects, shards, tables
from resnetlab.data.class_exports import read_class_export
from resnetlab.data.dataset import Dataset
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.layouts import describe_annotations
from resnetlab.data.object_store import is_address, refuse_password, strip_secrets
from resnetlab.errors import DataError, UsageError, suggest_path, unknown_name_error

_load_cifar_once = lru_cache(maxsize=1)(cifar.load_cifar)  # several runs in one process read the files once
BUILTIN: dict[str, Callable[[Path], Dataset]] = {  # name -> loads it from the folder of archives
    "digits": lambda data_dir: digits.load_digits(),
    **{name: partial(_load_cifar_once, name=name) for name in cifar.VERSIONS},
}
KINDS = "a folder of class folders, a table (.csv, .tsv, .parquet), or a .zip or .tar of class folders"


def is_builtin(data: str) -> bool:
    """Whether DATA is a data set's name, not a path or an address."""
    return data in BUILTIN


def strip_signature(data: str) -> str:
    """DATA for files and messages: without the query of an address, which may contain a signature."""
    return strip_secrets(data) if is_address(data) else data


def short_name(data: str) -> str:
    """A folder name for runs on the data: "digits", or the last part of a path."""
    data = strip_signature(data)
    if is_builtin(data):
        return data
    if data.startswith((objects.PREFIX, objects.HUB)):
        return re.sub(r"\W+", "-", data.partition(":")[2] if data.startswith(objects.HUB) else "python").strip("-")
    is_file = tables.is_table(data) or archives.is_archive(data)
    if not is_file and shards.is_shard_pattern(data) and not Path(data).is_dir():
        return re.sub(r"\W+", "-", data.rsplit("/", 2)[-2] if data.count("/") > 1 else "shards").strip("-") or "shards"
    path = tables.table_file(data).resolve()
    return (path.name.split(".")[0] if is_file else path.name) or "photos"


def resolve_data_path(data: str, start: Path) -> str:
    """DATA with a relative path resolved against the folder `start`."""
    fixed = is_builtin(data) or "://" in data or not data.strip() or data.startswith((objects.PREFIX, objects.HUB))
    return data if fixed else str(start / data)


def refuse_objects(data: str) -> None:
    """Raises DataError for the name of data that were given as Python objects, which no name brings back."""
    if data.startswith(objects.PREFIX):
        raise DataError(
            "the data of this run were given as Python objects; give them again: resnetlab.train(resume=RUN, data=…)."
        )


def may_have_moved(data: str, other: str) -> bool:
    """Whether two different DATA may be the same files at two places: neither is a data set's name."""
    return data != other and not is_builtin(data) and not is_builtin(other)


# folders of boxes and masks, which read as class folders would train without a word
NO_CLASS = re.compile(r"images?$|masks?$|labels?$|annot(ation)?s?$|^segmentation|^gtfine$|^leftimg8bit$|^data$")


def load_dataset(name: str, data_dir: Path, read_options: ReadOptions | None = None) -> Dataset:
    """Loads a data set by name, from a folder of class folders, a table, a zip or tar of class folders, or from tar shards.

    Args:
        name: "digits", "cifar10", "cifar100", a path (tables may name columns, data.tables), or a pattern of tar shards.
        data_dir: the folder of archives and downloads.
        read_options: how images on disk are read.

    Raises UsageError for an unknown name, DataError if the files are missing or damaged.
    """
    read_options = read_options or ReadOptions()
    refuse_password(name)
    if not name.strip():
        raise UsageError(
            f"the data set's name is empty; give a folder of class folders, or one of {', '.join(BUILTIN)}."
        )
    if name in BUILTIN:
        return BUILTIN[name](data_dir.resolve())
    refuse_objects(name)
    if name.startswith(objects.HUB):
        return objects.load_hugging_face(name, read_options)
    if tables.is_table(name):
        return _refuse_several_classes(tables.load_table(name, read_options), name, read_options)
    if archives.is_archive(name):
        return archives.load_archive(Path(name), data_dir, read_options)
    if shards.is_shard_pattern(name):
        return shards.load_shards(name, data_dir, read_options)
    refuse_missing(name)
    if Path(name).is_dir():
        return _load_folder(Path(name), read_options)
    raise DataError(f"{name} is a file of another kind; give {KINDS}.")


def refuse_missing(name: str) -> None:
    """Raises what `load_dataset` raises for a name of a folder that does not exist, before anything is read."""
    path = Path(name)
    if (path / "recipe.toml").is_file() and (path / "metrics.jsonl").is_file():
        raise UsageError(
            f"{name} is a run's folder, not data; `resnetlab train --resume {name}` continues it, `resnetlab train DATA "
            f"--start-from {name}` starts from its model."
        )
    is_other = name in BUILTIN or name.startswith(objects.HUB) or not name.strip() or is_address(name)
    if is_other or path.exists() or tables.is_table(name) or shards.is_shard_pattern(name):
        return
    hint = suggest_path(path)
    if not hint and re.match(r"(imagenet|ilsvrc|in1k)(?!te)", name.lower()):
        raise UsageError(f"there is no folder {name} here: ImageNet is downloaded by hand; give its folder.")
    if "/" in name:
        if hint:
            raise DataError(f"{name} is not there{hint}")
        raise DataError(f"{name} is not there; give {KINDS}, or one of {', '.join(BUILTIN)}.")
    unknown = unknown_name_error("data set", name, BUILTIN)
    if "did you mean" not in str(unknown) and hint:
        raise UsageError(f"there is no data set and no folder {name!r} here{hint}")
    raise type(unknown)(f"{unknown} There is no folder {name} here either; data of the Hugging Face hub are hf:NAME.")


def _refuse_several_classes(dataset: Dataset, name: str, read_options: ReadOptions) -> Dataset:
    """The data set; raises UsageError if it has several classes per image and the caller wants one each."""
    if dataset.label_sets is not None and not read_options.multi_label:
        raise UsageError(
            f"{name} gives several classes per image, which this does not take (train, evaluate, predict and data check do); "
            "give data with one class per image."
        )
    return dataset


def _load_folder(path: Path, read_options: ReadOptions) -> Dataset:
    """Loads class folders, or an export of classes; raises DataError, with the commands for them, for boxes or masks."""
    try:
        with warnings.catch_warnings(record=True) as caught:  # those of class folders, which these may not be
            warnings.simplefilter("always")
            dataset = folder.load_folder(path, read_options)
    except DataError as error:
        if (exported := _load_class_export(path, read_options)) is not None:
            return exported
        sentence = None
        with contextlib.suppress(OSError, DataError):  # what cannot be read, which the first error says already
            sentence = describe_annotations(path)
        if sentence:
            raise DataError(f"{error} {sentence}") from error
        _warn_again(caught)
        raise
    named = [name for name in dataset.classes if folder.guess_split(name) or NO_CLASS.search(name.lower())]
    if len(named) == len(dataset.classes) or len(dataset.classes) == 1:  # images and masks, or splits, would be classes
        if (exported := _load_class_export(path, read_options)) is not None:
            return exported
        if sentence := describe_annotations(path):
            raise DataError(sentence)
        if {"images", "masks"} == {name.lower() for name in named}:
            raise DataError(f"{path} holds images and masks, not class folders.")
    _warn_again(caught)
    return dataset


def _load_class_export(path: Path, read_options: ReadOptions) -> Dataset | None:
    if (listed := read_class_export(path)) is None:
        return None
    return _refuse_several_classes(tables.load_listed(listed, read_options), str(path), read_options)


def _warn_again(caught: list[warnings.WarningMessage]) -> None:
    for each in caught:
        warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
