"""A detector or segmenter as an ONNX graph, checked against PyTorch on real images.

    detect    images uint8 (H, W, 3) of any size -> boxes (n, 4) in its pixels, scores and labels (n,), 0 the first class
    segment   images uint8 (B, h, w, 3), resized by `evaluation.segmentation.resize_bounded` -> scores (B, classes, h, w)

A detector's graph contains resizing and normalisation. The exporter is PyTorch's tracing one, which torchvision's detectors
support (the other one fails on their data-dependent shapes); it writes opset 17.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.device import standard_torch_state
from resnetlab.errors import ModelFileError, UsageError, missing_package
from resnetlab.evaluation.segmentation import resize_bounded
from resnetlab.formatting import format_count, format_percent
from resnetlab.inference.outputs import Agreement
from resnetlab.inference.parity_check import ParityReport
from resnetlab.models.annotated_model import AnnotatedModel
from resnetlab.run_folder import write_atomically

OPSET = 17
LEAST = {"detect": 0.95, "segment": 0.99}  # agreement with PyTorch, without which no file is written
SURE = 0.1  # score from which a box must be there: those near the detector's own bound, 0.05, come and go by rounding
SAME = 0.95  # IoU of two boxes that are the same


class _Graph(nn.Module):
    """What is exported of a network: what detectors and segmenters compute differs by `is_detector`."""

    def __init__(self, net: nn.Module, is_detector: bool) -> None:
        super().__init__()
        self.net, self.is_detector = net, is_detector

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if not self.is_detector:
            return torch.softmax(self.net(images), 1)
        prediction = self.net([images.permute(2, 0, 1).float() / 255])[0]
        return prediction["boxes"], prediction["scores"], prediction["labels"] - 1


@standard_torch_state()
def export_annotated(model: AnnotatedModel, out: Path, images: Sequence[Tensor]) -> ParityReport:
    """Writes the graph, and compares it with PyTorch on images, uint8 (H, W, 3), of any sizes.

    Returns the share of boxes that both give and the largest difference of their sides in pixels, or the share of pixels
    with the same class and the largest difference of scores.

    Raises:
        UsageError: onnx or onnxruntime is not installed, or no image is given.
        ModelFileError: the graph disagrees with PyTorch; no file is written.
        RunError: the file cannot be written.
    """
    try:
        import onnx  # noqa: F401 - torch's exporter needs it
        import onnxruntime
    except ImportError as error:
        raise missing_package("export", error.name, "onnx") from error
    if not images:
        raise UsageError(
            "export compares the graph with PyTorch on images, and this model file holds none; give a folder of some: "
            "--images FOLDER."
        )
    is_detector = model.task == "detect"
    net = _Graph(model.net, is_detector).eval()
    spec = model.head_spec
    inputs = list(images) if is_detector else [resize_bounded(p, spec.image_size, spec.longest)[None] for p in images]
    outputs = ["boxes", "scores", "labels"] if is_detector else ["scores"]
    dynamic_axes: dict[str, Any] = (
        {"images": {0: "height", 1: "width"}, **{name: {0: "n"} for name in outputs}}
        if is_detector
        else {
            name: {0: "batch", 1 + (name == "scores"): "h", 2 + (name == "scores"): "w"}
            for name in ("images", "scores")
        }
    )
    with TemporaryDirectory() as folder, warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # of the tracer, about code that torchvision has made safe to trace
        file = Path(folder) / "graph.onnx"
        torch.onnx.export(
            net, (inputs[0],), file, dynamo=False, opset_version=OPSET, input_names=["images"], output_names=outputs,
            dynamic_axes=dynamic_axes,
        )  # fmt: skip
        graph = file.read_bytes()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    total_agreement, largest = 0.0, 0.0
    for image in inputs:
        actual = [torch.from_numpy(value) for value in session.run(None, {"images": image.numpy()})]
        with torch.inference_mode():
            expected = net(image)
        agreement, difference = (_compare_boxes if is_detector else _compare_maps)(expected, actual)
        total_agreement, largest = total_agreement + agreement, max(largest, difference)
    report = ParityReport(len(inputs), Agreement(total_agreement / len(inputs), largest))
    if report.agreement.rate < LEAST[model.task]:
        raise ModelFileError(
            f"{out} was not written: on {format_count(report.n, 'image')} {format_percent(report.agreement.rate)} agreement "
            f"with PyTorch, {LEAST[model.task]:.0%} are needed."
        )
    write_atomically(out, graph)  # once its runtime has read it
    return report


def _compare_boxes(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> tuple[float, float]:
    """The share of sure boxes of either that the other has too, with the same class, and the largest difference of a side."""
    from torchvision.ops import box_iou

    same = (box_iou(expected[0], actual[0]) >= SAME) & (expected[2][:, None] == actual[2])  # (n, m)
    found = torch.cat([same.any(1)[expected[1] >= SURE], same.any(0)[actual[1] >= SURE]])
    differences = (expected[0][:, None] - actual[0]).abs().amax(2)[same]
    return float(found.float().mean()) if len(found) else 1.0, float(differences.max()) if len(differences) else 0.0


def _compare_maps(expected: Tensor, actual: Sequence[Tensor]) -> tuple[float, float]:
    """The fraction of pixels with the same class, and the largest difference of scores."""
    agreement = (expected.argmax(1) == actual[0].argmax(1)).float().mean()
    return float(agreement), float((expected - actual[0]).abs().max())
