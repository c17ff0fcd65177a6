"""A model as one file for other programs, proved before it gets its name.

onnx       FILE.onnx                 one file
torch      FILE.pt2                  torch.export, for torch.export.load
openvino   FILE.xml and FILE.bin     OpenVINO's IR

Beside each stand FILE.json, which says what the input is and how pictures come to it, and FILE.proof.json.
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

from residuum.errors import DataError, ModelFileError, UsageError, unknown
from residuum.models.bundle import Bundle
from residuum.records import write_atomically, writing_error
from residuum.use.engines import BOUNDS
from residuum.use.graphs import PIXELS, SCORES, Graphs, about, resizing
from residuum.use.proof import READERS, Proof, prove
from residuum.use.whole import Whole


@dataclass(frozen=True)
class Format:
    """One format: its file's ending, what it needs, what it computes in."""

    suffix: str
    packages: tuple[str, ...]
    extra: str
    precisions: tuple[str, ...]


FORMATS: Mapping[str, Format] = {
    "onnx": Format(".onnx", ("onnx", "onnxscript", "onnxruntime"), "onnx", ("fp32", "int8")),
    "torch": Format(".pt2", (), "", ("fp32",)),
    "openvino": Format(".xml", ("onnx", "onnxscript", "openvino", "nncf"), "openvino", ("fp32", "int8")),
}


def check_request(target: str, precision: str, out: Path) -> None:
    """Raises UsageError for what no export can be, before anything is loaded."""
    if target not in FORMATS:
        raise unknown("target", target, (*FORMATS, "torchvision"))
    format = FORMATS[target]
    if precision not in BOUNDS:
        raise unknown("precision", precision, BOUNDS)
    if precision not in format.precisions:
        raise UsageError(
            f"--to {target} writes {' or '.join(format.precisions)}, not {precision}; take --to onnx or openvino."
        )
    if out.suffix != format.suffix:
        raise UsageError(f"--out {out}: a file for {target} ends in {format.suffix}.")
    if missing := [name for name in format.packages if find_spec(name) is None]:
        raise UsageError(
            f"--to {target} needs the package {missing[0]}; install it with: pip install 'residuum[{format.extra}]'"
        )


def export_whole(
    bundle: Bundle, target: str, precision: str, out: Path, check: Sequence[Tensor], training: Tensor | None
) -> Proof:
    """Writes the file, what stands beside it, and its proof; nothing where the proof fails.

    Args:
        target: a name in FORMATS.
        check: the pictures of the proof, each uint8 (H, W, C) at its own size.
        training: uint8 (M, h, w, C), others, resized and cropped already, to calibrate int8 on.

    Raises:
        UsageError: what `check_request` refuses, or int8 without pictures.
        DataError: there is no picture for the proof.
        ModelFileError: the file says otherwise than the network, beyond the bound.
        RunError: it cannot be written.
    """
    check_request(target, precision, out)
    if not len(check):
        raise DataError("there is no readable picture to prove the export on; give some with --data or --pictures.")
    if precision == "int8" and (training is None or not len(training)):
        raise UsageError(
            "int8 is calibrated on pictures that are not those of the proof, and there are none; give more pictures."
        )
    try:
        with TemporaryDirectory(dir=out.parent, prefix=".export-") as folder:
            file = Path(folder, out.name)
            _write(Graphs(bundle, training), target, precision, file)
            proof = prove(bundle, READERS[target](file), check, precision)
            if not proof.holds:
                least, largest = BOUNDS[precision]
                raise ModelFileError(
                    f"{out} was not written: {proof.agreement}, of {proof.n} pictures; {precision} must agree on {least:.0%} "
                    f"and within {largest:g}."
                )
            for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights before what refers to them
                os.replace(part, out.with_name(part.name))
    except OSError as error:
        raise writing_error(out, error) from error
    write_atomically(out.with_name(f"{out.name}.json"), _text(description(bundle, target, precision)))
    write_atomically(out.with_name(f"{out.name}.proof.json"), _text(proof.to_json()))
    return proof


def _write(graphs: Graphs, target: str, precision: str, file: Path) -> None:
    if target == "onnx":
        file.write_bytes(graphs.onnx(precision, any_size=True))
    elif target == "torch":
        torch.export.save(
            resizing(graphs.bundle, Whole(graphs.bundle)), str(file), extra_files=dict(about(graphs.bundle))
        )
    else:
        import openvino

        model = graphs.openvino(precision, any_size=True)
        openvino.save_model(model, str(file), compress_to_fp16=False)


def description(bundle: Bundle, target: str, precision: str) -> dict[str, Any]:
    """What a program that uses the file must know; keys as in docs/json.md."""
    prepared = bundle.preprocessing
    h, w, c = (*prepared.size, prepared.channels)
    return {
        "format": target,
        "precision": precision,
        "input": {
            "name": PIXELS,
            "type": "uint8",
            "shape": ["batch", "height", "width", c],
            "channels": "grey" if c == 1 else "RGB",
        },
        "output": {"name": SCORES, "type": "float32", "shape": ["batch", len(bundle.classes)]},
        "prepare": {
            "resize": prepared.resize,
            "interpolation": prepared.interpolation,
            "crop": [h, w],
            "words": f"Turn the picture upright and make it {'grey' if c == 1 else 'RGB'}, at its own size, values 0 to 255; "
            f"the pictures of a batch have one size. The file resizes them ({prepared.interpolation}, antialiased) so that the "
            f"shorter side has {prepared.resize} pixels, keeps the centre {w}x{h}, normalises, and gives calibrated scores.",
        },
        "classes": list(bundle.classes),
        "specification": bundle.spec.to_json(),
    }


def _text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
