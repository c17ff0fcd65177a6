"""The data and the loss of a classifier whose images have several classes, or none."""

from __future__ import annotations

import warnings

from torch import Tensor
from torch.nn import functional as F

from resnetlab.data.dataset import Dataset, Split
from resnetlab.data.label_sets import find_classes
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation.multi_label import DEFAULT_THRESHOLD
from resnetlab.formatting import format_list
from resnetlab.training.recipe import Recipe


def check_label_sets(recipe: Recipe, source: Dataset, train: Split) -> list[str]:
    """A sentence on the data; raises UsageError for a value of one class per image, DataError for a class without an image."""
    single = {
        f"class_weights={recipe.class_weights}": recipe.class_weights != "none",
        "sampling=balanced": recipe.sampling == "balanced",
        "none_share": recipe.none_share > 0,
        f"fold={recipe.fold}": bool(recipe.fold),
    }
    if wrong := [value for value, is_set in single.items() if is_set]:
        raise UsageError(f"{wrong[0]} is for data with one class per image, these give several; leave it out.")
    if missing := sorted(set(range(len(source.classes))) - find_classes(train.labels, source.label_sets)):
        names = format_list([source.classes[i] for i in missing])
        raise DataError(f"no image to train on has the class {names}; add some, or leave the class out.")
    assert source.label_sets is not None
    counts = source.label_sets.sum(1)[train.labels]
    average, none = f"{float(counts.mean()):.2f} of {len(source.classes):,} on average", int((counts == 0).sum())
    if bool((counts == 1).all()):
        warnings.warn(
            "every image has exactly one of the classes, though each could have several, so the network learns a yes or no for "
            "each class; if they exclude each other, give one label per image: y.argmax(1) of an array, one column of a table.",
            UserWarning,
            stacklevel=2,
        )
    return [f"several classes per image: {average}, none in {none:,} of the images to train on"]


def multi_label_loss(logits: Tensor, targets: Tensor, label_sets: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mean binary cross entropy in nats over images and classes, and the share of decisions that are wrong; scalars.

    Args:
        logits: float32 (B, classes).
        targets: positions in `label_sets`, int64 (B,), or shares of these where images are mixed, (B, sets).
        label_sets: float32 (sets, classes).
        smoothing: targets are this much nearer to one half.
    """
    truth = label_sets[targets] if targets.ndim == 1 else targets.float() @ label_sets  # (B, classes)
    error = ((logits.detach() > 0) != (truth > DEFAULT_THRESHOLD)).float().mean()
    return F.binary_cross_entropy_with_logits(logits, truth * (1 - smoothing) + smoothing / 2), error
