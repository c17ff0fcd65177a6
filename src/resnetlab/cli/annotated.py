"""`resnetlab detect` and `resnetlab segment`: `train`, and the commands of all tasks restricted to one.

The task is in the model file, so `detect predict` is `predict` without the options of classifiers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from resnetlab.cli import console
from resnetlab.cli.evaluate import CLASSIFIER_EVALUATION, evaluate, print_box_classes, print_mask_classes
from resnetlab.cli.options import Device, Flag, Json, ModelName
from resnetlab.cli.predict import CLASSIFIER_PREDICTION, DETECTOR_OPTIONS, predict, save_overlay
from resnetlab.cli.train import (
    DEFAULT_OPTIONS,
    TrainOptions,
    prepare_run,
    print_json_result,
    print_recipe,
    print_result,
    read_overrides,
)
from resnetlab.errors import UsageError
from resnetlab.formatting import format_count, format_percent, format_split, format_split_of

Decorator = Callable[[Callable[[], None]], Callable[..., None]]


def detect_train(
    data: str | None = None, /, *, options: TrainOptions = DEFAULT_OPTIONS, on_bad_box: str | None = None
) -> None:
    """Train a detector, a Faster R-CNN on a residual network; write a run folder with the model and a report.

    Example: `resnetlab detect train blood-cells --steps 1000`

    Parameters
    ----------
    data
        A folder as a tool wrote it: Pascal VOC's (Annotations/, JPEGImages/), COCO's JSON, YOLO's text files, or an export of
        Roboflow, CVAT, Label Studio, LabelMe or FiftyOne. docs/layouts.md has the list.
    on_bad_box
        stop at an invalid box or image, or skip it: left out, and listed in the run folder.
    """
    if options.show_recipe is not None:
        return print_recipe(options.show_recipe, "detect")
    with prepare_run("detect", options, read_overrides(data, options, {"on_bad_box": on_bad_box}, "detect")) as run:
        result = run()
    if print_json_result(result, options):
        return None
    metrics = {
        f"{format_split(result.split)} mAP@.5": result.map_50,
        "mAP@[.5:.95]": result.map,
        "VOC mAP": result.voc_map,
    }
    print_result(result, {name: f"{value:.3f}" for name, value in metrics.items()})
    return print_box_classes(result.per_class, "the report")


def segment_train(
    data: str | None = None, /, *, options: TrainOptions = DEFAULT_OPTIONS, on_bad_mask: str | None = None
) -> None:
    """Train a segmenter, a fully convolutional head on a residual network; write a run folder with the model and a report.

    Example: `resnetlab segment train cells --set head=deeplab`

    Parameters
    ----------
    data
        A folder of images and masks (Pascal VOC's SegmentationClass/, images/ and masks/, CamVid's, Cityscapes'), or one with
        outlines of objects (COCO, YOLO, LabelMe, Label Studio). docs/layouts.md has the list.
    on_bad_mask
        stop at an invalid mask or image, or skip it: left out, and listed in the run folder.
    """
    if options.show_recipe is not None:
        return print_recipe(options.show_recipe, "segment")
    with prepare_run("segment", options, read_overrides(data, options, {"on_bad_mask": on_bad_mask}, "segment")) as run:
        result = run()
    if print_json_result(result, options):
        return None
    wrong = format_percent(result.pixel_error)
    print_result(result, {f"{format_split(result.split)} mean IoU": f"{result.mean_iou:.3f}", "wrong pixels": wrong})
    return print_mask_classes(result.per_class, "the report")


def _restrict(command: Callable[..., None], task: str, hidden: Collection[str]) -> Decorator:
    """Gives a documented stub the code and options of `command`, for models of one task and without the options `hidden`."""

    def decorate(stub: Callable[[], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*models: str, **options: Any) -> None:
            from resnetlab.inference.download import find_model
            from resnetlab.models.annotated_model import check_task

            for model in models[:1]:  # `predict` has images after it
                check_task(Path(find_model(model)), task)
            command(*models, **options)

        signature = inspect.signature(command, eval_str=True)
        parameters = [p for name, p in signature.parameters.items() if name not in hidden]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        _, heading, documented = (inspect.getdoc(command) or "").partition("Parameters\n")
        run.__doc__ = f"{inspect.getdoc(stub)}\n\n{heading}{documented}"
        return run

    return decorate


@_restrict(evaluate, "detect", CLASSIFIER_EVALUATION)
def detect_evaluate() -> None:
    """Evaluate a detector, or several as an ensemble: mean average precision by COCO's and Pascal VOC's rules, per class.

    Example: `resnetlab detect evaluate runs/blood-cells/model.safetensors --data blood-cells`
    """


@_restrict(evaluate, "segment", CLASSIFIER_EVALUATION | DETECTOR_OPTIONS)
def segment_evaluate() -> None:
    """Evaluate a segmenter: intersection over union of each class and their mean, on images at their own size.

    Example: `resnetlab segment evaluate runs/cells/model.safetensors --data cells`
    """


@_restrict(predict, "detect", CLASSIFIER_PREDICTION)
def detect_predict() -> None:
    """Find objects in images; print JSON, and write each image with its boxes as a PNG.

    Example: `resnetlab detect predict runs/blood-cells/model.safetensors smear.jpg --out found`

    An unreadable image gives an entry with the reason; the others are still predicted, and the exit code is 1.
    """


@_restrict(predict, "segment", CLASSIFIER_PREDICTION | DETECTOR_OPTIONS | {"min_score"})
def segment_predict() -> None:
    """Segment images; print each class's fraction as JSON, and write each image tinted by class as a PNG.

    Example: `resnetlab segment predict runs/cells/model.safetensors smear.jpg --out found`

    An unreadable image gives an entry with the reason; the others are still predicted, and the exit code is 1.
    """


def export_annotated(model: Path, /, *images: str, out: Path | None = None, json: Json = False) -> None:
    """Export a detector or segmenter as an ONNX graph, and check it: agreement with PyTorch and largest difference on images.

    Parameters
    ----------
    model
        A detector's or segmenter's model file.
    images
        Images, or folders of images, that the graph is checked on.
    out
        The file to write, ending in .onnx; by default the model's name with .onnx.
    """
    from resnetlab.data.decode import find_image_files
    from resnetlab.inference.annotated import open_annotated_model, read_pixels
    from resnetlab.inference.annotated_export import export_annotated as export_graph
    from resnetlab.models.annotated_model import read_task
    from resnetlab.run_folder import check_output_file

    out = out or model.with_suffix(".onnx")
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: the file name must end in .onnx.")
    check_output_file(out, [model, *images])
    opened = open_annotated_model(model, read_task(model), "fp32", "cpu")
    parity = export_graph(opened.model, out, [read_pixels(file) for file in find_image_files(map(Path, images))])
    rate, largest = parity.agreement.rate, parity.agreement.largest_difference
    if json:
        figures = {"images": parity.n, "agreement": rate, "largest_difference": largest}
        return console.print_json({"model": str(model), "file": str(out), "to": "onnx"} | figures)
    unit = "pixels" if opened.model.task == "detect" else "of a score"
    console.write_line(f"{out}: on {format_count(parity.n, 'image')} {format_percent(rate)} agreement with PyTorch,")
    return console.write_line(f"largest difference {largest:.2g} {unit}")


@_restrict(export_annotated, "detect", ())
def detect_export() -> None:
    """Export a detector as an ONNX graph, and check it: agreement with PyTorch and largest difference on images.

    Example: `resnetlab detect export runs/cells/model.safetensors JPEGImages --out cells.onnx`
    """


@_restrict(export_annotated, "segment", ())
def segment_export() -> None:
    """Export a segmenter as an ONNX graph, and check it: agreement with PyTorch and largest difference on images.

    Example: `resnetlab segment export runs/cells/model.safetensors JPEGImages --out cells.onnx`
    """


def detect_localise(
    model: ModelName,
    /,
    *,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    device: Device = "auto",
    json: Flag = False,
) -> None:
    """Compare a classifier's Grad-CAM boxes with true boxes: how well it localises objects without training on boxes.

    Example: `resnetlab detect localise runs/photos/model.safetensors --data boxes --out places`

    Parameters
    ----------
    data
        A folder in Pascal VOC's format or with COCO's JSON. If classes have the model's names, only boxes of the predicted
        class count.
    split
        test (the split to evaluate on, whatever its name is), train, or any other split of the data.
    out
        Folder for images with the predicted and true boxes, NAME.place.png; by default none are written.
    json
        Print the metrics as one JSON document, with one row per image.
    """
    from resnetlab.inference.localization import IOU_THRESHOLD, localize_objects
    from resnetlab.inference.predict import load

    with console.ProgressBar("images") as bar:
        split, results = localize_objects(load(model, device=device), data, split, bar.update)
    if out is not None:
        for result in results:
            save_overlay(result.draw(), out, result.image.file.stem, "place")
    n, ious = len(results), [result.iou for result in results]
    error, mean_iou = sum(iou < IOU_THRESHOLD for iou in ious) / n, sum(ious) / n
    if json:
        about = {"model": model, "data": str(data), "split": split, "n": n}
        return console.print_json(
            about | {"localisation_error": error, "mean_iou": mean_iou, "images": [r.to_json() for r in results]}
        )
    console.write_line(f"{model} on {format_split_of(split, str(data))}, {format_count(n, 'image')} with boxes")
    return console.write_line(
        f"localisation error {format_percent(error)} (IoU with every true box below .5), mean IoU with the nearest "
        f"{mean_iou:.3f}"
    )
