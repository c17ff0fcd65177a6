"""The proof that an exported file says what the network says: on real pictures, at two batch sizes, read back from the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residuum.models.bundle import Bundle
from residuum.use.engines import BOUNDS, Agreement, Answers, seconds
from residuum.use.graphs import PIXELS
from residuum.use.whole import Whole, reference

BATCHES = (1, 7)


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        top1_agreement, largest_difference: over both batch sizes, against the network in torch and fp32.
        seconds, torch_seconds: of a batch, by its size; of the file, and of torch in fp32 with BN folded.
    """

    precision: str
    n: int
    agreement: Agreement
    seconds: Mapping[int, float]
    torch_seconds: Mapping[int, float]

    @property
    def holds(self) -> bool:
        """Whether it is within the bound of its precision."""
        return self.agreement.within(*BOUNDS[self.precision])

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        least, largest = BOUNDS[self.precision]
        return {
            "precision": self.precision,
            "n": self.n,
            "top1_agreement": self.agreement.top1_agreement,
            "largest_difference": self.agreement.largest_difference,
            "bound": {"top1_agreement": least, "largest_difference": largest},
            "batches": [
                {"batch": b, "seconds": self.seconds[b], "torch_seconds": self.torch_seconds[b]} for b in self.seconds
            ],
        }


def prove(bundle: Bundle, answer: Answers, pixels: Tensor, precision: str) -> Proof:
    """Shows real pictures, uint8 (N, h, w, C), to the file's own runtime and to the network."""
    expected = reference(bundle, pixels)
    found, times, torch_times = [], {}, {}
    whole = Whole(bundle)
    net = whole.to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for size in BATCHES:
            said = torch.cat([answer(part) for part in torch.split(pixels, size)])
            found.append(Agreement.between(said, expected))
            one = pixels[torch.arange(size) % len(pixels)]
            times[size], torch_times[size] = seconds(answer, one), seconds(net, one)
    worst = Agreement(min(a.top1_agreement for a in found), max(a.largest_difference for a in found))
    return Proof(precision, len(pixels), worst, times, torch_times)


def _onnx(file: Path) -> Answers:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(None, {PIXELS: pixels.numpy()})[0])


def _torch(file: Path) -> Answers:
    module: Any = torch.export.load(str(file)).module()
    return lambda pixels: module(pixels)


def _openvino(file: Path) -> Answers:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(str(file), "CPU", settings)
    return lambda pixels: torch.from_numpy(compiled([pixels.numpy()])[0].copy())


READERS: Mapping[str, Callable[[Path], Answers]] = {"onnx": _onnx, "torch": _torch, "openvino": _openvino}
