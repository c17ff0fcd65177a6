"""Code shared by `resnetlab detect` and `resnetlab segment`: training, printed predictions, export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from cyclopts import Parameter

from resnetlab.cli import console, launch
from resnetlab.cli.train import print_recipe
from resnetlab.errors import DataError, UsageError
from resnetlab.formatting import format_duration, format_percent

if TYPE_CHECKING:
    from PIL import Image

    from resnetlab.training.recipe import BaseRecipe
    from resnetlab.training.result import TrainResult


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


def train_annotated(task: str, data: str | None, options: TrainOptions, recipe_values: Mapping[str, str | None]) -> Any:
    """Starts or continues a run and returns its result; None if only a recipe was printed, or another process prints it.

    Args:
        recipe_values: options that are values of the task's recipe.
    """
    from resnetlab.data.annotated_sampler import divide_batch
    from resnetlab.training import recipes
    from resnetlab.training import train as training
    from resnetlab.training.annotated_recipes import DEFAULT_RECIPES, AnnotatedRecipe

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

    def adapt_recipe(base: BaseRecipe) -> BaseRecipe:
        return training.override_recipe(
            base, data=data, net=options.net, steps=options.steps, seed=options.seed, values=pairs
        )

    new = None
    if options.resume is None:
        new = adapt_recipe(recipes.find_recipe(options.recipe or DEFAULT_RECIPES[task], task))
    if options.procs is None:
        return _train_in_process(task, options, new, adapt_recipe)
    launch.check_process_count(options.procs, options.device)
    if isinstance(new, AnnotatedRecipe):
        divide_batch(new.batch, new.bn_batch, options.procs)
    return launch.launch_run(f"{task} train", {"data": data, **vars(options), **recipe_values}, new)


def _train_in_process(
    task: str, options: TrainOptions, new: BaseRecipe | None, adapt_recipe: Callable[[Any], BaseRecipe]
) -> Any:
    """Trains in this process; None if it is not the first of those that torchrun started."""
    from resnetlab.distributed import is_first_process
    from resnetlab.training import train as training

    with console.ProgressBar("step") as bar:

        def show_progress(p: Any) -> None:
            bar.update(p.step, p.steps, console.describe_progress(p))

        if new is not None:
            data_dir, device = Path("data"), options.device or "auto"
            result = training.start_run(new, options.out, data_dir, device, show_progress, console.log, options.workers)
        else:
            assert options.resume is not None
            result = training.resume(
                options.resume,
                task=task,
                device=options.device,
                workers=options.workers,
                on_progress=show_progress,
                report=console.log,
                expect=adapt_recipe,
            )
    return result if is_first_process() else None


def print_result(result: TrainResult, rows: Sequence[tuple[str, str]]) -> None:
    """Prints the result as a table."""
    time = f"{result.steps:,} steps in {format_duration(result.seconds)}, {result.images_per_second:.1f} images/s"
    budget = [("budget", result.budget)] if result.budget else []
    for name, text in [*rows, *budget, ("trained", time), ("model", result.model), ("report", result.report)]:
        print(f"{name:<18} {text}")
    print()


def parse_integers(option: str, text: str | None) -> tuple[int, ...]:
    """Parses comma-separated integers; () for None."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(f"{option} takes comma-separated whole numbers, such as 240,300,360, not {text!r}.") from None


def list_image_paths(images: Sequence[str]) -> list[Path]:
    """The given images, with folders expanded."""
    from resnetlab.data.decode import find_image_files

    if not images:
        raise UsageError("predict needs images: files or folders.")
    return list(find_image_files(map(Path, images)))


class DrawablePrediction(Protocol):
    """The prediction for one image."""

    @property
    def name(self) -> str: ...
    @property
    def overlay(self) -> Image.Image | None: ...
    @property
    def error(self) -> str | None: ...
    def to_json(self) -> dict[str, Any]: ...


def print_annotated_predictions(predictions: Iterable[DrawablePrediction], out: Path | None, suffix: str) -> None:
    """Prints the predictions as one JSON document, and writes each overlay to `out`.

    Raises DataError at the end if an image could not be read; the other predictions are printed.
    """
    entries, failed = [], []
    for prediction in predictions:
        entry = prediction.to_json()
        if prediction.error:
            failed.append(prediction.error)
        elif out is not None and prediction.overlay is not None:
            entry["drawn"] = str(save_overlay(prediction.overlay, out, Path(prediction.name).stem, suffix))
        entries.append(entry)
    console.print_json({"predictions": entries})
    if failed:
        raise DataError(f"{len(failed):,} of {len(entries):,} images could not be read: {failed[0]}")


def save_overlay(overlay: Image.Image, out: Path, stem: str, suffix: str) -> Path:
    """Writes an overlay under an unused name; raises RunError if it cannot."""
    from resnetlab.run_folder import write_error

    file = _unused_path(out, stem, suffix)
    try:
        out.mkdir(parents=True, exist_ok=True)
        overlay.save(file)
    except OSError as error:
        raise write_error(file, error) from error
    return file


def _unused_path(folder: Path, stem: str, suffix: str) -> Path:
    """A path without a file; a number is added, since two folders may hold images of the same name."""
    number = 1
    while (file := folder / f"{stem}{'' if number == 1 else f'-{number}'}.{suffix}.png").exists():
        number += 1
    return file


def export_annotated_model(model: Path, task: str, images: Sequence[str], out: Path, json: bool) -> None:
    """Writes an ONNX graph and prints its agreement with PyTorch on images."""
    from resnetlab.data.decode import decode
    from resnetlab.inference.annotated import image_to_pixels, open_annotated_model
    from resnetlab.inference.annotated_export import export_annotated

    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: the file name must end in .onnx.")
    loaded, _ = open_annotated_model(model, task, "fp32", "cpu")
    parity = export_annotated(loaded, out, [image_to_pixels(decode(file)) for file in list_image_paths(images)])
    figures = {"file": str(out)} | parity._asdict()
    if json:
        return console.print_json(figures)
    unit = "pixels" if task == "detect" else "of a score"
    print(f"{out}: on {parity.images:,} images {format_percent(parity.agreement)} agreement with PyTorch,")
    return print(f"largest difference {parity.largest_difference:.2g} {unit}")
