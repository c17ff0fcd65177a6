"""The handwritten digits that come with the package: 1,797 grey images of 8x8 pixels in 10 classes.

digits.npz is the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine Learning
Repository, 1998, doi:10.24432/C50P49, CC BY 4.0), with the values that scikit-learn's `load_digits` returns.
"""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import torch

from resnetlab.data.dataset import Dataset, MemorySplit, split_stratified

TEST = 360  # of 1,797, stratified; the other 1,437 are for training


def load_digits() -> Dataset:
    """Loads the digits with their fixed, stratified split."""
    with files("resnetlab").joinpath("data", "digits.npz").open("rb") as file, np.load(file) as arrays:
        values, targets = arrays["images"], arrays["labels"]  # 0 to 16; 0 to 9
    images = torch.from_numpy(values).double().mul(255 / 16).round().to(torch.uint8)[..., None]  # (1797, 8, 8, 1)
    labels = torch.from_numpy(targets).long()
    train, test = split_stratified(labels, TEST)
    everything = MemorySplit(images, labels, "digits")
    return Dataset("digits", tuple("0123456789"), everything.subset(train), everything.subset(test))
