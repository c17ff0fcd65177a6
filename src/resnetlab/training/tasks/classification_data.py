"""What a classifier's run is made of, from its recipe: data, images that are held out, preprocessing, augmentation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from resnetlab.data import sources
from resnetlab.data.augment import Augmentation
from resnetlab.data.crops import Crop
from resnetlab.data.dataset import A_TENTH, Dataset, Split, count_held_out, hold_out, take_fold
from resnetlab.data.device_decode import decodes_on_device
from resnetlab.data.disk_split import DiskSplit, ReadOptions
from resnetlab.data.label_sets import find_classes
from resnetlab.data.mixing import Mixing
from resnetlab.data.own_transform import name_transform
from resnetlab.data.shard_order import ShardOrder
from resnetlab.data.statistics import SAMPLE, compute_statistics
from resnetlab.distributed import World
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation.calibration import MIN_IMAGES
from resnetlab.evaluation.evaluate import prepare_split
from resnetlab.formatting import format_count
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.own_network import OWN
from resnetlab.models.spec import get_specification
from resnetlab.preprocessing import PixelFormat, Preprocessing
from resnetlab.process_place import read_process_place
from resnetlab.training.recipe import EVAL_RATIO, Recipe
from resnetlab.training.recipes import SMALL_SIDE
from resnetlab.training.tasks.base import TaskSetup

SMALL_VIEW = 0.5  # share of an image's area: less is reported
MAX_TABLE = 1_000_000  # images whose order is a table in every process that reads, of 8 bytes an image


def resolve_size(recipe: Recipe, start: TrainedModel | None) -> Recipe:
    """The recipe with the size of the model that it starts from, if it has none of its own."""
    if recipe.image_size:
        return recipe
    if start is None:
        raise UsageError("image_size=0 takes the size of a model to start from: --start-from MODEL.")
    return replace(recipe, **size_of(start))


def size_of(start: TrainedModel) -> dict[str, Any]:
    """The recipe's values for images of the size that a model takes."""
    return {"image_size": start.preprocessing.size[0], "eval_resize": start.preprocessing.resize}


def plan_preprocessing(recipe: Recipe, pixel_format: PixelFormat) -> Preprocessing:
    """The preprocessing of a recipe for images of a format, before the statistics of the training images are known."""
    channels, side = pixel_format.channels, recipe.image_size
    mean, std = torch.zeros(channels), torch.ones(channels)
    return Preprocessing(channels, (side, side), recipe.eval_resize or side, mean, std, dtype=pixel_format.dtype)


def resolve_val_images(recipe: Recipe, source: Dataset) -> Recipe:
    """The recipe with a number in place of A_TENTH: 0 where there is a val split, or the images cannot be divided so."""
    if recipe.val_images != A_TENTH:
        return recipe
    train = source.train
    count = 0 if source.val is not None else count_held_out(A_TENTH, len(train), len(source.classes))
    if count:
        try:
            rest, _ = hold_out(train, count)
        except DataError:  # too few groups
            return replace(recipe, val_images=0)
        seen, left = (find_classes(labels, source.label_sets) for labels in (train.labels, train.labels[rest]))
        if seen - left:  # a class would have no image to train on
            count = 0
    return replace(recipe, val_images=count)


def resolve_shards(recipe: Recipe, source: Dataset, world: World) -> Recipe:
    """The recipe with the number of groups that share the shards, if it takes them a few at a time (data.shard_order).

    Raises UsageError if images of all shards would be evaluated.
    """
    if recipe.sampling != "shards":
        if recipe.shard_groups:
            raise UsageError("shard_groups is for sampling=shards; leave it out, or add that.")
        return recipe
    if source.all_images is not None or recipe.fold or recipe.val_images > 0:
        raise UsageError(
            "sampling=shards needs shards called train and val (or test), without fold and val_images: images held out of the "
            "others would be in all shards."
        )
    groups = recipe.shard_groups or max(1, world.size // read_process_place().local_size)
    return replace(recipe, shard_groups=groups, val_images=0)


def resolve_order(recipe: Recipe, images: int) -> Recipe:
    """The recipe with the order that "auto" stands for: of many images one without a table in every process."""
    order = "keyed" if images > MAX_TABLE else "shuffle"
    return replace(recipe, sampling=order) if recipe.sampling == "auto" else recipe


def choose_sample(recipe: Recipe, train: Split) -> Split:
    """Training images for statistics and examples: all, or those of few shards where others may be far away."""
    if recipe.sampling != "shards":
        return train
    order = ShardOrder.from_split(train, recipe.shard_groups, recipe.seed, recipe.batch)
    return train.subset(order.first_images(SAMPLE))


def require_held_out(recipe: Recipe, held_out: Split, images: int) -> None:
    """Raises UsageError if a value needs held-out images and there are none beside the `images` to train on."""
    watching = {
        "schedule=plateau": recipe.schedule == "plateau",
        "keep=best": recipe.keep == "best",
        "early_stop": recipe.early_stop > 0,
        "none_share": recipe.none_share > 0,
    }
    if any(watching.values()) and not len(held_out):
        value = next(key for key, watches in watching.items() if watches)
        raise UsageError(
            f"{value} watches the held-out error, but nothing is held out; "
            f"hold out some of the {format_count(images, 'image')} to train on, such as --set "
            f"val_images={max(1, min(1000, images // 10))}."
        )
    if recipe.none_share and (n := len(held_out)) < max(MIN_IMAGES, 1 / recipe.none_share):
        raise UsageError(
            f"none_share={recipe.none_share:g} of {n:,} held-out images tells nothing; hold out more, such as --set "
            f"val_images={2 * math.ceil(max(MIN_IMAGES, 1 / recipe.none_share))}."
        )


def describe_view(recipe: Recipe) -> list[str]:
    """Sentences if the network is one for smaller images, and if evaluation looks at an unusually small part of an image."""
    notes = []
    named = recipe.net and not recipe.net.startswith(OWN)
    if named and get_specification(recipe.net).stem == "cifar" and recipe.image_size > SMALL_SIDE:
        better = "take --set image_size=32, or --net resnet18"
        notes.append(f"{recipe.net} is for images of about 32 pixels and slow at {recipe.image_size}: {better}")
    part = (recipe.image_size / (recipe.eval_resize or recipe.image_size)) ** 2
    if part < SMALL_VIEW:
        usual = round(EVAL_RATIO * recipe.image_size)
        seen = (
            f"looks at the middle {recipe.image_size}, {part:.0%} of a square image; eval_resize={usual} would be usual"
        )
        notes.append(f"evaluation resizes images to {recipe.eval_resize} pixels and {seen}")
    return notes


def name_own_transform(recipe: Recipe, setup: TaskSetup) -> Recipe:
    """The recipe with the name of the function that is given; raises UsageError if it has another one's, or none is given."""
    given = "" if setup.options.transform is None else name_transform(setup.options.transform)
    if recipe.transform in ("", given) and (given or not recipe.transform):
        return replace(recipe, transform=given)
    raise UsageError(
        f"the training images of this recipe are changed by the function {recipe.transform}"
        + (f", not {given}" if given else "")
        + "; give it again, in Python: resnetlab.train(…, transform=…)."
    )


def choose_augmentation(recipe: Recipe, num_classes: int) -> Augmentation:
    """Every random change of training images that a recipe asks for."""
    return Augmentation(
        pad=recipe.pad,
        pad_with=recipe.pad_with,
        flip=recipe.flip,
        colour=recipe.colour,
        trivial_augment=recipe.trivial_augment,
        erasing=recipe.erasing,
        crop=Crop(recipe.crop, recipe.scale, recipe.area),
        mixing=Mixing(recipe.mixup, recipe.cutmix, num_classes),
        flip_vertical=recipe.flip_vertical,
        rotate=recipe.rotate,
    )


def load_source(recipe: Recipe, setup: TaskSetup) -> tuple[Recipe, Dataset]:
    """The data of a recipe, and the recipe with the number of channels if values are read as stored.

    A new run finds how its images are read by the first one; a run that is resumed has it in its recipe.
    """
    quarantine = str(setup.started_in / recipe.quarantine) if recipe.quarantine else ""
    own = setup.options.dataset
    data = own if isinstance(own, str) else sources.resolve_data_path(recipe.data, setup.started_in)
    read_options = ReadOptions(
        recipe.on_bad_image,
        quarantine,
        setup.num_workers,
        recipe.groups,
        multi_label=True,
        as_needed=recipe.sampling == "shards",
    )
    data_dir = setup.options.data_dir or Path("data")
    load = partial(sources.load_dataset, data, data_dir, read_options)
    source: Dataset = own if isinstance(own, Dataset) else setup.load_once(load)
    for key in ("groups", "quarantine"):
        if (value := getattr(recipe, key)) and not isinstance(source.train, DiskSplit):
            raise UsageError(f"{key}={value} is for images on disk; leave it out.")
    if recipe.decode_on == "device":
        source = source.with_decode_on(recipe.decode_on)
        _check_decoding_on_device(recipe, source, setup)
    if not len(source.train):
        few = source.describe_few_images()
        missing = "has no train folder; training needs class folders, or train/ with class folders in it."
        raise DataError(f"{'the data' if own else data}{':' if few else ''} {few or missing}")
    if recipe.channels or not setup.resuming:
        found = source.train.find_pixel_format(recipe.channels)
        source = source.with_pixel_format(found)
        if found.dtype:
            recipe = replace(recipe, channels=found.channels)
            require_eight_bits_for(recipe, found)
            setup.options.report(
                f"images of {found}, read as stored: torch resizes them, and statistics are of every channel"
            )
    if not recipe.fold or source.label_sets is not None:
        return recipe, source
    unused = {"val": source.val, source.evaluated_split: source.test} if source.all_images is None else {}
    parts = [f"{len(split):,} of {name}" for name, split in unused.items() if split is not None and len(split)]
    if parts:
        pool = f"folds divide the {len(source.train):,} images of train"
        setup.options.report(f"{pool}; the {' and '.join(parts)} are not used")
    return recipe, take_fold(source, recipe.fold)


def _check_decoding_on_device(recipe: Recipe, source: Dataset, setup: TaskSetup) -> None:
    """Raises UsageError where the device cannot decode the images, or something changes each of them on the CPU."""
    if recipe.trivial_augment or setup.options.transform is not None:
        what = "trivial_augment changes" if recipe.trivial_augment else "a function of your own changes"
        raise UsageError(f"{what} each image on the CPU, so decode_on=device would gain nothing; leave it out.")
    decodes_on_device(source.train, setup.device_config.device)  # now, rather than in the first step


def require_eight_bits_for(recipe: Recipe, found: PixelFormat) -> None:
    """Raises UsageError for augmentations that are defined on 8-bit grey or RGB only."""
    if recipe.decode_on == "device":
        raise UsageError(f"decode_on=device is for grey or RGB of 8 bits, and the images have {found}; leave it out.")
    if values := [key for key in ("colour", "trivial_augment") if getattr(recipe, key)]:
        raise UsageError(
            f"{values[0]} changes colours of 8 bits, and the images have {found}; leave it out: --set {values[0]}=false."
        )


def divide_images(
    recipe: Recipe, source: Dataset, shape: Preprocessing
) -> tuple[Split, Split, Split, dict[str, Sequence[str]]]:
    """(training images, held-out images, test images, names of the images in the splits drawn here)."""
    everything, test = (
        split if recipe.crop != "centre" else prepare_split(split, shape) for split in (source.train, source.test)
    )
    holdout: dict[str, Sequence[str]] = (
        {source.evaluated_split: source.test.names} if source.all_images is not None else {}
    )
    if not recipe.val_images:
        return everything, source.val or everything.subset(torch.empty(0, dtype=torch.long)), test, holdout
    if source.val is not None:
        raise UsageError(
            f"{recipe.data} has a split val, which is evaluated while training; leave out val_images={recipe.val_images}."
        )
    rest, chosen = hold_out(everything, recipe.val_images)
    held_out = everything.subset(chosen)
    return everything.subset(rest), held_out, test, holdout | {"evaluated while training": held_out.names}


def add_statistics(normalise: str, train: Split, shape: Preprocessing, start: TrainedModel | None) -> Preprocessing:
    """The preprocessing with the training images' mean and standard deviation, or those of the start model if it has the same
    channels.
    """
    if normalise != "as start_from":
        return compute_statistics(train, shape, normalise == "per-pixel mean")
    if start is None:
        raise UsageError("normalise='as start_from' needs a model to start from: --start-from MODEL.")
    base = start.preprocessing
    if base.pixel_format != shape.pixel_format:  # its statistics are of other channels
        return compute_statistics(train, shape, per_pixel=False)
    mean = base.mean if base.mean.ndim == 1 or base.size == shape.size else base.mean.mean((0, 1))
    return replace(base, size=shape.size, resize=shape.resize, mean=mean)
