"""`resnetlab train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from resnetlab.cli import console, launch
from resnetlab.errors import UsageError
from resnetlab.formatting import format_duration, format_percent

if TYPE_CHECKING:
    from resnetlab.training.recipe import Recipe
    from resnetlab.training.result import ClassificationResult
    from resnetlab.training.train import RunOptions


def train(
    data: str | None = None,
    /,
    *,
    net: str | None = None,
    recipe: str | None = None,
    steps: int | None = None,
    batch: str | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = (),
    seed: int | None = None,
    out: Path | None = None,
    data_dir: Path | None = None,
    device: str | None = None,
    precision: str | None = None,
    compile: str | None = None,
    workers: int | None = None,
    on_bad_image: str | None = None,
    quarantine: Path | None = None,
    start_from: Path | None = None,
    procs: int | None = None,
    max_restarts: int = 0,
    resume: Path | None = None,
    verify_resume: Annotated[bool, Parameter(negative="")] = False,
    show_recipe: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a network; write a run folder with the model and a report.

    Without arguments: a small residual network on the embedded digits, in less than a minute.

    Example: `resnetlab train cifar10 --net resnet20 --steps 2000 --data-dir data`

    Parameters
    ----------
    data
        digits, cifar10, cifar100; a folder of class folders (with train/ and val/ where you have them); or tar shards, as a
        pattern such as train-{000000..000009}.tar, or an address of one.
    net
        Network, such as resnet20, plain56, preresnet110 or resnet18 (`resnetlab inspect NET` shows one).
    recipe
        Recipe: quick (digits), photos and finetune (folders), paper-cifar, preact-cifar, paper-imagenet, preact-imagenet,
        modern, modern-long.
    steps
        Length of the run; the recipe's schedule is rescaled to it, and the result is marked as shortened.
    batch
        Images per step; auto keeps the recipe's and takes the largest micro-batch that fits into memory.
    set_
        Changes one value of the recipe or of the network's specification, key=value; may be given several times.
    seed
        Seed of initialisation, data order and augmentation.
    out
        Run folder; by default runs/DATA, or runs/DATA-2 and so on.
    data_dir
        Folder of the archives; "data" by default.
    device
        cpu, cuda, cuda:1, …; by default a GPU if there is one, and for a resumed run the kind of device it started on.
    precision
        bf16 or fp32; by default bf16 if the hardware computes it.
    compile
        on or off: torch.compile, which costs about a minute and pays off in long runs on small images, where it is the
        default. off also disables the CUDA graph that a GPU replays steps from.
    workers
        Processes that decode images; by default none if a CPU trains. The result does not depend on it.
    on_bad_image
        stop at an image that cannot be read, or skip it: left out, counted, and listed in the run folder.
    quarantine
        A list of images to leave out, as written by `resnetlab data check --quarantine`.
    start_from
        A model file to start from (recipe finetune); it gets a new head if the data have other classes.
    procs
        Processes on this machine that share every step: one per GPU, or a few on the CPU. On several machines use
        torchrun: `torchrun … -m resnetlab train …`
    max_restarts
        With --procs: how often the processes are restarted from the last checkpoint after one of them has died.
    resume
        Resume the run in this folder from its last checkpoint; the result is bit-identical to that of an uninterrupted run.
    verify_resume
        Verify on this machine that a killed run resumes bit-identically: train the recipe's first steps without a stop and with
        a real SIGKILL, compare, and leave nothing behind. So few steps are not compiled; add --compile on to verify that.
    show_recipe
        Print a recipe and its purpose, and train nothing.
    json
        Print the result as one JSON document.
    """
    from resnetlab.distributed import is_first_process
    from resnetlab.training import train as training
    from resnetlab.training.recipe import Overrides
    from resnetlab.training.result import ClassificationResult

    if show_recipe is not None:
        return print_recipe(show_recipe)
    if workers is not None and workers < 0:
        raise UsageError(f"--workers must be 0 or more, not {workers}.")
    if resume is not None and (out is not None or recipe is not None):
        raise UsageError(
            "--resume continues a run with its own recipe in its own folder; leave out --out and --recipe."
        )
    files = {"on_bad_image": on_bad_image, "quarantine": quarantine, "start_from": start_from}
    values = _collect_values(set_, batch=batch, precision=precision, compile=compile, **files)
    overrides = Overrides(data=data, net=net, steps=steps, seed=seed, values=values)
    options = training.RunOptions(
        data_dir=data_dir, device=device, workers=workers, fit_micro_batch=batch == "auto", report=console.log
    )
    base = recipe or ("finetune" if start_from else None)
    new = None if resume is not None else overrides.apply(_find_recipe(base, data))
    if verify_resume:
        return _verify(new, options, alone=procs is None and not json)
    if procs is not None:
        processes = launch.Processes(procs, max_restarts)
        result = launch.train_in_processes(new, resume or out, options, processes, overrides=overrides)
    elif max_restarts:
        raise UsageError(
            "--max-restarts is for processes that --procs starts; give it, or torchrun its own --max-restarts."
        )
    else:
        with console.show_training() as on_progress:
            options = replace(options, on_progress=on_progress)
            if new is not None:
                result = training.start_run(new, out, options)
            else:
                assert resume is not None
                result = training.resume(resume, options, overrides=overrides)
    if not is_first_process():
        return None
    if json:
        return console.print_json(result.to_json())
    assert isinstance(result, ClassificationResult)
    return _print_result(result)


def _collect_values(settings: tuple[str, ...], **options: object) -> dict[str, str]:
    """The values of the recipe that `--set` and other options change."""
    given = {key: str(value) for key, value in options.items() if value and (key, value) != ("batch", "auto")}
    return console.parse_pairs(settings) | given


def _find_recipe(name: str | None, data: str | None) -> Recipe:
    """The recipe of a name, or the default of the data; raises UsageError if its data are neither given nor there."""
    from resnetlab.data import sources
    from resnetlab.training import recipes

    recipe = recipes.choose_recipe(name, data=data)
    if data is None and not sources.is_builtin(recipe.data) and not Path(recipe.data).exists():
        raise UsageError(
            f"recipe {recipe.name} needs images: resnetlab train DATA, a folder of class folders or a data set."
        )
    return recipe


def _verify(recipe: Recipe | None, options: RunOptions, alone: bool) -> None:
    """Verifies resume and prints the result; `alone` is False if an option does not fit."""
    from resnetlab.training.verify import verify_resume

    if options.fit_micro_batch or not alone:
        raise UsageError(
            "--verify-resume uses one process and the recipe's batch, and prints a sentence; leave out --procs, "
            "--batch auto and --json."
        )
    if recipe is None:
        raise UsageError("--verify-resume takes a recipe, not a run; leave out --resume.")
    data_dir, device = options.data_dir or Path("data"), options.device or "auto"
    print(verify_resume(recipe, data_dir, device, options.workers, console.log))


def _print_result(result: ClassificationResult) -> None:
    """Prints the result as text."""
    low, high = result.top1_interval
    rows = [
        (
            f"{result.split} error, top-1",
            (
                f"{format_percent(result.top1_error)}  (95 % interval {100 * low:.2f} to {100 * high:.2f} %, "
                f"n = {result.n:,})"
            ),
        ),
        (
            "trained",
            f"{result.steps:,} steps in {format_duration(result.seconds)}, {result.images_per_second:,.0f} images/s",
        ),
        ("model", result.model),
        ("report", result.report),
    ]
    if result.budget:
        rows.insert(1, ("budget", result.budget))
    for name, text in rows:
        print(f"{name:<18} {text}")


def print_recipe(name: str, task: str = "classify") -> None:
    """Prints a recipe: its docstring and every value."""
    from inspect import cleandoc

    from resnetlab.training import recipes

    value = recipes.find_recipe(name, task)
    description = cleandoc(recipes.RECIPES[name].__doc__ or "")
    print("\n".join(f"# {line}".rstrip() for line in description.splitlines()) + "\n")
    print(value.to_toml(), end="")
