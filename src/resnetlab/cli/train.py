"""`resnetlab train`, and the code of `detect train` and `segment train`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from resnetlab.cli import console, launch
from resnetlab.cli.options import Flag, Json, Settings, Texts
from resnetlab.errors import UsageError
from resnetlab.formatting import format_count, format_duration, format_percent, format_split
from resnetlab.process_place import read_process_place

if TYPE_CHECKING:
    from resnetlab.training.recipe import BaseRecipe, Overrides
    from resnetlab.training.result import TrainResult
    from resnetlab.training.run_options import RunOptions

NEAR = 0.01  # of the error: a balanced error that is nearer is not printed


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of all tasks' `train` commands.

    Parameters
    ----------
    net
        Network, such as resnet20, plain56, preresnet110 or resnet18 (`resnetlab inspect NET` shows one).
    recipe
        Recipe, or a TOML file: a run's own recipe.toml, which then runs again identically, or some values and the name of the
        recipe that has the others. Classifiers: quick (digits), photos and finetune (folders), paper-cifar, preact-cifar,
        paper-imagenet, preact-imagenet, modern, modern-long. Detectors: boxes (a feature pyramid, small images), paper-boxes
        (the 2015 paper's schedule and form). Segmenters: masks.
    start_from
        Weights to start from (a classifier then has the recipe finetune): a model file, a run folder, a published name such as
        torchvision:resnet18.IMAGENET1K_V1, or a weight file of another program. They bring their network, and get a new head
        if the data have other classes.
    pretrained
        Start from the published ImageNet weights of --net, or else of the recipe's network (ResNet-18 on a folder), which
        torchvision's server has (resnet18, 34, 50, 101, 152).
    steps
        Length of the run; the recipe's schedule is rescaled to it, and the result is marked as shortened.
    epochs
        The same in epochs: how often each training image is seen.
    batch
        Images per step. auto, for a classifier, keeps the recipe's and takes the largest micro-batch that fits into memory.
    lr
        Learning rate after warm-up.
    set_
        Changes one value of the recipe or of the network's specification, key=value; may be given several times.
    seed
        Seed of initialisation, data order and augmentation.
    out
        Run folder; by default runs/DATA, or runs/DATA-2 and so on.
    device
        cpu, cuda, cuda:1, …; by default a GPU if there is one, and for a resumed run the kind of device it started on.
    workers
        Processes that decode images; by default none if a CPU trains. The result does not depend on it.
    shard_space
        Of a classifier with --set sampling=shards: gigabytes of each machine's disk that fetched shards may take; by default
        most of what is free.
    procs
        Processes on this machine that share every step: one per GPU, or a few on the CPU. On several machines use
        torchrun: `torchrun … -m resnetlab train …`
    max_restarts
        With --procs: how often the processes are restarted from the last checkpoint after one of them has died.
    tracker
        Send the figures to tensorboard, wandb, mlflow or trackio too; may be given several times. A resumed run remembers it.
    profile
        Trace so many steps, near the start, into the run's trace.json, which Perfetto shows. The result does not depend on it.
    resume
        Resume the run in this folder from its last checkpoint; the result is bit-identical to that of an uninterrupted run.
        A finished run is extended with --epochs or --steps.
    show_recipe
        Print a recipe and its purpose, and train nothing.
    """

    net: str | None = None
    recipe: str | None = None
    start_from: str | None = None
    pretrained: Flag = False
    steps: int | None = None
    epochs: float | None = None
    batch: str | None = None
    lr: float | None = None
    set_: Settings = ()
    seed: int | None = None
    out: Path | None = None
    device: str | None = None
    workers: int | None = None
    shard_space: float | None = None
    procs: int | None = None
    max_restarts: int = 0
    tracker: Texts = ()
    profile: int = 0
    resume: Path | None = None
    show_recipe: str | None = None
    json: Json = False


DEFAULT_OPTIONS = TrainOptions()


def train(
    data: str | None = None,
    /,
    *,
    options: TrainOptions = DEFAULT_OPTIONS,
    data_dir: Path | None = None,
    precision: str | None = None,
    compile: str | None = None,
    on_bad_image: str | None = None,
    quarantine: Path | None = None,
    folds: int | None = None,
    verify_resume: Flag = False,
) -> None:
    """Train a network; write a run folder with the model and a report.

    Without arguments: a small residual network on the embedded digits, in less than a minute.

    Example: `resnetlab train cifar10 --net resnet20 --steps 2000 --data-dir data`

    Parameters
    ----------
    data
        digits, cifar10, cifar100; a folder of class folders (with train/ and val/ where you have them), or a zip or tar of
        one; a table (.csv, .tsv, .parquet) with columns of paths, labels and if you like splits, which
        photos.csv:path=file,label=species names; or tar shards, as a pattern such as train-{000000..000009}.tar, or an
        address of one.
    data_dir
        Folder of the archives; "data" by default.
    precision
        bf16, fp16 (with a scaled loss), tf32 (on a GPU) or fp32; by default bf16 if the hardware computes it, else fp16 on a
        GPU with tensor cores, else fp32.
    compile
        on or off: torch.compile, which costs about a minute and pays off in long runs on small images, where it is the
        default. off also disables the CUDA graph that a GPU replays steps from. For GPUs also torch's modes reduce-overhead
        and, with --set exact=false, max-autotune and max-autotune-no-cudagraphs.
    on_bad_image
        stop at an image that cannot be read, or skip it: left out, counted, and listed in the run folder.
    quarantine
        A list of images to leave out, as written by `resnetlab data check --quarantine`.
    folds
        Cross-validation: one run for each of so many folds, each tested on its own; prints mean and standard deviation. The
        runs are in fold-1, fold-2, … of --out; given again, the command goes on where it was stopped.
    verify_resume
        Verify on this machine that a killed run resumes bit-identically: train the recipe's first steps without a stop and with
        a real SIGKILL, compare, and leave nothing behind. So few steps are not compiled; add --compile on to verify that.
    """
    from resnetlab.training.result import MultiLabelResult

    if options.show_recipe is not None:
        return print_recipe(options.show_recipe)
    values = {"precision": precision, "compile": compile, "on_bad_image": on_bad_image}
    overrides = read_overrides(data, options, values | {"quarantine": quarantine})
    if verify_resume:
        if folds is not None:
            raise UsageError("--verify-resume trains one recipe's first steps; leave out --folds.")
        return _verify(options, overrides, data_dir)
    if folds is not None:
        return _cross_validate(folds, options, overrides, data_dir)
    with prepare_run("classify", options, overrides, data_dir=data_dir) as run:
        result = run()
    if print_json_result(result, options):
        return None
    if isinstance(result, MultiLabelResult):
        f1, error = format_percent(result.f1), format_percent(result.label_error)
        text = f"{result.mean_ap:.3f}  (F1 {f1}, mean over the classes; label error {error}; n = {result.n:,})"
        return print_result(result, {f"{format_split(result.split)} mAP": text})
    low, high = result.top1_interval
    interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %, n = {result.n:,}"
    interval += f"; accuracy {format_percent(1 - result.top1_error)}"
    rows = {f"{format_split(result.split)} error, top-1": f"{format_percent(result.top1_error)}  ({interval})"}
    if result.balanced_error is not None and abs(result.balanced_error - result.top1_error) > NEAR:
        rows["balanced error"] = f"{format_percent(result.balanced_error)}  (the mean of the classes' errors)"
    if (none := result.none_of_these) is not None:
        error = none["top1_error"]
        others = "" if error is None else f"; error of the others {format_percent(error)}"
        rows["none of these"] = f"{format_percent(none['share'] or 0)} of these images, below {none['below']}{others}"
    return print_result(result, rows)


def _cross_validate(folds: int, options: TrainOptions, overrides: Overrides, data_dir: Path | None) -> None:
    """Trains one run per fold and prints their errors."""
    from resnetlab.training.folds import cross_validate
    from resnetlab.training.recipe import Recipe
    from resnetlab.training.result import show_training

    if options.procs is not None or options.resume is not None:
        raise UsageError("--folds makes runs of its own and goes on with them; leave out --procs and --resume.")
    recipe, settings = complete_recipe("classify", options, overrides), _run_options(options, overrides, data_dir)
    assert isinstance(recipe, Recipe)
    with show_training() as on_progress:
        summary = cross_validate(recipe, folds, options.out, replace(settings, on_progress=on_progress))
    if options.json:
        return console.print_json(summary)
    rows = [(each["run"], f"{each['n']:,}", format_percent(each["top1_error"])) for each in summary["runs"]]
    console.print_table("", ("run", "images", "top-1 error"), rows, right=(1, 2))
    mean, deviation = (format_percent(summary[key]) for key in ("top1_error", "standard_deviation"))
    return console.write_line(
        f"top-1 error {mean} ± {deviation} (mean and standard deviation over {folds} folds, n = {summary['n']:,})"
    )


def read_overrides(
    data: str | None, options: TrainOptions, values: Mapping[str, object], task: str = "classify"
) -> Overrides:
    """What the options change in a recipe; `values` are the task's own options that are values of its recipe.

    Raises UsageError if options contradict each other.
    """
    from resnetlab.training.recipe import Overrides
    from resnetlab.training.recipes import choose_pretrained, choose_start, refuse_network

    for name, count in (("workers", options.workers), ("profile", options.profile)):
        if count is not None and count < 0:
            raise UsageError(f"--{name} must be 0 or more, not {count}.")
    refuse_network(data)
    if options.resume is not None and (options.out is not None or options.recipe is not None):
        raise UsageError(
            "--resume continues a run with its own recipe in its own folder; leave out --out and --recipe."
        )
    if options.max_restarts and options.procs is None:
        raise UsageError(
            "--max-restarts is for processes that --procs starts; give it, or torchrun its own --max-restarts."
        )
    if options.pretrained and options.start_from:
        raise UsageError("--pretrained and --start-from are two starts; give one of them.")
    start = options.start_from and choose_start(options.net, options.start_from, options.recipe, task=task)
    if options.pretrained:
        start, notes = choose_pretrained(options.net, options.recipe, task=task, data=data)
        for note in notes:
            console.log(note)
    own = {
        "start_from": start,
        "lr": options.lr,
        "batch": None if options.batch == "auto" else options.batch,
    }
    given = {key: str(value) for key, value in (own | dict(values)).items() if value not in (None, "")}
    settings = console.parse_pairs(options.set_)
    if twice := next((key for key in given if key in settings), None):
        raise UsageError(f"{twice} is given twice, by --{twice.replace('_', '-')} and by --set; give it once.")
    changes: dict[str, Any] = {key: getattr(options, key) for key in ("net", "steps", "epochs", "seed")}
    return Overrides(data=data, values=settings | given, **changes)


@contextlib.contextmanager
def prepare_run(
    task: str, options: TrainOptions, overrides: Overrides, data_dir: Path | None = None
) -> Iterator[Callable[[], Any]]:
    """A progress bar, and a function that starts or resumes the run and returns its result, to be called meanwhile."""
    from resnetlab.models.annotated_model import TASK_NOUNS
    from resnetlab.training.result import show_training
    from resnetlab.training.train import resume, start_run

    if options.batch == "auto" and task != "classify":
        raise UsageError(f"--batch auto is for classifiers; give {TASK_NOUNS[task]} a number.")
    settings = _run_options(options, overrides, data_dir)
    if options.procs is not None:  # they show the progress
        job = launch.Job(task, settings, options.procs, options.max_restarts)
        if options.resume is not None:
            yield partial(job.resume, options.resume, overrides)
        else:
            yield partial(job.start, complete_recipe(task, options, overrides), options.out)
        return
    with show_training() as on_progress:
        settings = replace(settings, on_progress=on_progress)
        if options.resume is not None:
            yield partial(resume, options.resume, settings, task=task, overrides=overrides)
        else:
            yield partial(start_run, complete_recipe(task, options, overrides), options.out, settings)


def _run_options(options: TrainOptions, overrides: Overrides, data_dir: Path | None) -> RunOptions:
    """What a run needs besides its recipe."""
    from resnetlab.training.run_options import RunOptions

    return RunOptions(
        data_dir=data_dir,
        device=options.device,
        workers=options.workers,
        shard_space=None if options.shard_space is None else int(options.shard_space * 1e9),
        fit_micro_batch=options.batch == "auto",
        epochs=overrides.length,
        trackers=options.tracker,
        profile=options.profile,
        report=console.log,
    )


def complete_recipe(task: str, options: TrainOptions, overrides: Overrides) -> BaseRecipe:
    """The recipe of a new run. Raises UsageError if its data are neither given nor there."""
    from resnetlab.data import sources
    from resnetlab.training import recipes

    name = options.recipe or ("finetune" if task == "classify" and "start_from" in overrides.values else None)
    recipe = recipes.choose_recipe(name, task=task, data=overrides.data)
    if overrides.data is None and not sources.is_builtin(recipe.data) and not Path(recipe.data).exists():
        command = "resnetlab train" if task == "classify" else f"resnetlab {task} train"
        raise UsageError(
            f"recipe {recipe.name} needs images: {command} DATA, a folder or a data set; `{command} --help` describes it."
        )
    return overrides.apply(recipe)


def _verify(options: TrainOptions, overrides: Overrides, data_dir: Path | None) -> None:
    """Verifies resume and prints the result."""
    from resnetlab.training.verify import verify_resume

    if options.batch == "auto" or options.procs is not None or options.json:
        raise UsageError(
            "--verify-resume uses one process and the recipe's batch, and prints a sentence; leave out --procs, "
            "--batch auto and --json."
        )
    if options.epochs is not None:
        raise UsageError("--verify-resume trains the recipe's first steps, however long it is; leave out --epochs.")
    if options.resume is not None:
        raise UsageError("--verify-resume takes a recipe, not a run; leave out --resume.")
    if options.profile or options.out is not None or options.tracker:
        name = "--profile" if options.profile else "--tracker" if options.tracker else "--out"
        raise UsageError(f"--verify-resume compares runs that it leaves nothing of; leave out {name}.")
    recipe = complete_recipe("classify", options, overrides)
    console.write_line(
        verify_resume(recipe, data_dir or Path("data"), options.device or "auto", options.workers, console.log)
    )


def print_json_result(result: TrainResult, options: TrainOptions) -> bool:
    """Prints the result as JSON if the options ask for it. Returns whether there is nothing more to print."""
    is_first = read_process_place().rank == 0
    if options.json and is_first:
        console.print_json(result.to_json())
    return options.json or not is_first


def print_result(result: TrainResult, metrics: Mapping[str, str]) -> None:
    """Prints the result as text, the task's metrics first."""
    rate = f"{result.images_per_second:,.{0 if result.images_per_second >= 100 else 1}f} images/s"
    rows = dict(metrics) | ({"budget": result.budget} if result.budget else {})
    rows |= {"trained": f"{format_count(result.steps, 'step')} in {format_duration(result.seconds)}, {rate}"}
    for name, text in (rows | {"model": result.model, "report": result.report}).items():
        console.write_line(f"{name:<18} {text}")


def print_recipe(name: str, task: str = "classify") -> None:
    """Prints a recipe: its docstring and every value."""
    from inspect import cleandoc

    from resnetlab.training import recipes

    value = recipes.find_recipe(name, task)
    description = cleandoc(recipes.RECIPES[name].__doc__ or "")
    for line in [*(f"# {line}".rstrip() for line in description.splitlines()), "", *value.to_toml().splitlines()]:
        console.write_line(line)
