"""`resnetlab predict`."""

from __future__ import annotations

import contextlib
import io
import re
import select
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple, cast

from cyclopts import Parameter

from resnetlab.cli import console
from resnetlab.cli.options import Flag, Refine, Scales
from resnetlab.cli.prediction_output import OUTPUT_SUFFIXES, open_output, report_predictions, write_parts
from resnetlab.errors import DataError, UsageError
from resnetlab.process_place import read_process_place
from resnetlab.stopping import check_stop

if TYPE_CHECKING:
    from PIL import Image

    from resnetlab.inference.annotated import AnnotatedPrediction, Detector, Segmenter
    from resnetlab.inference.images import ImageInput, NamedImage
    from resnetlab.inference.predict import Model, Prediction

CLASSIFIER_PREDICTION = {"top", "backend", "calibrate", "sort_into", "protocol"}  # options that only classifiers have
DETECTOR_OPTIONS = {"scales", "refine"}


def predict(
    model: str,
    /,
    *images: Annotated[str, Parameter(allow_leading_hyphen=True)],  # "-" is standard input
    top: int | None = None,
    format: Literal["table", "csv", "json", "jsonl", "parquet"] | None = None,
    json: Flag = False,
    out: Path | None = None,
    parts: Path | None = None,
    min_score: Annotated[float | None, Parameter(name=("--min-score", "--score"))] = None,
    sort_into: Path | None = None,
    protocol: str | None = None,
    scales: Scales = None,
    refine: Refine = False,
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
        A model file, a run folder, or a published name such as torchvision:resnet50.IMAGENET1K_V2.
    images
        Images, folders of images (of any number: they stream), patterns such as 'photos/*.jpg', addresses (https://…), tables
        that name images, tar shards, or - for one image on standard input. Names that begin with - come after --.
    top
        How many classes to show for each image; 5 by default.
    format
        table, csv (one line for each image and rank), json (one document) or jsonl (one JSON object a line); parquet for
        --out and --parts. Boxes and masks are printed as json or jsonl.
    json
        The same as --format json.
    out
        A file for the predictions, .csv, .json, .jsonl, .parquet or .txt, in place of standard output. Or, for boxes and masks,
        a folder for the images with the boxes (NAME.boxes.png) or tinted by class (NAME.mask.png).
    parts
        A folder for the predictions in parts, jsonl or (--format parquet) Parquet: processes that torchrun starts share the
        images, and what was stopped goes on when it is started again.
    min_score
        Show no class or box with a lower score; 0.5 by default for boxes.
    sort_into
        Copy each image into FOLDER/CLASS by its best class, into FOLDER/unsure if that has less than --min-score.
    protocol
        Views of each image whose scores are averaged, as in `evaluate`: flip, 10crop, dense:320, …; computed by torch.
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
    from resnetlab.inference.prediction_parts import PartFolder, hash_weights
    from resnetlab.models.annotated_model import TASK_NOUNS

    output = "json" if json and format is None else format
    _check_options(model, images, top, min_score)
    if json and output != "json":
        raise UsageError(f"--json and --format {format} contradict each other; give one of them.")
    console.check_order("predict", model, images)
    file = out if out is not None and out.suffix in OUTPUT_SUFFIXES else None
    _check_copies(sort_into or (None if file else out), images)
    check_backend_request(backend, precision, calibrate)
    check_parts(parts, output, out, images)
    console.refuse_missing_images(model, images)
    opened = open_model(model, backend=backend, precision=precision, device=_own_device(device))
    inputs = _expand_inputs(images)
    with open_output(file, output, images) as (stream, by_suffix):
        if not isinstance(opened, Model):
            options = {"top": top is not None, "calibrate": calibrate is not None}
            options |= {"sort_into": sort_into is not None, "protocol": protocol is not None}
            console.refuse_options(TASK_NOUNS[opened.model.task], options)
            chosen = by_suffix or output or ("json" if parts is None else "jsonl")
            if chosen not in ("json", "jsonl"):
                raise UsageError(f"--format {chosen} is for classes; boxes and masks are printed as json or jsonl.")
            detector = configure_detector(opened, scales, refine, min_score)
            predict_annotated = partial(_predict_annotated, detector, out=None if file else out)
            if parts is None:
                return report_predictions(predict_annotated(inputs), chosen, stream)
            about = {
                "min_score": min_score,
                "scales": scales,
                "refine": refine,
                "weights": hash_weights(opened.model.net),
            }
            return write_parts(PartFolder.open(parts, ".jsonl", about), inputs, predict_annotated)
        if out is not None and file is None:
            raise UsageError(f"--out takes a file that ends in {', '.join(OUTPUT_SUFFIXES)}, not {out}.")
        console.refuse_options("a classifier", {"scales": scales is not None, "refine": refine})
        request = ClassRequest(top, min_score or 0.0, sort_into, protocol, (backend, precision, calibrate))
        if parts is not None:
            return _predict_class_parts(opened, images, request, parts, output or "jsonl")
        with console.ProgressBar("images") as bar:
            first = list(islice(inputs, FEW_IMAGES + 1))
            _choose_backend(opened, request, first)
            shown_bar = bar if len(first) > FEW_IMAGES else None
            predictions = _predict_classes(opened, chain(first, inputs), request, shown_bar)
            return report_predictions(predictions, by_suffix or output or "table", stream)


def _check_options(model: str, images: Sequence[str], top: int | None, min_score: float | None) -> None:
    from resnetlab.inference.download import find_model

    if not images:
        find_model(model)  # raises if that is an image
        raise UsageError("predict needs images: files, folders, or - for standard input.")
    if not all(image.strip() for image in images):
        raise UsageError(
            "the name of an image is empty; give a file, a folder (. is this one), or - for standard input."
        )
    if images.count("-") > 1:
        raise UsageError("- reads one image from standard input; give it once.")
    if top is not None and top < 1:
        raise UsageError(f"--top must be 1 or more, not {top}.")
    if min_score is not None and not 0 <= min_score <= 1:
        raise UsageError(f"--min-score must be from 0 to 1, not {min_score}.")


class ClassRequest(NamedTuple):
    """What is asked of a classifier's predictions; `backend` is its name, precision and the folder to calibrate on."""

    top: int | None
    min_score: float
    sort_into: Path | None
    protocol: str | None
    backend: tuple[str, str, Path | None]


def _check_copies(folder: Path | None, images: Sequence[str]) -> None:
    """Raises UsageError where copies would be written among the images, and be predicted with them the next time.

    Raises RunError where the folder cannot be written.
    """
    from resnetlab.run_folder import check_output_folder

    check_output_folder(folder)
    for image in images:
        if folder is not None and Path(image).is_dir() and folder.resolve().is_relative_to(Path(image).resolve()):
            raise UsageError(f"{folder} is in {image}, whose images are predicted; name a folder that is not.")


def check_parts(parts: Path | None, format: str | None, out: Path | None, images: Sequence[str]) -> None:
    """Raises UsageError where options contradict each other, or several processes would all predict every image."""
    if parts is None:
        if (n := read_process_place().size) > 1:
            raise UsageError(f"{n:,} processes share the images only with --parts FOLDER; give one.")
        if format == "parquet" and (out is None or out.suffix != ".parquet"):
            raise UsageError("Parquet is not printed; give --out FILE.parquet, or --parts FOLDER.")
        return
    if format not in (None, "jsonl", "parquet"):
        raise UsageError(f"parts are jsonl or parquet, not {format}.")
    if out is not None and out.suffix in OUTPUT_SUFFIXES:
        raise UsageError(f"--parts {parts} and --out {out} are both for the predictions; give one of them.")
    if "-" in images:
        raise UsageError("standard input cannot be read again, as --parts must; give files or folders.")


def _own_device(device: str) -> str:
    """The device of this process: one GPU for each process of a machine."""
    place = read_process_place()
    if place.size == 1 or device not in ("auto", "cuda"):
        return device
    import torch

    gpus = torch.cuda.device_count()
    return f"cuda:{place.local_rank % gpus}" if gpus else device


def _predict_class_parts(model: Model, images: Sequence[str], request: ClassRequest, parts: Path, format: str) -> None:
    """Predicts this process's missing parts, all with the backend that the first process has chosen."""
    from resnetlab.inference.backends import FEW_IMAGES
    from resnetlab.inference.prediction_parts import PartFolder, hash_weights

    _choose_backend(model, request, list(islice(_expand_inputs(images), FEW_IMAGES + 1)))
    about = {"top": request.top or model.default_top, "min_score": request.min_score, "protocol": request.protocol}
    about |= {"format": format, "backend": model.backend_name, "weights": hash_weights(model.net)}
    folder = PartFolder.open(parts, f".{format}", about)
    name, precision = str(folder.request["backend"]).split()
    if model.backend_name != f"{name} {precision}":
        model.select_backend(name, precision)
    write_parts(folder, _expand_inputs(images), partial(_predict_classes, model, request=request))


def _choose_backend(model: Model, request: ClassRequest, first: Sequence[NamedImage]) -> None:
    """Selects the backend that is asked for, unless a protocol is computed; `first` are the first images."""
    if request.protocol is None:
        return choose_backend(model, request.backend, first)
    backend, precision, calibrate = request.backend
    if backend not in ("auto", "torch") or precision not in ("auto", "fp32") or calibrate is not None:
        raise UsageError("--protocol is computed by torch in fp32; leave out --backend, --precision and --calibrate.")
    return None


def choose_backend(
    model: Model, wanted: tuple[str, str, Path | None], first: Sequence[NamedImage], output: str = "scores"
) -> None:
    """Selects the backend of scores or features: name, precision and folder to calibrate on; `first` are the first images."""
    from resnetlab.data.decode import find_image_files

    backend, precision, calibrate = wanted
    images = [image for _, image in first[:16] if not isinstance(image, DataError)]
    calibration = list(islice(find_image_files([calibrate]), 256)) if calibrate is not None else ()
    console.log(f"backend: {model.select_backend(backend, precision, images, calibration, len(first), output)}")


def _predict_classes(
    model: Model, images: Iterable[NamedImage], request: ClassRequest, bar: console.ProgressBar | None = None
) -> Iterator[Prediction]:
    """Predicts classes, and sorts the images."""
    if request.sort_into is not None and model.multi_label:
        raise UsageError(
            "--sort-into puts an image into one folder, but this model gives it several classes; take --out."
        )
    predictions = model.named_predictions(images, top=request.top, protocol=request.protocol)
    for p in predictions if bar is None else bar.count(predictions):
        if request.sort_into is not None and p.error is None:
            _sort_image(p, request.sort_into, request.min_score)
        yield replace(p, top=tuple(each for each in p.top if each.score >= request.min_score))
    if request.sort_into is not None:
        console.log(f"sorted into: {request.sort_into}")


def _sort_image(prediction: Prediction, folder: Path, min_score: float) -> None:
    """Copies an image into the folder of its best class, under an unused name."""
    from resnetlab.inference.predict import UNSURE

    source = Path(prediction.name)
    if not source.is_file():
        raise UsageError(f"--sort-into copies files, and {prediction.name} is none.")
    label = prediction.label if prediction.score >= min_score else UNSURE
    place = folder / re.sub(r'[/\\:*?"<>|]', "_", label)
    target = _write_copy(source.read_bytes(), place, source.stem, source.suffix)
    with contextlib.suppress(OSError):  # of file systems without times or modes
        shutil.copystat(source, target)


def configure_detector(
    predictor: Detector | Segmenter, scales: str | None, refine: bool, score: float | None = None
) -> Detector | Segmenter:
    """Applies the options of a detector; raises UsageError if a segmenter gets one."""
    from resnetlab.inference.annotated import Detector
    from resnetlab.models.head_spec import DetectionOptions

    if not isinstance(predictor, Detector):
        options = {"min_score": score is not None, "scales": scales is not None, "refine": refine}
        console.refuse_options("a segmenter", options)
        return predictor
    min_score = predictor.min_score if score is None else score
    try:
        sides = tuple(int(part) for part in scales.split(",")) if scales else ()
    except ValueError:
        raise UsageError(
            f"--scales takes comma-separated whole numbers, such as 240,300,360, not {scales!r}."
        ) from None
    return replace(predictor, options=DetectionOptions(sides, refine), min_score=min_score)


def _predict_annotated(
    predictor: Detector | Segmenter, inputs: Iterable[NamedImage], out: Path | None
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
    buffer = io.BytesIO()
    overlay.save(buffer, "PNG")
    return _write_copy(buffer.getvalue(), out, stem, f".{suffix}.png")


def _write_copy(content: bytes, folder: Path, stem: str, suffix: str) -> Path:
    """Writes a file STEM.SUFFIX, or STEM-2.SUFFIX, … where that is another one; not again what an earlier start has written."""
    from resnetlab.run_folder import write_atomically, write_error

    file, number = folder / f"{stem}{suffix}", 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while file.exists():
            if file.is_file() and file.read_bytes() == content:
                return file
            number += 1
            file = folder / f"{stem}-{number}{suffix}"
    except OSError as error:
        raise write_error(file, error) from error
    write_atomically(file, content)
    return file


def _expand_inputs(images: Sequence[str]) -> Iterator[tuple[str, ImageInput | DataError]]:
    """Yields (name, image or error) of all inputs; folders are listed lazily."""
    from resnetlab.data.tables import is_table, list_table_images
    from resnetlab.inference.images import expand_images

    for image in images:
        if image == "-":
            yield image, _read_stdin()
        elif is_table(image):
            for found in list_table_images(image):
                yield (image if isinstance(found, DataError) else str(found)), found
        else:
            yield from expand_images(image)


def _read_stdin() -> bytes:
    """All of standard input; a stop is noticed while nothing arrives."""
    file, content = cast(io.BufferedReader, sys.stdin.buffer), bytearray()
    while True:
        with contextlib.suppress(ValueError, OSError):  # nothing that can be waited for: reading it does not wait
            while not select.select([file], [], [], 0.2)[0]:
                check_stop()
        if not (chunk := file.read1(2**20)):
            return bytes(content)
        content += chunk
