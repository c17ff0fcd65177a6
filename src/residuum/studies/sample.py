"""The pictures that a study looks into trained networks with: a fixed part of the test split."""

from __future__ import annotations

import torch
from torch import Tensor

from residuum.data.dataset import Pictures
from residuum.data.reading import Views
from residuum.models.bundle import Bundle
from residuum.runtime import Engine, pick_engine
from residuum.studies.setting import Setting


def pictures(setting: Setting, most: int) -> Pictures:
    """At most so many test pictures, spread evenly over the split; the same for every network."""
    split = setting.source.test
    n = min(most, len(split))
    return split.take(torch.arange(n) * len(split) // n)


def inputs(bundle: Bundle, split: Pictures) -> tuple[Tensor, Tensor]:
    """Pictures as a network gets them, float32 (N, C, h, w) in the ordinary memory layout, and labels int64 (N,)."""
    pixels = torch.cat([batch for batch, _ in Views(split, bundle.preprocessing).batches(256)])
    return bundle.preprocessing.normalise(pixels).contiguous(), split.labels


def engine(setting: Setting) -> Engine:
    """The engine that judges, with every core."""
    return pick_engine(setting.base.precision, setting.device)
