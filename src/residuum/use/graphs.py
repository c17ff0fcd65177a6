"""The whole network in other programs' formats: ONNX and OpenVINO's, fp32 or int8."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from residuum.errors import UsageError
from residuum.models.bundle import Bundle
from residuum.use.resizing import Resize
from residuum.use.whole import Whole, program

PIXELS, SCORES = "pixels", "scores"  # the input's and the output's name in every format
RESIZED = "resized"  # what the part that resizes gives to the rest
OPSET = 20  # of ONNX; the newest that has been out for two years


@dataclass(frozen=True, eq=False)
class Graphs:
    """One network's graphs; what several of them start from is made once.

    Attributes:
        training: uint8 (N, h, w, C), what int8 is calibrated on; None where there is no int8.
    """

    bundle: Bundle
    training: Tensor | None = None

    @cached_property
    def _exported(self) -> Any:
        shape = (*self.bundle.preprocessing.size, self.bundle.preprocessing.channels)
        return _onnx(program(Whole(self.bundle), shape, ("batch",)), PIXELS, SCORES)

    @cached_property
    def _resizing(self) -> Any:
        """uint8 (batch, height, width, C) of any size -> uint8 (batch, h, w, C)."""
        return _onnx(resizing(self.bundle), PIXELS, RESIZED)

    def onnx(self, precision: str, any_size: bool = False) -> bytes:
        """As ONNX, classes in its metadata: uint8 `pixels` (batch, h, w, C) -> float32 `scores` (batch, classes).

        With `any_size` pictures of any height and width, which it resizes and crops.
        """
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._exported)
        if precision == "int8":
            model = _onnx_int8(model, self._pictures())
        if any_size:
            front = onnx.compose.add_prefix(self._resizing, "resize/", rename_inputs=False, rename_outputs=False)
            model = onnx.compose.add_prefix(model, "net/", rename_outputs=False)
            model.ir_version = front.ir_version  # the quantiser writes another
            model = onnx.compose.merge_models(front, model, [(RESIZED, f"net/{PIXELS}")])
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, about(self.bundle))
        onnx.checker.check_model(model, full_check=True)
        content: bytes = model.SerializeToString()
        return content

    def openvino(self, precision: str, any_size: bool = False) -> Any:
        """As an `openvino.Model`, classes in its runtime information; bf16 is not its own but its compilation's business.

        `any_size` as in `onnx`.
        """
        import openvino

        model: Any = openvino.Core().read_model(self.onnx("fp32"), b"")
        if precision == "int8":
            os.environ.setdefault("NNCF_CI", "1")  # else it tells its makers, unasked, that it was used
            with _quietly():
                import nncf

                pictures = self._pictures()
                batches = nncf.Dataset([x.numpy() for x in torch.split(pictures, 1)])
                model = nncf.quantize(model, batches, subset_size=len(pictures), preset=nncf.QuantizationPreset.MIXED)
        if any_size:
            front = openvino.Core().read_model(self._resizing.SerializeToString(), b"")
            resized = front.output(0).get_node().input_value(0)
            for place in model.input(0).get_node().output(0).get_target_inputs():
                place.replace_source_output(resized)
            model = openvino.Model(model.get_results(), front.get_parameters())
        for key, value in about(self.bundle).items():
            model.set_rt_info(value, ["residuum", key])
        return model

    def _pictures(self) -> Tensor:
        if self.training is None or not len(self.training):
            raise UsageError("int8 is calibrated on pictures, and there are none; give some.")
        return self.training


def resizing(bundle: Bundle, then: nn.Module | None = None) -> torch.export.ExportedProgram:
    """The part that resizes and crops pictures of any size, alone or with a module after it."""
    prepared = bundle.preprocessing
    front = Resize(prepared) if then is None else nn.Sequential(Resize(prepared), then)
    # an example of some odd size; whatever is computed from it must not take it for the network's own
    return program(front, (prepared.size[0] + 3, prepared.size[1] + 7, prepared.channels), ("batch", "height", "width"))


def _onnx(exported: torch.export.ExportedProgram, given: str, said: str) -> Any:
    """A program as an `onnx.ModelProto`."""
    with _quietly():
        made: Any = torch.onnx.export(
            exported,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[given],
            output_names=[said],
        )
    return made.model_proto


def _onnx_int8(model: Any, training: Tensor) -> Any:
    """Convolutions and the fully connected layer in int8 (QDQ, weights a channel at a time), the rest as it is."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        batches = iter(torch.split(training, 8))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {PIXELS: batch.numpy()}

    with TemporaryDirectory() as folder, _quietly():
        prepared, out = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        onnx.save(onnx.shape_inference.infer_shapes(model), str(prepared))
        quantize_static(
            str(prepared),
            str(out),
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul", "Add", "MaxPool", "ReduceMean"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            activation_type=QuantType.QUInt8,
        )
        return onnx.load(str(out))


def about(bundle: Bundle) -> dict[str, str]:
    """What stands in a file's metadata, as JSON texts: classes in the order of the scores, and how pictures come to it."""
    return {
        "classes": json.dumps(bundle.classes, ensure_ascii=False),
        "preprocessing": json.dumps(bundle.preprocessing.to_json()),
        "specification": json.dumps(bundle.spec.to_json()),
        "temperature": str(bundle.temperature),
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporters and quantisers say to their developers."""
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
