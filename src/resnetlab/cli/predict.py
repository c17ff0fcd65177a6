"""`resnetlab predict`."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from resnetlab.cli import console
from resnetlab.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from resnetlab.inference.annotated import AnnotatedPrediction, Detector, Segmenter
    from resnetlab.inference.images import ImageInput
    from resnetlab.inference.predict import Model, Prediction

CLASSIFIER_PREDICTION = {"top", "backend", "calibrate"}  # options that only classifiers have
DETECTOR_OPTIONS = {"scales", "refine"}


def predict(
    model: str,
    /,
    *images: Annotated[str, Parameter(allow_leading_hyphen=True)],  # "-" is standard input
    top: int | None = None,
    format: Literal["table", "csv", "json", "jsonl"] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    out: Path | None = None,
    score: float | None = None,
    scales: str | None = None,
    refine: bool = False,
    backend: str = "auto",
    precision: str = "auto",
    calibrate: Path | None = None,
    device: str = "auto",
) -> None:
    """Predict images: classes of a classifier, boxes of a detector, masks of a segmenter, for files, folders or stdin (-).

    Example: `resnetlab predict runs/digits/model.safetensors three.png --top 3`

    An image that cannot be read gives a line with the reason; the others are still predicted, and the exit code is 1.

    Parameters
    ----------
    model
        A model file, or a published name such as torchvision:resnet50.IMAGENET1K_V2.
    images
        Images, folders of images (of any number: they stream), tables that name images, or - for one image on standard input.
    top
        How many classes to show for each image; 5 by default.
    format
        table, csv (one line for each image and rank), json (one document) or jsonl (one JSON object a line). Boxes and masks
        are printed as json or jsonl.
    json
        The same as --format json.
    out
        Folder for images with the boxes (NAME.boxes.png) or tinted by class (NAME.mask.png); by default none are written.
    score
        Minimum score of a box; 0.5 by default.
    scales
        Multi-scale testing of a detector (2015, appendix B): shorter sides in pixels, such as 240,300,360; each region uses
        the two that suit it best.
    refine
        Refine and vote a detector's boxes (2015, appendix B).
    backend
        torch, onnxruntime or openvino; auto takes the fastest installed one that agrees with torch on the model's check
        images, or torch in fp32 for at most 64 images. It is reported on standard error.
    precision
        fp32, bf16 or int8; auto is bf16 if the hardware supports it and the backend agrees, else fp32. For boxes and masks
        auto is fp32.
    calibrate
        A folder of images to calibrate int8 on, instead of the training images in the model file.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU if there is one. On a GPU the backend is torch.
    """
    from resnetlab.inference.backends import FEW_IMAGES, check_backend_request
    from resnetlab.inference.open_model import open_model
    from resnetlab.inference.predict import Model
    from resnetlab.models.annotated_model import TASK_NOUNS

    if not images:
        raise UsageError("predict needs images: files, folders, or - for standard input.")
    if not all(image.strip() for image in images):
        raise UsageError(
            "the name of an image is empty; give a file, a folder (. is this one), or - for standard input."
        )
    if images.count("-") > 1:
        raise UsageError("- reads one image from standard input; give it once.")
    if top is not None and top < 1:
        raise UsageError(f"--top must be 1 or more, not {top}.")
    if json and format not in (None, "json"):
        raise UsageError(f"--json and --format {format} contradict each other; give one of them.")
    check_backend_request(backend, precision)
    if calibrate is not None and not calibrate.is_dir():
        raise DataError(f"{calibrate} is not a folder; --calibrate takes a folder of images.")
    opened = open_model(model, backend=backend, precision=precision, device=device)
    inputs = _expand_inputs(images)
    output = "json" if json else format
    if not isinstance(opened, Model):
        console.refuse_options(
            TASK_NOUNS[opened.model.task], {"top": top is not None, "calibrate": calibrate is not None}
        )
        if output in ("table", "csv"):
            raise UsageError(f"--format {output} is for classes; boxes and masks are printed as json or jsonl.")
        return _report(
            _predict_annotated(configure_detector(opened, scales, refine, score), inputs, out), output or "json"
        )
    detector_options = {
        "out": out is not None,
        "score": score is not None,
        "scales": scales is not None,
        "refine": refine,
    }
    console.refuse_options("a classifier", detector_options)
    first = list(islice(inputs, FEW_IMAGES + 1))
    console.log(f"backend: {_select_model_backend(opened, backend, precision, calibrate, first)}")
    with console.ProgressBar("images") as bar:
        predictions = opened.named_predictions(chain(first, inputs), top=top or 5)
        if len(first) > FEW_IMAGES:
            predictions = _with_progress(predictions, bar)
        return _report(predictions, output or "table")


def _report(predictions: Iterator[Any], format: str) -> None:
    """Prints predictions as they come; raises DataError at the end if an image could not be read."""
    done, failed, reason = _print_predictions(predictions, format)
    if failed:
        raise DataError(f"{failed:,} of {done:,} images could not be read. The first: {reason}")


def configure_detector(
    predictor: Detector | Segmenter, scales: str | None, refine: bool, score: float | None = None
) -> Detector | Segmenter:
    """Applies the options of a detector; raises UsageError if a segmenter gets one."""
    from resnetlab.inference.annotated import Detector
    from resnetlab.models.head_spec import DetectionOptions

    if not isinstance(predictor, Detector):
        options = {"score": score is not None, "scales": scales is not None, "refine": refine}
        console.refuse_options("a segmenter", options)
        return predictor
    min_score = predictor.min_score if score is None else score
    if not 0 <= min_score <= 1:
        raise UsageError(f"--score must be from 0 to 1, not {min_score}.")
    try:
        sides = tuple(int(part) for part in scales.split(",")) if scales else ()
    except ValueError:
        raise UsageError(
            f"--scales takes comma-separated whole numbers, such as 240,300,360, not {scales!r}."
        ) from None
    return replace(predictor, options=DetectionOptions(sides, refine), min_score=min_score)


def _predict_annotated(
    predictor: Detector | Segmenter, inputs: Iterable[tuple[str, ImageInput | DataError]], out: Path | None
) -> Iterator[AnnotatedPrediction]:
    """Predicts boxes or masks; writes each image with them into `out`."""
    for prediction in predictor.predictions(inputs):
        if out is None or prediction.overlay is None:
            yield prediction
        else:
            path = save_overlay(prediction.overlay, out, Path(prediction.name).stem, predictor.overlay_suffix)
            yield replace(prediction, result=prediction.result | {"drawn": str(path)})


def save_overlay(overlay: Image.Image, out: Path, stem: str, suffix: str) -> Path:
    """Writes an overlay under an unused name: two folders may hold images of one name. Raises RunError if it cannot."""
    from resnetlab.run_folder import write_error

    number = 1
    while (file := out / f"{stem}{'' if number == 1 else f'-{number}'}.{suffix}.png").exists():
        number += 1
    try:
        out.mkdir(parents=True, exist_ok=True)
        overlay.save(file)
    except OSError as error:
        raise write_error(file, error) from error
    return file


def _expand_inputs(images: Sequence[str]) -> Iterator[tuple[str, ImageInput | DataError]]:
    """Yields (name, image or error) of all inputs; folders are listed lazily."""
    from resnetlab.data.decode import list_images
    from resnetlab.data.tables import is_table, list_table_images

    for image in images:
        if image == "-":
            yield image, sys.stdin.buffer.read()
            continue
        for found in list_table_images(image) if is_table(image) else list_images(Path(image)):
            yield (image if isinstance(found, DataError) else str(found)), found


def _select_model_backend(
    model: Model,
    backend: str,
    precision: str,
    calibrate: Path | None,
    first: Sequence[tuple[str, ImageInput | DataError]],
) -> str:
    """Selects the model's backend and returns its description; `first` are the first images."""
    from resnetlab.data.decode import find_image_files

    images = [image for _, image in first[:16] if not isinstance(image, DataError)]
    calibration = list(islice(find_image_files([calibrate]), 256)) if calibrate is not None else ()
    return model.select_backend(backend, precision, images, calibration, len(first))


def _with_progress(predictions: Iterator[Prediction], bar: console.ProgressBar) -> Iterator[Prediction]:
    for done, prediction in enumerate(predictions, 1):
        if done % 64 == 0:
            bar.update(done, None)
        yield prediction


def _print_predictions(predictions: Iterator[Prediction], format: str) -> tuple[int, int, str | None]:
    """Prints predictions as they come; returns their number, the number of errors, and the first error."""
    done = failed = 0
    reason = None
    write, end = {"table": _table_writer, "csv": _csv_writer, "json": _json_writer, "jsonl": _jsonl_writer}[format]()
    for p in predictions:
        done += 1
        if p.error is not None:
            failed, reason = failed + 1, reason or p.error
        write(p)
        if done % 64 == 0:
            sys.stdout.flush()
    end()
    return done, failed, reason


Writer = tuple["Callable[[Prediction], object]", Callable[[], object]]  # writes a prediction; ends the output


def _csv_writer() -> Writer:
    writer = csv.writer(sys.stdout)
    writer.writerow(("image", "rank", "class", "score", "error"))

    def write(p: Prediction) -> None:
        rows = (
            [(p.name, "", "", "", p.error)] if p.error else [(p.name, i, c, s, "") for i, (c, s) in enumerate(p.top, 1)]
        )
        writer.writerows(rows)

    return write, lambda: None


def _json_writer() -> Writer:
    from json import dumps

    separator = '{\n  "predictions": ['

    def write(p: Prediction) -> None:
        nonlocal separator
        print(f"{separator}\n    {dumps(p.to_json(), allow_nan=False)}", end="")
        separator = ","

    return write, lambda: print("\n  ]\n}" if separator == "," else separator + "]\n}")


def _jsonl_writer() -> Writer:
    from json import dumps

    return lambda p: print(dumps(p.to_json(), allow_nan=False)), lambda: None


def _table_writer() -> Writer:
    """The first hundred rows determine the column widths; later ones are printed as they come."""
    rows: list[tuple[str, str]] = []
    width = 0

    def begin() -> None:
        nonlocal width
        width = max((len(name) for name, _ in rows), default=0)
        console.print_table("", ("image", "classes and scores"), rows)

    def write(p: Prediction) -> None:
        row = (p.name, p.error or "  ".join(f"{name} {score:.1%}" for name, score in p.top))
        if width:
            print(f"{row[0]:<{width}}  {row[1]}")
            return
        rows.append(row)
        if len(rows) == 100:
            begin()

    return write, lambda: None if width else begin()
