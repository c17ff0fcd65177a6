"""`resnetlab evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from resnetlab.cli import console
from resnetlab.errors import RunError, UsageError
from resnetlab.formatting import format_percent

if TYPE_CHECKING:
    from resnetlab.evaluation.evaluate import Evaluation


def evaluate(
    *models: str,
    data: str,
    protocol: str = "1crop",
    weights: str | None = None,
    split: str = "test",
    fit_temperature: str | None = None,
    save_temperature: Annotated[bool, Parameter(negative="")] = False,
    data_dir: Path = Path("data"),
    on_bad_image: str = "stop",
    quarantine: Path | None = None,
    precision: str = "auto",
    device: str = "auto",
    out: Path | None = None,
    predictions: Path | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Evaluate a model, or several as an ensemble: errors with a 95 % interval, per class, calibration, confusion.

    Example: `resnetlab evaluate runs/digits/model.safetensors --data digits --protocol 1crop`

    Under torchrun the processes share the images: `torchrun --nproc-per-node 2 -m resnetlab evaluate …`

    Parameters
    ----------
    models
        Model files, or publishers' names such as torchvision:resnet50.IMAGENET1K_V2. The scores of several are averaged, their
        classes matched by name.
    data
        Data set: digits, cifar10, cifar100, a folder of class folders, or a pattern of tar shards.
    protocol
        How images are shown: 1crop, flip, 10crop, dense:320, multiscale:224,256,384,480,640. Options follow with +, such as
        10crop+logits (logits averaged, not scores), multiscale:224,256+noflip or dense:320+window (scores at every position).
    weights
        Of the ensemble's members, in their order, separated by commas; equal ones by default.
    split
        test, train, or any split of the data (val, held-out, all). A folder's val is its test where it has no other; for
        a folder with neither, the images that the model's own run held out are evaluated.
    fit_temperature
        Fit each model's temperature first: on another split, or on this number of images of the evaluated split, which are then
        left out of the evaluation.
    save_temperature
        Write the fitted temperatures into the model files.
    data_dir
        Folder of the archives.
    on_bad_image
        stop at an image that cannot be read, or skip it: then it is listed and not counted.
    quarantine
        A file that lists images to leave out, as written by `resnetlab data check --quarantine`.
    precision
        fp32, bf16, or auto: bf16 where the hardware computes it.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    out
        Folder for evaluation.json and evaluation.html; by default the first model's.
    predictions
        Write the prediction for each image to this file, .csv or .parquet.
    json
        Print the figures as one JSON document.
    """
    from resnetlab.distributed import is_first_process
    from resnetlab.evaluation.evaluate import evaluate as evaluate_models
    from resnetlab.evaluation.page import write_evaluation
    from resnetlab.evaluation.predictions import check_predictions_file, write_predictions
    from resnetlab.inference.download import get_scheme, load_or_download

    if predictions is not None:
        check_predictions_file(predictions)
    if save_temperature and (fit_temperature is None or any(map(get_scheme, models))):
        raise UsageError("--save-temperature needs --fit-temperature and model files; import downloaded weights first.")
    with console.ProgressBar("images") as bar:
        evaluation = evaluate_models(
            [load_or_download(model) for model in models],
            data,
            protocol=protocol,
            weights=None if weights is None else console.parse_numbers("--weights", weights, "2,1,1"),
            split=split,
            fit_on=fit_temperature,
            names=models,
            data_dir=data_dir,
            on_bad_image=on_bad_image,
            quarantine=quarantine or "",
            precision=precision,
            device=device,
            progress=bar.update,
        )
    if not is_first_process():
        return
    if skipped := evaluation.metrics.skipped:
        console.log(f"{len(skipped):,} images could not be read and are not counted: {', '.join(skipped)}")
    for sentence in evaluation.notes:
        console.log(f"resnetlab: warning: {sentence}.")
    if save_temperature:
        for path, model in zip(models, evaluation.trained_models, strict=True):
            model.save(Path(path))
    folder = Path(models[0]).parent if out is None else out
    try:
        write_evaluation(evaluation, folder)
        console.log(f"page: {folder / 'evaluation.html'}")
    except RunError as error:
        if out is not None:
            raise
        console.log(f"resnetlab: warning: no page: {error}")
    if predictions is not None:
        write_predictions(predictions, evaluation.metrics, evaluation.images.names)
    if json:
        console.print_json(evaluation.to_json())
    else:
        _print_evaluation(evaluation)


def _print_evaluation(evaluation: Evaluation) -> None:
    """Prints the figures."""
    metrics, figures = evaluation.metrics, evaluation.to_json()
    split = f"the {evaluation.split} split of {evaluation.data}"
    print(f"{' + '.join(evaluation.models)} on {split}, {metrics.n:,} images, {evaluation.protocol}")
    low, high = figures["top1_interval"]
    print(f"top-1 error {format_percent(metrics.top1_error)}  (95 % interval {100 * low:.2f} to {100 * high:.2f} %)")
    if len(metrics.classes) > 5:
        print(f"top-5 error {format_percent(metrics.top5_error)}")
    print(f"expected calibration error {format_percent(metrics.calibration_error)}")
    for name, sentence in zip(evaluation.models, evaluation.calibration, strict=True):
        print(sentence if len(evaluation.models) == 1 else f"{name}: {sentence}")
    if (known := figures["published"]) is not None:
        print(f"published: top-1 error {format_percent(known['top1_error'])} ({known['source']})")
    print()
    if evaluation.members:
        _print_members(figures)
    rows = []
    for i, (c, row) in enumerate(zip(figures["per_class"], figures["confusion"], strict=True)):
        error = "–" if c["top1_error"] is None else format_percent(c["top1_error"])
        rows.append((c["class"], f"{c['n']:,}", error, _format_confused(metrics.classes, row, i)))
    console.print_table("", ("class", "n", "top-1 error", "taken for"), rows, right=(1, 2))


def _print_members(figures: dict[str, Any]) -> None:
    """Prints each member beside the ensemble, and the differences between every two."""
    errors = ("top1_error", "top5_error", "calibration_error")
    rows = [
        (m["model"], f"{m['weight']:.3f}", *(format_percent(m[key]) for key in errors))
        for m in [*figures["members"], figures | {"model": "the ensemble", "weight": 1.0}]
    ]
    columns = ("model", "weight", "top-1 error", "top-5 error", "calibration error")
    console.print_table("", columns, rows, right=(1, 2, 3, 4))
    print()
    differences = [
        (
            c["a"],
            c["b"],
            format_percent(c["difference"]),
            f"{100 * c['interval'][0]:.2f} to {100 * c['interval'][1]:.2f} %",
            f"{c['p_value']:.2g}",
        )
        for c in figures["comparisons"]
    ]
    columns = ("a", "b", "error of a - b", "95 % (paired bootstrap)", "p (McNemar)")
    console.print_table("", columns, differences, right=(2, 3, 4))
    print()


def _format_confused(classes: tuple[str, ...], row: list[int], own: int) -> str:
    """The classes that are most often predicted for images of class `own`."""
    wrong = sorted(((n, classes[i]) for i, n in enumerate(row) if n and i != own), reverse=True)
    return ", ".join(f"{name} ({n})" for n, name in wrong[:3])
