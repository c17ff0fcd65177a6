"""A detector or segmenter as an ONNX graph, proved against PyTorch on real pictures.

    detect    pictures uint8 (H, W, 3) of any size -> boxes (n, 4) in its pixels, scores and labels (n,), 0 the first class
    segment   pictures uint8 (B, h, w, 3), resized as `evaluation.masks.resized` does -> scores (B, classes, h, w)

Resizing and normalising are inside a detector's graph. The exporter is PyTorch's tracing one, for which torchvision's detectors
are made (the other one stops at their data-dependent shapes); it writes opset 17.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from residuum.errors import UsageError
from residuum.evaluation.masks import resized
from residuum.models.dense_file import DenseBundle
from residuum.models.values import Segmenter
from residuum.records import write_atomically

OPSET = 17


class Proof(NamedTuple):
    """How far the graph and PyTorch lie apart on pictures: the share on which they say the same, and the largest difference."""

    pictures: int
    agreement: float  # of pictures with the same labels in the same order, or of pixels with the same class
    largest_difference: float  # of boxes in pixels, or of scores


class _Detects(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        said = self.net([pictures.permute(2, 0, 1).float() / 255])[0]
        return said["boxes"], said["scores"], said["labels"] - 1


class _Segments(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, pictures: Tensor) -> Tensor:
        return torch.softmax(self.net(pictures), 1)


def export_onnx(bundle: DenseBundle, out: Path, pictures: Sequence[Tensor]) -> Proof:
    """Writes the graph, and proves it on pictures, uint8 (H, W, 3), of any sizes.

    Raises:
        UsageError: onnx or onnxruntime is not installed, or no picture is given.
        RunError: the file cannot be written.
    """
    try:
        import onnx  # noqa: F401 - torch's exporter needs it
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"export needs {error.name}, which is not installed: pip install onnx onnxruntime.") from error
    if not pictures:
        raise UsageError("export proves the graph on pictures; give one or more.")
    detects = bundle.task == "detect"
    net: nn.Module = (_Detects(bundle.net) if detects else _Segments(bundle.net)).eval()
    inputs = list(pictures) if detects else [_resized(bundle, p)[None] for p in pictures]
    outputs = ["boxes", "scores", "labels"] if detects else ["scores"]
    free: dict[str, Any] = (
        {"pictures": {0: "height", 1: "width"}, **{name: {0: "n"} for name in outputs}}
        if detects
        else {
            name: {0: "batch", 1 + (name == "scores"): "h", 2 + (name == "scores"): "w"}
            for name in ("pictures", "scores")
        }
    )
    with TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the tracer, on what torchvision has made safe to trace
        file = Path(folder) / "graph.onnx"
        torch.onnx.export(
            net, (inputs[0],), file, dynamo=False, opset_version=OPSET, input_names=["pictures"], output_names=outputs,
            dynamic_axes=free,
        )  # fmt: skip
        graph = file.read_bytes()
    write_atomically(out, graph)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    same, largest = 0.0, 0.0
    for picture in inputs:
        theirs = [torch.from_numpy(value) for value in session.run(None, {"pictures": picture.numpy()})]
        with torch.inference_mode():
            ours = net(picture)
        agreement, difference = (_compare_boxes if detects else _compare_maps)(ours, theirs)
        same, largest = same + agreement, max(largest, difference)
    return Proof(len(inputs), same / len(inputs), largest)


def _resized(bundle: DenseBundle, pixels: Tensor) -> Tensor:
    values = cast(Segmenter, bundle.values)
    return resized(pixels, values.size, values.longest)


def _compare_boxes(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> tuple[float, float]:
    """Whether both say the same labels in the same order, and how far their boxes are apart."""
    if ours[2].shape != theirs[2].shape or not torch.equal(ours[2], theirs[2]):
        return 0.0, 0.0
    return 1.0, float((ours[0] - theirs[0]).abs().max()) if len(ours[0]) else 0.0


def _compare_maps(ours: Tensor, theirs: Sequence[Tensor]) -> tuple[float, float]:
    """The share of pixels of the same class, and the largest difference of scores."""
    agreement = (ours.argmax(1) == theirs[0].argmax(1)).float().mean()
    return float(agreement), float((ours - theirs[0]).abs().max())
