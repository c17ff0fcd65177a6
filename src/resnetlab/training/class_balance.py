"""Classes with few images beside classes with many: weights of the loss, and a note that says so."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from resnetlab.errors import UsageError, unknown_name_error

# an imbalance is reported where the largest class has this many times the images of the smallest, since a network that never
# gives the small one is then right on nine of ten; or five times, where one image is more than a tenth of the smallest
UNEQUAL, UNEQUAL_FEW, FEW = 10, 5, 10


def parse_class_weights(text: str, classes: Sequence[str], labels: Tensor) -> Tensor | None:
    """The weight of each class in the loss, float32 (classes,); None if all are 1.

    Args:
        text: "none"; "balanced": N / (classes with images * images of the class), whose mean over images is 1, as in
            scikit-learn; or weights of some classes, "cat=2,dog=0.5", where the others have 1.
        labels: of the training images, int64 (N,).

    Raises UsageError for an unknown class or a weight that is not a number above 0.
    """
    if text == "none":
        return None
    if text == "balanced":
        counts = labels.bincount(minlength=len(classes))
        return (len(labels) / (int((counts > 0).sum()) * counts.clamp_min(1))).float()
    weights = torch.ones(len(classes))
    for pair in text.split(","):
        name, _, value = (part.strip() for part in pair.rpartition("="))
        if not name and ":" in pair:
            raise UsageError(f"class_weights takes name=number, such as {classes[0]}=2, not {pair!r}.")
        if name not in classes:
            raise unknown_name_error("class in class_weights", name or pair, ["balanced", *classes])
        try:
            weights[classes.index(name)] = float(value)
        except ValueError:
            raise UsageError(f"class_weights takes name=number, such as {classes[0]}=2, not {pair!r}.") from None
    if not bool(((weights > 0) & weights.isfinite()).all()):
        raise UsageError(f"class_weights must be above 0, not {text}.")
    return weights


def describe_imbalance(classes: Sequence[str], labels: Tensor) -> list[str]:
    """A sentence if the classes have very different numbers of training images."""
    counts = labels.bincount(minlength=len(classes))
    low, high = int(counts.argmin()), int(counts.argmax())
    if counts[high] < (UNEQUAL_FEW if counts[low] < FEW else UNEQUAL) * counts[low]:
        return []
    sentence = (
        f"{classes[high]} has {int(counts[high]):,} training images, {classes[low]} {int(counts[low]):,}: the error is mostly "
        "that of the large classes, so look at the balanced error (1 - the mean recall of the classes); class_weights=balanced "
        "or sampling=balanced (--set) give every class the same weight"
    )
    return [sentence]
