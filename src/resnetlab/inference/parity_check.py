"""Compares the scores of an exported file, read back from the disk, with the network's.

The images are real and have their own sizes. They are run one by one and in batches, in which they are cropped to one size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnetlab.inference.backends import PARITY_BOUNDS, Agreement, PredictFn, measure_seconds
from resnetlab.inference.export_graphs import PIXELS
from resnetlab.inference.inference_module import InferenceModule, compute_reference_scores
from resnetlab.models.model_file import TrainedModel
from resnetlab.preprocessing import tensor_to_pil

BATCHES = (1, 7)


@dataclass(frozen=True)
class ParityReport:
    """Agreement and speed of an exported file.

    Attributes:
        agreement: with the network in torch and fp32, the worse of both batch sizes.
        seconds, torch_seconds: batch size -> time of a batch with the file; in torch fp32 with folded BN and Pillow's resize.
    """

    precision: str
    n: int
    sizes: int  # number of different image sizes
    agreement: Agreement
    seconds: Mapping[int, float]
    torch_seconds: Mapping[int, float]

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
            "top1_agreement": self.agreement.top1_agreement,
            "largest_difference": self.agreement.largest_difference,
            "bound": {"top1_agreement": least, "largest_difference": largest},
            "batches": [
                {"batch": b, "seconds": self.seconds[b], "torch_seconds": self.torch_seconds[b]} for b in self.seconds
            ],
        }


def check_parity(model: TrainedModel, predict: PredictFn, images: Sequence[Tensor], precision: str) -> ParityReport:
    """Compares the file's scores with the network's on images, each uint8 (H, W, C) at its own size."""
    agreements, times, torch_times = [], {}, {}
    net = InferenceModule(model).to(memory_format=torch.channels_last)

    def preprocess(batch: Tensor) -> Tensor:
        return torch.stack([model.preprocessing(tensor_to_pil(one)) for one in batch])

    with torch.inference_mode():
        for size in BATCHES:
            batches = [_crop_to_common_size(images[i : i + size]) for i in range(0, len(images), size)]
            scores = torch.cat([predict(batch) for batch in batches])
            expected = compute_reference_scores(model, torch.cat([preprocess(batch) for batch in batches]))
            agreements.append(Agreement.between(scores, expected))
            batch = batches[0][torch.arange(size) % len(batches[0])]
            times[size], torch_times[size] = measure_seconds([predict, lambda batch: net(preprocess(batch))], batch)
    worst = Agreement(min(a.top1_agreement for a in agreements), max(a.largest_difference for a in agreements))
    sizes = len({image.shape for image in images})
    return ParityReport(precision, len(images), sizes, worst, times, torch_times)


def _crop_to_common_size(images: Sequence[Tensor]) -> Tensor:
    """Crops the centre of each image to their smallest height and width; uint8 (B, H, W, C)."""
    h, w = (min(image.shape[axis] for image in images) for axis in (0, 1))
    crops = []
    for image in images:
        top, left = (image.shape[0] - h) // 2, (image.shape[1] - w) // 2
        crops.append(image[top : top + h, left : left + w])
    return torch.stack(crops)


def _load_onnx(file: Path) -> PredictFn:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {PIXELS: pixels.numpy()})[0])


def _load_torch(file: Path) -> PredictFn:
    module: Any = torch.export.load(str(file)).module()
    return lambda pixels: module(pixels)


def _load_openvino(file: Path) -> PredictFn:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(str(file), "CPU", settings)
    return lambda pixels: torch.from_numpy(compiled([pixels.numpy()])[0].copy())


READERS: Mapping[str, Callable[[Path], PredictFn]] = {
    "onnx": _load_onnx,
    "torch": _load_torch,
    "openvino": _load_openvino,
}
