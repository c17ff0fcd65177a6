"""Exports a model to a file for other programs, and checks it before the file gets its name.

FILE.json describes the input and its preprocessing, FILE.parity.json is the parity report.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from resnetlab.device import standard_torch_state
from resnetlab.errors import DataError, ModelFileError, RunError, UsageError, missing_package, unknown_name_error
from resnetlab.formatting import format_count, format_json
from resnetlab.inference.export_graphs import PIXELS, ExportGraphs
from resnetlab.inference.formats import FORMATS, ExportFormat, get_format
from resnetlab.inference.outputs import PARITY_BOUNDS, SCORES
from resnetlab.inference.parity_check import ParityReport, check_parity
from resnetlab.models.model_file import TrainedModel
from resnetlab.progress import log
from resnetlab.run_folder import move_into_place, temporary_folder, write_error, writing


def check_export_request(target: str, precision: str, out: Path) -> None:
    """Raises UsageError for an impossible export, before anything is loaded."""
    format = get_format(target)
    if precision not in PARITY_BOUNDS:
        raise unknown_name_error("precision", precision, PARITY_BOUNDS)
    if precision not in format.precisions:
        others = [name for name, each in FORMATS.items() if precision in each.precisions]
        hint = f"; {precision} is written by --to {' or '.join(others)}." if others else "."
        raise UsageError(f"--to {target} writes {' or '.join(format.precisions)}, not {precision}{hint}")
    if out.suffix not in format.suffixes:
        raise UsageError(f"--out {out}: a file for {target} ends in {' or '.join(format.suffixes)}.")
    if missing := format.missing_packages():
        raise missing_package(f"--to {target}", missing[0], format.extra)


@standard_torch_state()
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
        target: a name in FORMATS whose files can be read back.
        check_images: for the parity check, each uint8 (H, W, C) at its own size.
        calibration_images: other images for int8, resized and cropped, uint8 (M, h, w, C).

    Raises:
        UsageError: as `check_export_request`, or int8 without images.
        DataError: there is no image for the parity check.
        ModelFileError: the file's scores differ from the network's beyond the bound.
        RunError: the file cannot be written.
    """
    check_export_request(target, precision, out)
    format = get_format(target)
    assert format.read is not None
    if not len(check_images):
        raise DataError("there is no readable image to check the export on; give some with --data or --images.")
    if precision == "int8" and (calibration_images is None or not len(calibration_images)):
        raise UsageError(
            "int8 is calibrated on other images than those of the parity check, and there are none; give more images."
        )
    with writing(out), temporary_folder(out.parent, ".export-") as folder:
        file = folder / out.name
        format.write(ExportGraphs(model, calibration_images), precision, file)
        parity = check_parity(model, format.read(file), check_images, precision)
        if not parity.passed:
            least, largest = PARITY_BOUNDS[precision]
            raise ModelFileError(
                f"{out} was not written: {parity.agreement}, on {format_count(parity.n, 'image')}; "
                f"{precision} must agree on {least:.0%} and within {largest:g}."
            )
        description = describe_export(model, target, precision)
        description |= check_providers(model, format, file, check_images, precision)
        for ending, value in ((".json", description), (".parity.json", parity.to_json())):
            file.with_name(out.name + ending).write_text(format_json(value) + "\n", "utf-8")
        _replace_files(folder, out)
    return parity


def check_providers(
    model: TrainedModel, format: ExportFormat, file: Path, check_images: Sequence[Tensor], precision: str
) -> dict[str, Any]:
    """What else the format's runtime computes the file on: settings, and the agreement where it is here; as in docs/json.md."""
    providers = []
    for name, settings in format.providers.items():
        entry: dict[str, Any] = {"name": name, "settings": dict(settings), "checked": None}
        try:
            predict = format.read_on(file, name)
            if predict is not None:
                parity = check_parity(model, predict, check_images, precision).to_json()
                keys = ("n", "top1_agreement", "largest_difference", "bound")
                entry["checked"] = {key: parity[key] for key in keys}
        except Exception as error:  # its own, of many kinds; the file itself agrees
            log(f"{name} does not run {file.name} here: {str(error).strip().partition(chr(10))[0]}")
        providers.append(entry)
    return {"providers": providers} if providers else {}


def _replace_files(folder: Path, out: Path) -> None:
    """Moves the files of an export to `out` and beside it.

    `out` goes first and comes last, so a crash never leaves it beside the weights or the proof of another export.

    Raises RunError, and leaves no file of the export, if one cannot be moved.
    """
    names = sorted((file.name for file in folder.iterdir() if file.name != ".lock"), key=lambda name: name == out.name)
    targets = [out.with_name(name) for name in names]
    for target in targets:
        if target.exists() and not target.is_file():
            raise RunError(f"cannot write {target}: it is no file; move it away, or choose another name with --out.")
    out.unlink(missing_ok=True)
    moved: list[Path] = []
    try:
        for target in targets:
            move_into_place(folder / target.name, target)
            moved.append(target)
    except OSError as error:
        for done in moved:
            done.unlink(missing_ok=True)
        raise write_error(target, error) from error


def export_weights(model: TrainedModel, target: str, out: Path) -> list[str]:
    """Writes a format that has only weights; returns notes on what the programs that read it compute differently."""
    check_export_request(target, "fp32", out)
    format = get_format(target)
    format.write(ExportGraphs(model), "fp32", out)
    return format.notes(model)


def describe_export(model: TrainedModel, target: str, precision: str) -> dict[str, Any]:
    """Describes how to use the file; keys as in docs/json.md."""
    preprocessing, settings = model.preprocessing, get_format(target).settings
    h, w, c = (*preprocessing.size, preprocessing.channels)
    kind = f"convert it to {'grey' if c == 1 else 'RGB'}, values 0 to 255"
    if preprocessing.dtype:
        kind = f"take the values of its {format_count(c, 'channel')} as stored ({preprocessing.dtype}), as float32"
    return {
        "format": target,
        "precision": precision,
        "input": {
            "name": PIXELS,
            "type": "float32" if preprocessing.dtype else "uint8",
            "shape": ["batch", "height", "width", c],
            "channels": preprocessing.dtype or ("grey" if c == 1 else "RGB"),
        },
        "output": {"name": SCORES.name, "type": "float32", "shape": ["batch", len(model.classes)]},
        "prepare": {
            "resize": preprocessing.resize,
            "interpolation": preprocessing.interpolation,
            "crop": [h, w],
            "description": f"Apply the image's EXIF orientation and {kind}, at its own size; the images of a batch have one "
            f"size. The file resizes them ({preprocessing.interpolation}, antialiased) so that the shorter side has "
            f"{preprocessing.resize} pixels, crops the centre {w}x{h}, normalises, and returns calibrated scores.",
        },
        "classes": list(model.classes),
        "specification": model.net.spec.to_json(),
    } | ({"settings": dict(settings)} if settings else {})
