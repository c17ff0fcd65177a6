"""scikit-learn's embedded handwritten digits: 1,797 grey pictures of 8x8 pixels in 10 classes (UCI, E. Alpaydin, C. Kaynak)."""

from __future__ import annotations

import torch

from residuum.data.dataset import Dataset, Split, stratified

TEST = 360  # of 1,797, stratified; the other 1,437 are for training


def load() -> Dataset:
    """The digits with their fixed, stratified split; no file is needed."""
    from sklearn.datasets import load_digits  # heavy, so only here

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[..., None]  # (1797, 8, 8, 1)
    labels = torch.from_numpy(bunch.target).long()
    train, test = stratified(labels, TEST)
    everything = Split(images, labels, "digits")
    classes = tuple(str(name) for name in bunch.target_names)
    return Dataset("digits", classes, everything.take(train), everything.take(test))
