"""Exports a model to a file for other programs, and checks it before the file gets its name.

onnx       FILE.onnx                 one file
torch      FILE.pt2                  for torch.export.load
openvino   FILE.xml and FILE.bin     OpenVINO's IR

FILE.json describes the input and its preprocessing, FILE.parity.json is the parity report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from resnetlab.errors import DataError, ModelFileError, UsageError, missing_package, unknown_name_error
from resnetlab.inference.backends import PARITY_BOUNDS
from resnetlab.inference.export_graphs import PIXELS, SCORES, ExportGraphs, export_metadata, export_resize
from resnetlab.inference.inference_module import InferenceModule
from resnetlab.inference.parity_check import READERS, ParityReport, check_parity
from resnetlab.models.model_file import TrainedModel
from resnetlab.run_folder import write_atomically, write_error


@dataclass(frozen=True)
class ExportFormat:
    """A file format: suffix, required packages and the extra that installs them, precisions."""

    suffix: str
    packages: tuple[str, ...]
    extra: str
    precisions: tuple[str, ...]


FORMATS: Mapping[str, ExportFormat] = {
    "onnx": ExportFormat(".onnx", ("onnx", "onnxscript", "onnxruntime"), "onnx", ("fp32", "int8")),
    "torch": ExportFormat(".pt2", (), "", ("fp32",)),
    "openvino": ExportFormat(".xml", ("onnx", "onnxscript", "openvino", "nncf"), "openvino", ("fp32", "int8")),
}


def check_export_request(target: str, precision: str, out: Path) -> None:
    """Raises UsageError for an impossible export, before anything is loaded."""
    if target not in FORMATS:
        raise unknown_name_error("target", target, (*FORMATS, "torchvision"))
    format = FORMATS[target]
    if precision not in PARITY_BOUNDS:
        raise unknown_name_error("precision", precision, PARITY_BOUNDS)
    if precision not in format.precisions:
        raise UsageError(
            f"--to {target} writes {' or '.join(format.precisions)}, not {precision}; use --to onnx or openvino."
        )
    if out.suffix != format.suffix:
        raise UsageError(f"--out {out}: a file for {target} ends in {format.suffix}.")
    if missing := [name for name in format.packages if find_spec(name) is None]:
        raise missing_package(f"--to {target}", missing[0], format.extra)


def export_model(
    model: TrainedModel,
    target: str,
    precision: str,
    out: Path,
    check_images: Sequence[Tensor],
    calibration_images: Tensor | None,
) -> ParityReport:
    """Writes the file, its description and its parity report; nothing if the parity check fails.

    Args:
        target: a name in FORMATS.
        check_images: for the parity check, each uint8 (H, W, C) at its own size.
        calibration_images: other images for int8, resized and cropped, uint8 (M, h, w, C).

    Raises:
        UsageError: as `check_export_request`, or int8 without images.
        DataError: there is no image for the parity check.
        ModelFileError: the file's scores differ from the network's beyond the bound.
        RunError: the file cannot be written.
    """
    check_export_request(target, precision, out)
    if not len(check_images):
        raise DataError("there is no readable image to check the export on; give some with --data or --images.")
    if precision == "int8" and (calibration_images is None or not len(calibration_images)):
        raise UsageError(
            "int8 is calibrated on other images than those of the parity check, and there are none; give more images."
        )
    try:
        with TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
            file = Path(folder, out.name)
            _write_file(ExportGraphs(model, calibration_images), target, precision, file)
            parity = check_parity(model, READERS[target](file), check_images, precision)
            if not parity.passed:
                least, largest = PARITY_BOUNDS[precision]
                raise ModelFileError(
                    f"{out} was not written: {parity.agreement}, on {parity.n} images; {precision} must agree on {least:.0%} "
                    f"and within {largest:g}."
                )
            for part in sorted(Path(folder).iterdir(), reverse=True):  # weights before the file that refers to them
                os.replace(part, out.with_name(part.name))
    except OSError as error:
        raise write_error(out, error) from error
    write_atomically(out.with_name(f"{out.name}.json"), _format_json(describe_export(model, target, precision)))
    write_atomically(out.with_name(f"{out.name}.parity.json"), _format_json(parity.to_json()))
    return parity


def _write_file(graphs: ExportGraphs, target: str, precision: str, file: Path) -> None:
    if target == "onnx":
        file.write_bytes(graphs.onnx(precision, any_size=True))
    elif target == "torch":
        program = export_resize(graphs.model, InferenceModule(graphs.model))
        torch.export.save(program, str(file), extra_files=dict(export_metadata(graphs.model)))
    else:
        import openvino

        model = graphs.openvino(precision, any_size=True)
        openvino.save_model(model, str(file), compress_to_fp16=False)


def describe_export(model: TrainedModel, target: str, precision: str) -> dict[str, Any]:
    """Describes how to use the file; keys as in docs/json.md."""
    preprocessing = model.preprocessing
    h, w, c = (*preprocessing.size, preprocessing.channels)
    return {
        "format": target,
        "precision": precision,
        "input": {
            "name": PIXELS,
            "type": "uint8",
            "shape": ["batch", "height", "width", c],
            "channels": "grey" if c == 1 else "RGB",
        },
        "output": {"name": SCORES, "type": "float32", "shape": ["batch", len(model.classes)]},
        "prepare": {
            "resize": preprocessing.resize,
            "interpolation": preprocessing.interpolation,
            "crop": [h, w],
            "description": f"Apply the image's EXIF orientation and convert it to {'grey' if c == 1 else 'RGB'}, at its own "
            "size, values 0 to 255; the images of a batch have one size. The file resizes them "
            f"({preprocessing.interpolation}, antialiased) so that the shorter side has {preprocessing.resize} pixels, crops "
            f"the centre {w}x{h}, normalises, and returns calibrated scores.",
        },
        "classes": list(model.classes),
        "specification": model.spec.to_json(),
    }


def _format_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
