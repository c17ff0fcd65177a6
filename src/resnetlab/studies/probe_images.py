"""The images on which a study measures trained networks: a fixed part of the test split."""

from __future__ import annotations

import torch
from torch import Tensor

from resnetlab.data.dataset import Split
from resnetlab.data.prefetch import PreprocessedSplit
from resnetlab.models.model_file import TrainedModel
from resnetlab.studies.setting import Setting


def select_probe_images(setting: Setting, limit: int) -> Split:
    """At most `limit` test images, spread evenly over the split; the same for every network."""
    split = setting.source.test
    n = min(limit, len(split))
    return split.subset(torch.arange(n) * len(split) // n)


def load_probe_batch(model: TrainedModel, split: Split) -> tuple[Tensor, Tensor]:
    """The network's input, float32 (N, C, h, w) in the ordinary memory layout, and labels int64 (N,)."""
    pixels = torch.cat([batch for batch, _ in PreprocessedSplit(split, model.preprocessing).batches(256)])
    return model.preprocessing.normalise(pixels).contiguous(), split.labels
