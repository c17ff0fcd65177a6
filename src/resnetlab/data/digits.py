"""scikit-learn's embedded handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes (UCI, E. Alpaydin, C. Kaynak)."""

from __future__ import annotations

import torch

from resnetlab.data.dataset import Dataset, MemorySplit, split_stratified

TEST = 360  # of 1,797, stratified; the other 1,437 are for training


def load_digits() -> Dataset:
    """Loads the digits with their fixed, stratified split; needs no file."""
    from sklearn import datasets  # slow to import, so only here

    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[..., None]  # (1797, 8, 8, 1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = split_stratified(labels, TEST)
    everything = MemorySplit(images, labels, "digits")
    classes = tuple(str(name) for name in bunch.target_names)
    return Dataset("digits", classes, everything.subset(train), everything.subset(test))
