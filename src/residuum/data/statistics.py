"""Mean and standard deviation of the training pictures, as the network sees them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from residuum.data.dataset import Pictures
from residuum.data.reading import Views
from residuum.preprocessing import Preprocessing, centre_statistics
from residuum.runtime import generator

SAMPLE = 4096  # pictures at most that are decoded for it; all that are in memory count


def statistics(train: Pictures, shape: Preprocessing, per_pixel: bool) -> Preprocessing:
    """`shape` with the mean (and, unless `per_pixel`, the deviation) of training pictures, resized and cropped as it says.

    In memory all of them count; of pictures on disk, SAMPLE at most, the same ones for every seed. Sums are exact integers.
    """
    images = getattr(train, "images", None)
    if isinstance(images, Tensor) and tuple(images.shape[1:]) == (*shape.size, shape.channels):
        mean, std = centre_statistics([images], per_pixel, not per_pixel)
        return replace(shape, mean=mean, std=std)
    if len(train) > SAMPLE:
        train = train.take(torch.randperm(len(train), generator=generator(0, "statistics"))[:SAMPLE].sort().values)
    batches = (pixels for pixels, _ in Views(train, shape).batches(256))
    mean, std = centre_statistics(batches, per_pixel, not per_pixel)
    return replace(shape, mean=mean, std=std)
