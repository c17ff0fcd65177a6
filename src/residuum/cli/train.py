"""`residuum train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import UsageError

if TYPE_CHECKING:
    from residuum.training.recipe import Recipe
    from residuum.training.result import Progress, Result


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

    Example: `residuum train cifar10 --net resnet20 --steps 2000 --data-dir data`

    Parameters
    ----------
    data
        digits, cifar10, cifar100; a folder of class folders (with train/ and val/ where you have them); or tar shards, as a
        pattern such as train-{000000..000009}.tar, or an address of one.
    net
        Network, such as resnet20, plain56, preresnet110 or resnet18 (`residuum inspect NET` shows one).
    recipe
        Recipe: quick (digits), photos and finetune (folders), paper-cifar, preact-cifar, paper-imagenet, preact-imagenet,
        modern, modern-long.
    steps
        Length of the run; the recipe's whole schedule is brought to it in proportion, and the run labelled so.
    batch
        Pictures in a step; auto keeps the recipe's and takes them in as large parts as fit into memory.
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
    precision
        bf16 or fp32; bf16 where the hardware computes it unless told otherwise.
    compile
        on or off: torch.compile, a minute that pays in long runs on small pictures; used there unless told otherwise. off also
        does without the CUDA graph that a GPU's steps are replayed from.
    workers
        Processes that decode pictures; by default none beside a CPU that trains. The result does not depend on it.
    on_bad_image
        stop at a picture that cannot be read, or skip it: left out, counted, and listed in the run folder.
    quarantine
        A list of pictures to leave out, as `residuum data check --quarantine` writes it.
    start_from
        A model file to start from (recipe finetune); its head is new where the data have other classes.
    procs
        Processes on this machine that share every step: one a GPU, or a few on the CPU. On several machines start them by
        torchrun: `torchrun … -m residuum train …`
    max_restarts
        With --procs: how often the processes are started again, from the last checkpoint, after one of them has died.
    resume
        Go on with the run in this folder, from its last checkpoint to the same bits as if it had never stopped.
    verify_resume
        Prove on this machine that a killed run goes on to the same bits: train the recipe's first steps straight on and with a
        real SIGKILL in between, compare, and leave nothing behind. So few steps are not compiled; --compile on proves that.
    show_recipe
        Print a recipe and what it is for, and train nothing.
    json
        Print the result as one JSON document.
    """
    given = dict(locals())  # before anything else is local
    from residuum.training import loop
    from residuum.training.result import Result
    from residuum.world import first_process

    if show_recipe is not None:
        return show(show_recipe)
    if workers is not None and workers < 0:
        raise UsageError(f"--workers must be 0 or more, not {workers}.")
    files = {"on_bad_image": on_bad_image, "quarantine": quarantine, "start_from": start_from}
    values = _values(set_, batch=batch, precision=precision, compile=compile, **files)

    def adapted(base: Recipe) -> Recipe:
        return loop.adapt(base, data=data, net=net, steps=steps, seed=seed, values=values)

    if resume is not None and (out is not None or recipe is not None):
        raise UsageError("--resume goes on with a run's own recipe in its own folder; leave out --out and --recipe.")
    complete = adapted(_named(recipe or ("finetune" if start_from else None), data)) if resume is None else None
    if verify_resume:
        return _verify(complete, given)
    if procs is not None:
        return _in_processes(given, complete)
    if max_restarts:
        raise UsageError(
            "--max-restarts is for processes that --procs starts; give it, or torchrun its own --max-restarts."
        )
    with console.Bar("step") as bar:

        def progress(p: Progress) -> None:
            bar.show(p.step, p.steps, console.training_words(p))

        if complete is not None:
            place, kind = data_dir or Path("data"), device or "auto"
            result = loop.start(complete, out, place, kind, progress, console.say, workers, fit=batch == "auto")
        else:
            assert resume is not None
            here: dict[str, Any] = {"data_dir": data_dir, "device": device, "workers": workers}
            result = loop.resume(resume, **here, progress=progress, say=console.say, expect=adapted)
    if not first_process():
        return None
    if json:
        return console.print_json(result.to_json())
    assert isinstance(result, Result)
    return _print(result)


def _values(settings: tuple[str, ...], **options: object) -> dict[str, str]:
    """What `--set` and the options that stand for a value of the recipe change in it."""
    given = {key: str(value) for key, value in options.items() if value and (key, value) != ("batch", "auto")}
    return console.pairs(settings) | given


def _named(name: str | None, data: str | None) -> Recipe:
    """The recipe of a name, or the data's own; where it needs pictures, they must be named or stand where it says."""
    from residuum.data import sources
    from residuum.training import loop

    chosen = loop.resolve(name, data=data)
    if data is None and not sources.is_name(chosen.data) and not Path(chosen.data).exists():
        raise UsageError(
            f"recipe {chosen.name} needs pictures: residuum train DATA, a folder of class folders or a data set."
        )
    return chosen


def _verify(complete: Recipe | None, given: dict[str, Any]) -> None:
    """Prints what the comparison found."""
    from residuum.training.verify import verify

    if given["procs"] is not None or given["batch"] == "auto" or given["json"]:
        raise UsageError(
            "--verify-resume tries one process, the recipe's batch, and says a sentence; leave out --procs, --batch auto "
            "and --json."
        )
    if complete is None:
        raise UsageError("--verify-resume tries a recipe, not a run; leave out --resume.")
    place, device = given["data_dir"] or Path("data"), given["device"] or "auto"
    print(verify(complete, place, device, given["workers"], console.say))


def _in_processes(given: dict[str, Any], complete: Recipe | None) -> None:
    """The same command in several processes, if they can share the batch."""
    from residuum.cli import processes
    from residuum.training.parts import parts_of
    from residuum.world import World

    processes.check(given["procs"], given["device"])
    if complete is not None:
        parts_of(complete, World(0, given["procs"]))
    processes.share("train", given, complete)


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


def show(name: str, task: str = "classify") -> None:
    """Prints a recipe: what it is for, and every value."""
    from inspect import cleandoc

    from residuum.training import recipes

    value = recipes.named(name, task)
    about = cleandoc(recipes.RECIPES[name].__doc__ or "")
    print("\n".join(f"# {line}".rstrip() for line in about.splitlines()) + "\n")
    print(value.to_toml(), end="")
