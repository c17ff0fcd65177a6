"""`resnetlab predict`."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import select
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TextIO, cast

from cyclopts import Parameter

from resnetlab.cli import console
from resnetlab.errors import DataError, UsageError
from resnetlab.stopping import check_stop

if TYPE_CHECKING:
    from PIL import Image

    from resnetlab.inference.annotated import AnnotatedPrediction, Detector, Segmenter
    from resnetlab.inference.images import ImageInput
    from resnetlab.inference.predict import Model, Prediction

OUTPUT_SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".txt": "table"}
CLASSIFIER_PREDICTION = {"top", "backend", "calibrate", "sort_into", "protocol"}  # options that only classifiers have
DETECTOR_OPTIONS = {"scales", "refine"}


def predict(
    model: str,
    /,
    *images: Annotated[str, Parameter(allow_leading_hyphen=True)],  # "-" is standard input
    top: int | None = None,
    format: Literal["table", "csv", "json", "jsonl"] | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
    out: Path | None = None,
    min_score: Annotated[float | None, Parameter(name=("--min-score", "--score"))] = None,
    sort_into: Path | None = None,
    protocol: str | None = None,
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
        A model file, a run folder, or a published name such as torchvision:resnet50.IMAGENET1K_V2.
    images
        Images, folders of images (of any number: they stream), patterns such as 'photos/*.jpg', addresses (https://…), tables
        that name images, or - for one image on standard input. Names that begin with - come after --.
    top
        How many classes to show for each image; 5 by default.
    format
        table, csv (one line for each image and rank), json (one document) or jsonl (one JSON object a line). Boxes and masks
        are printed as json or jsonl.
    json
        The same as --format json.
    out
        A file for the predictions, .csv, .json, .jsonl, .parquet or .txt, in place of standard output. Or, for boxes and masks,
        a folder for the images with the boxes (NAME.boxes.png) or tinted by class (NAME.mask.png).
    min_score
        Show no class or box with a lower score; 0.5 by default for boxes.
    sort_into
        Copy each image into FOLDER/CLASS by its best class, into FOLDER/unsure if that has less than --min-score.
    protocol
        Views of each image whose scores are averaged, as in `evaluate`: flip, 10crop, dense:320, …; computed by torch.
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
    from resnetlab.inference.backends import check_backend_request
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
    if min_score is not None and not 0 <= min_score <= 1:
        raise UsageError(f"--min-score must be from 0 to 1, not {min_score}.")
    console.check_order("predict", model, images)
    check_backend_request(backend, precision)
    if calibrate is not None and not calibrate.is_dir():
        raise DataError(f"{calibrate} is not a folder; --calibrate takes a folder of images.")
    opened = open_model(model, backend=backend, precision=precision, device=device)
    inputs, output = _expand_inputs(images), "json" if json else format
    file = out if out is not None and out.suffix in OUTPUT_SUFFIXES else None
    with open_output(file, output, images) as (stream, by_suffix):
        if not isinstance(opened, Model):
            options = {"top": top is not None, "calibrate": calibrate is not None}
            options |= {"sort_into": sort_into is not None, "protocol": protocol is not None}
            console.refuse_options(TASK_NOUNS[opened.model.task], options)
            chosen = by_suffix or output or "json"
            if chosen not in ("json", "jsonl"):
                raise UsageError(f"--format {chosen} is for classes; boxes and masks are printed as json or jsonl.")
            detector = configure_detector(opened, scales, refine, min_score)
            return _report(_predict_annotated(detector, inputs, None if file else out), chosen, stream)
        if out is not None and file is None:
            raise UsageError(f"--out takes a file that ends in {', '.join(OUTPUT_SUFFIXES)}, not {out}.")
        console.refuse_options("a classifier", {"scales": scales is not None, "refine": refine})
        request = ClassRequest(top or 5, min_score or 0.0, sort_into, protocol, (backend, precision, calibrate))
        with console.ProgressBar("images") as bar:
            return _report(_predict_classes(opened, inputs, request, bar), by_suffix or output or "table", stream)


class ClassRequest(NamedTuple):
    """What is asked of a classifier's predictions; `backend` is its name, precision and the folder to calibrate on."""

    top: int
    min_score: float
    sort_into: Path | None
    protocol: str | None
    backend: tuple[str, str, Path | None]


def _predict_classes(
    model: Model, inputs: Iterator[tuple[str, ImageInput | DataError]], request: ClassRequest, bar: console.ProgressBar
) -> Iterator[Prediction]:
    """Predicts classes, with the backend that is asked for, and sorts the images."""
    from resnetlab.inference.backends import FEW_IMAGES

    if request.protocol is not None and request.backend[0] not in ("auto", "torch"):
        raise UsageError("--protocol is computed by torch; leave out --backend.")
    first = list(islice(inputs, FEW_IMAGES + 1))
    if request.protocol is None:
        console.log(f"backend: {_select_model_backend(model, *request.backend, first)}")
    predictions = model.named_predictions(chain(first, inputs), top=request.top, protocol=request.protocol)
    for done, p in enumerate(predictions, 1):
        if len(first) > FEW_IMAGES and done % 64 == 0:
            bar.update(done, None)
        if request.sort_into is not None and p.error is None:
            _sort_image(p, request.sort_into, request.min_score)
        yield replace(p, top=tuple(each for each in p.top if each.score >= request.min_score))
    if request.sort_into is not None:
        console.log(f"sorted into: {request.sort_into}")


def _sort_image(prediction: Prediction, folder: Path, min_score: float) -> None:
    """Copies an image into the folder of its best class, under an unused name."""
    from resnetlab.run_folder import write_error

    source = Path(prediction.name)
    if not source.is_file():
        raise UsageError(f"--sort-into copies files, and {prediction.name} is none.")
    label = prediction.label if prediction.score >= min_score else "unsure"
    place = folder / re.sub(r'[/\\:*?"<>|]', "_", label)
    target, number = place / source.name, 1
    while target.exists():
        if target.samefile(source) or target.read_bytes() == source.read_bytes():
            return  # sorted before
        number += 1
        target = place / f"{source.stem}-{number}{source.suffix}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
    except OSError as error:
        raise write_error(target, error) from error


@contextlib.contextmanager
def open_output(file: Path | None, format: str | None, inputs: Sequence[str]) -> Iterator[tuple[TextIO, str | None]]:
    """The stream for predictions, and the format that the file's ending decides; the file appears when all are written.

    Raises UsageError if the format is another, or the file is one of the inputs; RunError if it cannot be written.
    """
    from resnetlab.run_folder import check_output_file, write_atomically

    if file is None:
        yield sys.stdout, None
        return
    by_suffix = OUTPUT_SUFFIXES[file.suffix]
    if format not in (None, by_suffix):
        raise UsageError(f"--format {format} and --out {file} contradict each other; give one of them.")
    check_output_file(file, [image for image in inputs if image != "-"])
    stream = io.StringIO(newline="")
    written = False
    try:
        yield stream, by_suffix
        written = True
    except DataError:  # images that could not be read have their lines
        written = True
        raise
    finally:
        if written:
            text = stream.getvalue()
            write_atomically(
                file, _to_parquet(text) if by_suffix == "parquet" else text.encode("utf-8", "surrogateescape")
            )
            console.log(f"predictions: {file}")


def _to_parquet(text: str) -> bytes:
    """The rows of a CSV text as a Parquet file."""
    from resnetlab.errors import missing_package

    try:
        import pyarrow
        from pyarrow import csv as arrow_csv
        from pyarrow import parquet
    except ImportError as error:
        raise missing_package("--out FILE.parquet", error.name, "parquet") from error
    types = {
        "image": pyarrow.string(),
        "rank": pyarrow.int64(),
        "class": pyarrow.string(),
        "score": pyarrow.float64(),
        "error": pyarrow.string(),
    }
    table = arrow_csv.read_csv(
        io.BytesIO(text.encode("utf-8", "replace")),
        convert_options=arrow_csv.ConvertOptions(column_types=types),
        parse_options=arrow_csv.ParseOptions(newlines_in_values=True),
    )
    content = io.BytesIO()
    parquet.write_table(table, content)
    return content.getvalue()


def _report(predictions: Iterator[Any], format: str, stream: TextIO) -> None:
    """Prints predictions as they come; raises DataError at the end if an image could not be read."""
    with contextlib.redirect_stdout(stream):
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


def _print_predictions(predictions: Iterator[Prediction], format: str) -> tuple[int, int, str | None]:
    """Prints predictions as they come; returns their number, the number of errors, and the first error."""
    done = failed = 0
    reason = None
    writers = {"table": _table_writer, "csv": _csv_writer, "json": _json_writer, "jsonl": _jsonl_writer}
    write, end = (writers | {"parquet": _csv_writer})[format]()
    for p in predictions:
        check_stop()
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
    if isinstance(sys.stdout, io.TextIOWrapper):  # programs read it, on whatever system
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    writer = csv.writer(sys.stdout)
    writer.writerow(("image", "rank", "class", "score", "error"))
    return lambda p: writer.writerows(p.to_rows()), lambda: None


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
        width = max((len(console.escape_control(name)) for name, _ in rows), default=0)
        console.print_table("", ("image", "classes and scores"), rows)

    def write(p: Prediction) -> None:
        row = (p.name, p.error or "  ".join(f"{name} {score:.1%}" for name, score in p.top))
        if width:
            console.write_line(f"{row[0]:<{width}}  {row[1]}")
            return
        rows.append(row)
        if len(rows) == 100:
            begin()

    return write, lambda: None if width else begin()
