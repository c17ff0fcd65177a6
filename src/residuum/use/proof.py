"""The proof that an exported file says what the network says, read back from the disk: on real pictures of their own sizes, one
by one and in batches, whose pictures are cut to the size that all of a batch have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residuum.models.bundle import Bundle
from residuum.preprocessing import picture_of
from residuum.use.engines import BOUNDS, Agreement, Answers, seconds
from residuum.use.graphs import PIXELS
from residuum.use.whole import Whole, reference

BATCHES = (1, 7)


@dataclass(frozen=True)
class Proof:
    """What was found.

    Attributes:
        top1_agreement, largest_difference: over both batch sizes, against the network in torch and fp32.
        seconds, torch_seconds: of a batch, by its size; of the file, and of torch in fp32 with BN folded after Pillow's resize.
    """

    precision: str
    n: int
    sizes: int  # how many different ones the pictures have
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
            "sizes": self.sizes,
            "top1_agreement": self.agreement.top1_agreement,
            "largest_difference": self.agreement.largest_difference,
            "bound": {"top1_agreement": least, "largest_difference": largest},
            "batches": [
                {"batch": b, "seconds": self.seconds[b], "torch_seconds": self.torch_seconds[b]} for b in self.seconds
            ],
        }


def prove(bundle: Bundle, answer: Answers, pictures: Sequence[Tensor], precision: str) -> Proof:
    """Shows real pictures, each uint8 (H, W, C) at its own size, to the file's own runtime and to the network."""
    found, times, torch_times = [], {}, {}
    net = Whole(bundle).to(memory_format=torch.channels_last)

    def prepared(batch: Tensor) -> Tensor:
        return torch.stack([bundle.preprocessing(picture_of(one)) for one in batch])

    with torch.inference_mode():
        for size in BATCHES:
            batches = [_cut(pictures[i : i + size]) for i in range(0, len(pictures), size)]
            said = torch.cat([answer(batch) for batch in batches])
            expected = reference(bundle, torch.cat([prepared(batch) for batch in batches]))
            found.append(Agreement.between(said, expected))
            one = batches[0][torch.arange(size) % len(batches[0])]
            times[size], torch_times[size] = seconds([answer, lambda batch: net(prepared(batch))], one)
    worst = Agreement(min(a.top1_agreement for a in found), max(a.largest_difference for a in found))
    sizes = len({picture.shape for picture in pictures})
    return Proof(precision, len(pictures), sizes, worst, times, torch_times)


def _cut(pictures: Sequence[Tensor]) -> Tensor:
    """One batch, uint8 (B, H, W, C): of each picture the middle, as large as all of them are."""
    h, w = (min(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    middles = []
    for picture in pictures:
        top, left = (picture.shape[0] - h) // 2, (picture.shape[1] - w) // 2
        middles.append(picture[top : top + h, left : left + w])
    return torch.stack(middles)


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
