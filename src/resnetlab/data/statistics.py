"""Mean and standard deviation of the training images after preprocessing."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from resnetlab.data.dataset import Split
from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.preprocessing import Preprocessing, pixel_statistics
from resnetlab.random import make_generator

SAMPLE = 4096  # images on disk that are decoded for the statistics, at most


def compute_statistics(train: Split, preprocessing: Preprocessing, per_pixel: bool) -> Preprocessing:
    """`preprocessing` with the mean (and, unless `per_pixel`, the deviation) of training images resized and cropped by it.

    All images in memory count; of images on disk at most SAMPLE, the same ones for every seed. Sums of 8-bit images are exact
    integers.
    """
    images = getattr(train, "images", None)
    if isinstance(images, Tensor) and tuple(images.shape[1:]) == (*preprocessing.size, preprocessing.channels):
        mean, std = pixel_statistics([images], per_pixel, not per_pixel, preprocessing.white)
        return replace(preprocessing, mean=mean, std=std)
    if len(train) > SAMPLE:
        train = train.subset(
            torch.randperm(len(train), generator=make_generator(0, "statistics"))[:SAMPLE].sort().values
        )
    batches = (pixels for pixels, _ in PreprocessedSplit(train, preprocessing).batches(256))
    mean, std = pixel_statistics(batches, per_pixel, not per_pixel, preprocessing.white)
    return replace(preprocessing, mean=mean, std=std)
