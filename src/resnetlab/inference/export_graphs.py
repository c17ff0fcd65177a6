"""Converts a model to ONNX and OpenVINO graphs, fp32 or int8."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from resnetlab.errors import UsageError
from resnetlab.inference.inference_module import InferenceModule, export_program
from resnetlab.inference.outputs import SCORES, Output
from resnetlab.inference.resizing import Resize
from resnetlab.models.model_file import TrainedModel

PIXELS = "pixels"  # name of the input in every format
RESIZED = "resized"  # name of the tensor between resize and network
OPSET = 20  # of ONNX; the newest that is two years old


@cache
def openvino_core() -> Any:
    """The one `openvino.Core` of this process.

    The CPU plugin of every core has an alternate stack for signals, and gives back the one it found. Released in another
    order than they were made, two of them leave one that is freed, and the next signal that Python handles ends the process.
    """
    import openvino

    core = openvino.Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin, before other libraries make a core of their own
    return core


@dataclass(frozen=True, eq=False)
class ExportGraphs:
    """The graphs of one model; intermediate results are shared.

    Attributes:
        calibration_images: uint8 (N, h, w, C), needed for int8 only.
        output: what the graphs compute.
    """

    model: TrainedModel
    calibration_images: Tensor | None = None
    output: Output = SCORES

    @cached_property
    def _network_onnx(self) -> Any:
        image = self.model.preprocessing.blank_image(*self.model.preprocessing.size)
        program = export_program(InferenceModule(self.model, self.output), image, ("batch",))
        return _to_onnx(program, PIXELS, self.output.name)

    @cached_property
    def _resize_onnx(self) -> Any:
        """uint8 (batch, height, width, C) of any size -> uint8 (batch, h, w, C)."""
        return _to_onnx(export_resize(self.model), PIXELS, RESIZED)

    def onnx(self, precision: str, any_size: bool = False) -> bytes:
        """Serialised ONNX: uint8 `pixels` (batch, h, w, C) -> float32 `scores` (batch, classes), or `features`.

        With `any_size` the graph takes images of any height and width, and resizes and crops them.
        """
        import onnx

        graph = onnx.ModelProto()
        graph.CopyFrom(self._network_onnx)
        if precision == "int8":
            graph = _quantize_onnx(graph, self._get_calibration_images())
        if any_size:
            resize = onnx.compose.add_prefix(self._resize_onnx, "resize/", rename_inputs=False, rename_outputs=False)
            graph = onnx.compose.add_prefix(graph, "net/", rename_outputs=False)
            graph.ir_version = resize.ir_version  # the quantiser writes another
            graph = onnx.compose.merge_models(resize, graph, [(RESIZED, f"net/{PIXELS}")])
        _name_dimensions(graph, ("batch", "height", "width") if any_size else ("batch",))
        del graph.metadata_props[:]
        onnx.helper.set_model_props(graph, export_metadata(self.model))
        onnx.checker.check_model(graph, full_check=True)
        content: bytes = graph.SerializeToString()
        return content

    def openvino(self, precision: str, any_size: bool = False) -> Any:
        """An `openvino.Model`; it is compiled to bf16, not converted, so `precision` is fp32 or int8.

        `any_size` as in `onnx`.
        """
        import openvino

        graph: Any = openvino_core().read_model(self.onnx("fp32"), b"")
        if precision == "int8":
            os.environ.setdefault("NNCF_CI", "1")  # disables its telemetry
            with _suppress_output():
                import nncf

                images = self._get_calibration_images()
                batches = nncf.Dataset([x.numpy() for x in torch.split(images, 1)])
                graph = nncf.quantize(graph, batches, subset_size=len(images), preset=nncf.QuantizationPreset.MIXED)
        if any_size:
            resize = openvino_core().read_model(self._resize_onnx.SerializeToString(), b"")
            resized = resize.output(0).get_node().input_value(0)
            for target in graph.input(0).get_node().output(0).get_target_inputs():
                target.replace_source_output(resized)
            graph = openvino.Model(graph.get_results(), resize.get_parameters())
        for key, value in export_metadata(self.model).items():
            graph.set_rt_info(value, ["resnetlab", key])
        return graph

    def _get_calibration_images(self) -> Tensor:
        if self.calibration_images is None or not len(self.calibration_images):
            raise UsageError("int8 is calibrated on images, and there are none; give some.")
        return self.calibration_images


def export_resize(model: TrainedModel, then: nn.Module | None = None) -> torch.export.ExportedProgram:
    """Exports resize and crop of images of any size, optionally followed by another module."""
    preprocessing = model.preprocessing
    resize = Resize(preprocessing)
    module = resize if then is None else nn.Sequential(resize, then)
    h, w = preprocessing.size
    # an odd example size, so that nothing specialises to the network's input size
    return export_program(module, preprocessing.blank_image(h + 3, w + 7), ("batch", "height", "width"))


def _to_onnx(program: torch.export.ExportedProgram, input_name: str, output_name: str) -> Any:
    """Converts a program to an `onnx.ModelProto`."""
    with _suppress_output():
        exported: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[output_name],
        )
    return exported.model_proto


def _name_dimensions(graph: Any, names: Sequence[str]) -> None:
    """Gives the free dimensions of input and outputs their names, in place of torch's numbers; lists the opset once."""
    import onnx

    free = [dim.dim_param for dim in graph.graph.input[0].type.tensor_type.shape.dim if dim.dim_param]
    new = dict(zip(free, names, strict=True))
    for value in (*graph.graph.input, *graph.graph.output, *graph.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = new.get(dim.dim_param, dim.dim_param)
    opsets = {opset.domain: opset.version for opset in graph.opset_import}
    del graph.opset_import[:]
    graph.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items())


def _quantize_onnx(graph: Any, calibration_images: Tensor) -> Any:
    """Quantises convolutions and the fully connected layer to int8 (QDQ, weights per channel)."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches = iter(torch.split(calibration_images, 8))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {PIXELS: batch.numpy()}

    with TemporaryDirectory() as folder, _suppress_output():
        source, out = Path(folder, "fp32.onnx"), Path(folder, "int8.onnx")
        onnx.save(onnx.shape_inference.infer_shapes(graph), str(source))
        quantize_static(
            str(source),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "MaxPool", "ReduceMean"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
        return onnx.load(str(out))


def export_metadata(model: TrainedModel) -> dict[str, str]:
    """The metadata of an exported file, as JSON texts; classes are in the order of the scores."""
    return {
        "classes": json.dumps(model.classes, ensure_ascii=False),
        "preprocessing": json.dumps(model.preprocessing.to_json()),
        "specification": json.dumps(model.net.spec.to_json()),
        "temperature": str(model.temperature),
    } | ({"thresholds": json.dumps(model.thresholds)} if model.multi_label else {})


@contextlib.contextmanager
def _suppress_output() -> Iterator[None]:
    """Suppresses the output of exporters and quantisers."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
