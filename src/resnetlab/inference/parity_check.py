"""Compares the scores of an exported file with the network's, and measures the time of files and backends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resnetlab.data.prefetch import preprocess_image
from resnetlab.inference.formats import PredictFn
from resnetlab.inference.inference_module import InferenceModule, compute_reference
from resnetlab.inference.outputs import PARITY_BOUNDS, Agreement
from resnetlab.models.model_file import TrainedModel

BATCHES = (1, 7)  # of the check of a file, whose images are cropped to one size
PAUSE = 0.05  # seconds; longer than the threads of any backend spin while waiting for work
BUDGET = 0.5  # seconds that each of several functions is measured for


@dataclass(frozen=True)
class ParityReport:
    """Agreement of an exported file with the network, and its speed where that is measured.

    Attributes:
        n: number of images.
        agreement: with the network in torch and fp32, the worse of both batch sizes.
        seconds, torch_seconds: batch size -> time of a batch with the file; in torch fp32 with folded BN and Pillow's resize.
    """

    n: int
    agreement: Agreement
    precision: str = "fp32"
    sizes: int = 1  # number of different image sizes
    seconds: Mapping[int, float] = field(default_factory=dict)
    torch_seconds: Mapping[int, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the agreement is within the bounds of the precision."""
        return self.agreement.within(*PARITY_BOUNDS[self.precision])

    def to_json(self) -> dict[str, Any]:
        """A JSON dictionary; keys as in docs/json.md."""
        least, largest = PARITY_BOUNDS[self.precision]
        return {
            "precision": self.precision,
            "n": self.n,
            "sizes": self.sizes,
            "top1_agreement": self.agreement.rate,
            "largest_difference": self.agreement.largest_difference,
            "bound": {"top1_agreement": least, "largest_difference": largest},
            "batches": [
                {"batch": b, "seconds": self.seconds[b], "torch_seconds": self.torch_seconds[b]} for b in self.seconds
            ],
        }


def check_parity(model: TrainedModel, predict: PredictFn, images: Sequence[Tensor], precision: str) -> ParityReport:
    """Compares the file's scores with the network's on images, each (H, W, C) at its own size."""
    agreements, times, torch_times = [], {}, {}
    net = InferenceModule(model).to(memory_format=torch.channels_last)

    def preprocess(batch: Tensor) -> Tensor:
        return torch.stack([preprocess_image(model.preprocessing, one) for one in batch])

    with torch.inference_mode():
        for size in BATCHES:
            batches = [_crop_to_common_size(images[i : i + size]) for i in range(0, len(images), size)]
            scores = torch.cat([predict(batch) for batch in batches])
            expected = compute_reference(model, torch.cat([preprocess(batch) for batch in batches]))
            agreements.append(Agreement.between(scores, expected))
            batch = batches[0][torch.arange(size) % len(batches[0])]
            times[size], torch_times[size] = measure_seconds([predict, lambda batch: net(preprocess(batch))], batch)
    worst = Agreement(min(a.rate for a in agreements), max(a.largest_difference for a in agreements))
    sizes = len({image.shape for image in images})
    return ParityReport(len(images), worst, precision, sizes, times, torch_times)


def _crop_to_common_size(images: Sequence[Tensor]) -> Tensor:
    """Crops the centre of each image to their smallest height and width; (B, H, W, C)."""
    h, w = (min(image.shape[axis] for image in images) for axis in (0, 1))
    crops = []
    for image in images:
        top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
        crops.append(image[top : top + h, left : left + w])
    return torch.stack(crops)


def measure_seconds(functions: Sequence[PredictFn], pixels: Tensor) -> list[float]:
    """Measures the minimum time of a batch for each function, in rounds within BUDGET, at least three.

    The functions take turns, so that other load on the machine affects all of them. A turn begins with a pause and uncounted
    batches, because the threads of the previous runtime hold the cores for a while, waiting for more work.
    """
    best, start, n = [float("inf")] * len(functions), time.perf_counter(), 0
    while n < 3 or (time.perf_counter() - start < BUDGET * len(functions) and n < 50):
        for k, predict in enumerate(functions):
            time.sleep(PAUSE)
            _measure_min_seconds(predict, pixels)
            best[k] = min(best[k], _measure_min_seconds(predict, pixels))
        n += 1
    return best


def _measure_min_seconds(predict: PredictFn, pixels: Tensor) -> float:
    """Measures the minimum time of a batch, of as many as fit into PAUSE, at least one."""
    best, start = float("inf"), time.perf_counter()
    while (before := time.perf_counter()) - start < PAUSE:
        predict(pixels)
        best = min(best, time.perf_counter() - before)
    return best
