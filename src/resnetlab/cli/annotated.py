"""`resnetlab detect` and `resnetlab segment`: `train`, and the commands of all tasks restricted to one.

The task is in the model file, so `detect predict` is `predict` without the options of classifiers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from resnetlab.cli import console, launch
from resnetlab.cli.evaluate import CLASSIFIER_EVALUATION, evaluate, print_box_classes, print_mask_classes
from resnetlab.cli.predict import CLASSIFIER_PREDICTION, DETECTOR_OPTIONS, predict, save_overlay
from resnetlab.cli.train import print_recipe
from resnetlab.errors import UsageError
from resnetlab.formatting import format_duration, format_percent

if TYPE_CHECKING:
    from resnetlab.training.result import TrainResult

Decorator = Callable[[Callable[[], None]], Callable[..., None]]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of both `train` commands.

    Parameters
    ----------
    net
        Network, such as resnet18 or resnet50v1.5.
    recipe
        For a detector boxes (a feature pyramid, small images) or paper-boxes (the 2015 paper's schedule and form), for a
        segmenter masks.
    start_from
        A classifier's model file to start from; by default random weights.
    steps
        Length of the run; the recipe's schedule is rescaled to it, and the result marked as shortened.
    set_
        Changes one value of the recipe or of the network's specification, key=value; may be given several times.
    seed
        Seed of initialisation, order and augmentation.
    out
        Run folder; by default runs/DATA, or runs/DATA-2 and so on.
    device
        cpu, cuda, cuda:1, …; by default a GPU if there is one, and for a resumed run the device that it started on.
    workers
        Processes that decode images; by default none when training on a CPU. The result does not depend on it.
    procs
        Processes on this machine that share every step: one per GPU, or a few on the CPU. On several machines start them
        with torchrun: `torchrun … -m resnetlab detect train …`
    max_restarts
        With --procs: how often the processes are restarted from the last checkpoint after one has died.
    resume
        Continue the run in this folder from its last checkpoint; the result is bit-identical to an uninterrupted run.
    show_recipe
        Print a recipe and its description, and train nothing.
    json
        Print the result as one JSON document.
    """

    net: str | None = None
    recipe: str | None = None
    start_from: str | None = None
    steps: int | None = None
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = ()
    seed: int | None = None
    out: Path | None = None
    device: str | None = None
    workers: int | None = None
    procs: int | None = None
    max_restarts: int = 0
    resume: Path | None = None
    show_recipe: str | None = None
    json: Annotated[bool, Parameter(negative="")] = False


DEFAULT_OPTIONS = TrainOptions()


def detect_train(
    data: str | None = None, /, *, on_bad_box: str | None = None, options: TrainOptions = DEFAULT_OPTIONS
) -> None:
    """Train a detector, a Faster R-CNN on a residual network; write a run folder with the model and a report.

    Example: `resnetlab detect train blood-cells --steps 1000`

    Parameters
    ----------
    data
        A folder in Pascal VOC's format (Annotations/, JPEGImages/, ImageSets/Main/) or with COCO's JSON (train.json, val.json,
        or annotations/instances_train.json and so on).
    on_bad_box
        stop at an invalid box or image, or skip it: left out, and listed in the run folder.
    """
    result = train_annotated("detect", data, options, {"on_bad_box": on_bad_box})
    if result is not None:
        metrics = {f"{result.split} mAP@.5": result.map_50, "mAP@[.5:.95]": result.map, "VOC mAP": result.voc_map}
        _print_result(result, {name: f"{value:.3f}" for name, value in metrics.items()}, options.json)
        if not options.json:
            print_box_classes(result.per_class)


def segment_train(
    data: str | None = None, /, *, on_bad_mask: str | None = None, options: TrainOptions = DEFAULT_OPTIONS
) -> None:
    """Train a segmenter, a fully convolutional head on a residual network; write a run folder with the model and a report.

    Example: `resnetlab segment train cells --set head=deeplab`

    Parameters
    ----------
    data
        A folder in Pascal VOC's format (SegmentationClass/, JPEGImages/, ImageSets/Segmentation/, classes.txt) or with COCO's
        JSON.
    on_bad_mask
        stop at an invalid mask or image, or skip it: left out, and listed in the run folder.
    """
    result = train_annotated("segment", data, options, {"on_bad_mask": on_bad_mask})
    if result is not None:
        wrong = format_percent(result.pixel_error)
        _print_result(
            result, {f"{result.split} mean IoU": f"{result.mean_iou:.3f}", "wrong pixels": wrong}, options.json
        )
        if not options.json:
            print_mask_classes(result.per_class)


def train_annotated(task: str, data: str | None, options: TrainOptions, recipe_values: Mapping[str, str | None]) -> Any:
    """Starts or continues a run and returns its result; None if only a recipe was printed, or another process prints it.

    Args:
        recipe_values: options that are values of the task's recipe.
    """
    from resnetlab.distributed import is_first_process
    from resnetlab.training import recipes
    from resnetlab.training import train as training
    from resnetlab.training.annotated_recipes import DEFAULT_RECIPES
    from resnetlab.training.recipe import Overrides

    if options.show_recipe is not None:
        return print_recipe(options.show_recipe, task)
    if options.workers is not None and options.workers < 0:
        raise UsageError(f"--workers must be 0 or more, not {options.workers}.")
    if options.resume is not None and (options.out is not None or options.recipe is not None):
        raise UsageError(
            "--resume continues a run with its own recipe in its own folder; leave out --out and --recipe."
        )
    if options.resume is None and data is None:
        raise UsageError(f"{task} train needs DATA, a folder; `resnetlab {task} train --help` describes its formats.")
    values = {"start_from": options.start_from, **recipe_values}
    pairs = console.parse_pairs(options.set_) | {key: value for key, value in values.items() if value}

    overrides = Overrides(data=data, net=options.net, steps=options.steps, seed=options.seed, values=pairs)
    run_options = training.RunOptions(device=options.device, workers=options.workers, report=console.log)
    new = None
    if options.resume is None:
        new = overrides.apply(recipes.find_recipe(options.recipe or DEFAULT_RECIPES[task], task))
    if options.procs is not None:
        processes = launch.Processes(options.procs, options.max_restarts)
        return launch.train_in_processes(
            new, options.resume or options.out, run_options, processes, task=task, overrides=overrides
        )
    with console.show_training() as on_progress:
        run_options = replace(run_options, on_progress=on_progress)
        if new is not None:
            result = training.start_run(new, options.out, run_options)
        else:
            assert options.resume is not None
            result = training.resume(options.resume, run_options, task=task, overrides=overrides)
    return result if is_first_process() else None


def _print_result(result: TrainResult, metrics: Mapping[str, str], json: bool) -> None:
    """Prints the result as a table, or as one JSON document."""
    if json:
        return console.print_json(result.to_json())
    duration = format_duration(result.seconds)
    rows = dict(metrics) | ({"budget": result.budget} if result.budget else {})
    rows |= {"trained": f"{result.steps:,} steps in {duration}, {result.images_per_second:.1f} images/s"}
    for name, text in (rows | {"model": result.model, "report": result.report}).items():
        print(f"{name:<18} {text}")
    return print()


def _restrict(command: Callable[..., None], task: str, hidden: Collection[str]) -> Decorator:
    """Gives a documented stub the code and options of `command`, for models of one task and without the options `hidden`."""

    def decorate(stub: Callable[[], None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(*models: str, **options: Any) -> None:
            from resnetlab.models.annotated_model import check_task

            for model in models[:1]:  # `predict` has images after it
                check_task(Path(model), task)
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
    """Evaluate a detector: mean average precision by COCO's and Pascal VOC's rules, per class.

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


@_restrict(predict, "segment", CLASSIFIER_PREDICTION | DETECTOR_OPTIONS | {"score"})
def segment_predict() -> None:
    """Segment images; print each class's fraction as JSON, and write each image tinted by class as a PNG.

    Example: `resnetlab segment predict runs/cells/model.safetensors smear.jpg --out found`

    An unreadable image gives an entry with the reason; the others are still predicted, and the exit code is 1.
    """


def export_annotated(
    model: Path, /, *images: str, out: Path | None = None, json: Annotated[bool, Parameter(negative="")] = False
) -> None:
    """Export a detector or segmenter as an ONNX graph, and check it: agreement with PyTorch and largest difference on images.

    Parameters
    ----------
    model
        A detector's or segmenter's model file.
    images
        Images, or folders of images, that the graph is checked on.
    out
        The file to write, ending in .onnx; by default the model's name with .onnx.
    json
        Print the check as one JSON document.
    """
    from resnetlab.data.decode import find_image_files
    from resnetlab.inference.annotated import open_annotated_model, read_pixels
    from resnetlab.inference.annotated_export import export_annotated as export_graph
    from resnetlab.models.annotated_model import read_task

    out = out or model.with_suffix(".onnx")
    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: the file name must end in .onnx.")
    opened = open_annotated_model(model, read_task(model), "fp32", "cpu")
    parity = export_graph(opened.model, out, [read_pixels(file) for file in find_image_files(map(Path, images))])
    rate, largest = parity.agreement.rate, parity.agreement.largest_difference
    if json:
        figures = {"images": parity.n, "agreement": rate, "largest_difference": largest}
        return console.print_json({"model": str(model), "file": str(out), "to": "onnx"} | figures)
    unit = "pixels" if opened.model.task == "detect" else "of a score"
    print(f"{out}: on {parity.n:,} images {format_percent(rate)} agreement with PyTorch,")
    return print(f"largest difference {largest:.2g} {unit}")


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
    model: str,
    /,
    *,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Compare a classifier's Grad-CAM boxes with true boxes: how well it localises objects without training on boxes.

    Example: `resnetlab detect localise runs/photos/model.safetensors --data boxes --out places`

    Parameters
    ----------
    model
        A classifier's model file, or a publisher's name.
    data
        A folder in Pascal VOC's format or with COCO's JSON. If classes have the model's names, only boxes of the predicted
        class count.
    split
        test (the split to evaluate on, whatever its name is), train, or any other split of the data.
    out
        Folder for images with the predicted and true boxes, NAME.place.png; by default none are written.
    device
        cpu, cuda, cuda:1, …; auto uses a GPU if there is one.
    json
        Print the metrics as one JSON document, with one row per image.
    """
    from resnetlab.inference.localization import localize_objects, summarize_localization
    from resnetlab.inference.predict import load

    with console.ProgressBar("images") as bar:
        results = list(localize_objects(load(model, device=device), data, split, bar.update))
    if out is not None:
        for result in results:
            save_overlay(result.draw(), out, result.image.file.stem, "place")
    metrics = {"model": model, "data": str(data), "split": split} | summarize_localization(results)
    if json:
        rows = [
            {
                "image": r.image.name,
                "class": r.predicted_class,
                "score": round(r.score, 6),
                "box": r.box.tolist(),
                "iou": r.iou,
            }
            for r in results
        ]
        return console.print_json(metrics | {"images": rows})
    print(f"{model} on the {split} split of {data}, {metrics['n']:,} images with boxes")
    return print(
        f"localisation error {format_percent(metrics['localisation_error'])} (IoU with every true box below .5), "
        f"mean IoU with the nearest {metrics['mean_iou']:.3f}"
    )
