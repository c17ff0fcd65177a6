"""`residuum train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import UsageError

if TYPE_CHECKING:
    from residuum.training.result import Progress, Result


def train(
    data: str | None = None,
    /,
    *,
    net: str | None = None,
    recipe: str | None = None,
    steps: int | None = None,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative="", consume_multiple=False)] = (),
    seed: int | None = None,
    out: Path | None = None,
    data_dir: Path | None = None,
    device: str | None = None,
    workers: int | None = None,
    on_bad_image: str | None = None,
    quarantine: Path | None = None,
    resume: Path | None = None,
    show_recipe: str | None = None,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Train a network; write a run folder with the model and a report.

    Without arguments: a small residual network on the embedded digits, in less than a minute.

    Example: `residuum train cifar10 --net resnet20 --steps 2000 --data-dir data`

    Parameters
    ----------
    data
        digits, cifar10, cifar100; a folder of class folders (with train/ and val/ where you have them); or tar shards, as a
        pattern such as train-{000000..000009}.tar, or an address of one.
    net
        Network, such as resnet20, plain56, preresnet110 or resnet18 (`residuum inspect NET` shows one).
    recipe
        Recipe: quick (digits), paper-cifar or photos (folders).
    steps
        Length of the run; the recipe's whole schedule is brought to it in proportion, and the run labelled so.
    set_
        Changes one value of the recipe or of the network's specification, key=value; may be given several times.
    seed
        Seed of initialisation, order and augmentation.
    out
        Run folder; by default runs/DATA, or runs/DATA-2 and so on.
    data_dir
        Where archives lie; "data" by default.
    device
        cpu, cuda, cuda:1, … ; a GPU where there is one unless told otherwise, and what it began on for a resumed run.
    workers
        Processes that decode pictures; by default none beside a CPU that trains. The result does not depend on it.
    on_bad_image
        stop at a picture that cannot be read, or skip it: left out, counted, and listed in the run folder.
    quarantine
        A list of pictures to leave out, as `residuum data check --quarantine` writes it.
    resume
        Go on with the run in this folder, from its last checkpoint to the same bits as if it had never stopped.
    show_recipe
        Print a recipe and what it is for, and train nothing.
    json
        Print the result as one JSON document.
    """
    from residuum.training import loop
    from residuum.training.recipe import Recipe

    if show_recipe is not None:
        return _show(show_recipe)
    values = console.pairs(set_)
    files = {"on_bad_image": on_bad_image, "quarantine": quarantine and str(quarantine)}
    values |= {key: value for key, value in files.items() if value}
    if workers is not None and workers < 0:
        raise UsageError(f"--workers must be 0 or more, not {workers}.")

    def adapted(base: Recipe) -> Recipe:
        return loop.adapt(base, data=data, net=net, steps=steps, seed=seed, values=values)

    with console.Bar("step") as bar:

        def progress(p: Progress) -> None:
            bar.show(p.step, p.steps, console.training_words(p))

        if resume is not None:
            if out is not None or recipe is not None:
                raise UsageError(
                    "--resume goes on with a run's own recipe in its own folder; leave out --out and --recipe."
                )
            result = loop.resume(
                resume,
                data_dir=data_dir,
                device=device,
                workers=workers,
                progress=progress,
                say=console.say,
                expect=adapted,
            )
        else:
            complete = adapted(loop.resolve(recipe, data=data))
            place, kind = data_dir or Path("data"), device or "auto"
            result = loop.start(complete, out, place, kind, progress, console.say, workers)
    if json:
        return console.print_json(result.to_json())
    return _print(result)


def _print(result: Result) -> None:
    """The figures for a person."""
    low, high = result.top1_interval
    rows = [
        (
            f"{result.split} error, top-1",
            f"{console.percent(result.top1_error)}  (95 % interval {100 * low:.2f} to {100 * high:.2f} %, n = {result.n:,})",
        ),
        (
            "trained",
            f"{result.steps:,} steps in {console.duration(result.seconds)}, {result.images_per_second:,.0f} images/s",
        ),
        ("model", result.model),
        ("report", result.report),
    ]
    if result.budget:
        rows.insert(1, ("budget", result.budget))
    for name, words in rows:
        print(f"{name:<18} {words}")


def _show(name: str) -> None:
    """Prints a recipe: what it is for, and every value."""
    from inspect import cleandoc

    from residuum.training import recipes

    value = recipes.recipe(name)
    about = cleandoc(recipes.RECIPES[name].__doc__ or "")
    print("\n".join(f"# {line}".rstrip() for line in about.splitlines()) + "\n")
    print(value.to_toml(), end="")
