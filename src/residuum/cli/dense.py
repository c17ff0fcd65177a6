"""What `residuum detect` and `residuum segment` share: training a recipe, and answering about pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from cyclopts import Parameter

from residuum.cli import console, processes
from residuum.cli.train import show
from residuum.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from residuum.training.recipe import Training
    from residuum.training.result import Ended


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options of both `train` commands.

    Parameters
    ----------
    net
        Network, such as resnet18 or resnet50v1.5.
    recipe
        For a detector boxes (a feature pyramid, small pictures) or paper-boxes (the 2015 paper's schedule and form), for a
        segmenter masks.
    start_from
        A classifier's model file to start from; by default random weights.
    steps
        Length of the run; the recipe's whole schedule is brought to it in proportion, and the run labelled so.
    set_
        Changes one value of the recipe or of the network's specification, key=value; may be given several times.
    seed
        Seed of initialisation, order and augmentation.
    out
        Run folder; by default runs/DATA, or runs/DATA-2 and so on.
    device
        cpu, cuda, cuda:1, … ; a GPU where there is one unless told otherwise, and what it began on for a resumed run.
    workers
        Processes that decode pictures; by default none beside a CPU that trains. The result does not depend on it.
    procs
        Processes on this machine that share every step: one a GPU, or a few on the CPU. On several machines start them by
        torchrun: `torchrun … -m residuum detect train …`
    max_restarts
        With --procs: how often the processes are started again, from the last checkpoint, after one of them has died.
    resume
        Go on with the run in this folder, from its last checkpoint to the same bits as if it had never stopped.
    show_recipe
        Print a recipe and what it is for, and train nothing.
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


NOTHING = Asked()


def train(task: str, data: str | None, asked: Asked, own: Mapping[str, str | None]) -> Any:
    """Trains or goes on with a run and gives its result; None where a recipe was only shown, or other processes speak.

    Args:
        own: options that are a value of the task's recipe.
    """
    from residuum.data.samples import shared
    from residuum.training import loop, recipes
    from residuum.training.dense_recipe import DENSE_DEFAULTS, DenseTraining

    if asked.show_recipe is not None:
        return show(asked.show_recipe, task)
    if asked.workers is not None and asked.workers < 0:
        raise UsageError(f"--workers must be 0 or more, not {asked.workers}.")
    if asked.resume is not None and (asked.out is not None or asked.recipe is not None):
        raise UsageError("--resume goes on with a run's own recipe in its own folder; leave out --out and --recipe.")
    if asked.resume is None and data is None:
        raise UsageError(f"{task} train needs DATA, a folder; `residuum {task} train --help` says of which form.")
    values = {"start_from": asked.start_from, **own}
    pairs = console.pairs(asked.set_) | {key: value for key, value in values.items() if value}

    def adapted(base: Training) -> Training:
        return loop.adapt(base, data=data, net=asked.net, steps=asked.steps, seed=asked.seed, values=pairs)

    new = None
    if asked.resume is None:
        new = adapted(recipes.named(asked.recipe or DENSE_DEFAULTS[task], task))
    if asked.procs is None:
        return _here(task, asked, new, adapted)
    processes.check(asked.procs, asked.device)
    if isinstance(new, DenseTraining):
        shared(new.batch, new.bn_batch, asked.procs)
    return processes.share(f"{task} train", {"data": data, **vars(asked), **own}, new)


def _here(task: str, asked: Asked, new: Training | None, adapted: Callable[[Any], Training]) -> Any:
    """Trains in this process; None where it is not the first of those that torchrun started."""
    from residuum.training import loop
    from residuum.world import first_process

    with console.Bar("step") as bar:

        def progress(p: Any) -> None:
            bar.show(p.step, p.steps, console.training_words(p))

        if new is not None:
            place, kind = Path("data"), asked.device or "auto"
            result = loop.start(new, asked.out, place, kind, progress, console.say, asked.workers)
        else:
            assert asked.resume is not None
            result = loop.resume(
                asked.resume,
                task=task,
                device=asked.device,
                workers=asked.workers,
                progress=progress,
                say=console.say,
                expect=adapted,
            )
    return result if first_process() else None


def print_result(result: Ended, rows: Sequence[tuple[str, str]]) -> None:
    """The figures for a person."""
    time = f"{result.steps:,} steps in {console.duration(result.seconds)}, {result.images_per_second:.1f} images/s"
    budget = [("budget", result.budget)] if result.budget else []
    for name, words in [*rows, *budget, ("trained", time), ("model", result.model), ("report", result.report)]:
        print(f"{name:<18} {words}")
    print()


def numbers(option: str, text: str | None) -> tuple[int, ...]:
    """Whole numbers with commas between; () for none."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(
            f"{option} takes whole numbers with commas between, such as 240,300,360, not {text!r}."
        ) from None


def pictures(images: Sequence[str]) -> list[Path]:
    """The pictures that are named, folders opened."""
    from residuum.data.decode import picture_files

    if not images:
        raise UsageError("predict needs pictures: files or folders.")
    return list(picture_files(map(Path, images)))


class Answer(Protocol):
    """What is said of one picture."""

    @property
    def name(self) -> str: ...
    @property
    def drawn(self) -> Image.Image | None: ...
    @property
    def error(self) -> str | None: ...
    def to_json(self) -> dict[str, Any]: ...


def answer(answers: Iterable[Answer], out: Path | None, suffix: str) -> None:
    """Prints the answers as one JSON document, and writes each drawn picture to `out`.

    Raises DataError at the end where a picture could not be read; the others are answered.
    """
    entries, failed = [], []
    for each in answers:
        entry = each.to_json()
        if each.error:
            failed.append(each.error)
        elif out is not None and each.drawn is not None:
            entry["drawn"] = str(save(each.drawn, out, Path(each.name).stem, suffix))
        entries.append(entry)
    console.print_json({"predictions": entries})
    if failed:
        raise DataError(f"{len(failed):,} of {len(entries):,} pictures could not be read: {failed[0]}")


def save(drawn: Image.Image, out: Path, stem: str, suffix: str) -> Path:
    """Writes a drawn picture under a name that is free; raises RunError where it cannot."""
    from residuum.records import writing_error

    file = _free(out, stem, suffix)
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn.save(file)
    except OSError as error:
        raise writing_error(file, error) from error
    return file


def _free(folder: Path, stem: str, suffix: str) -> Path:
    """A file's name that no other picture of this call has taken: two folders may hold pictures of one name."""
    number = 1
    while (file := folder / f"{stem}{'' if number == 1 else f'-{number}'}.{suffix}.png").exists():
        number += 1
    return file


def export(model: Path, task: str, images: Sequence[str], out: Path, json: bool) -> None:
    """Writes an ONNX graph and says how far it lies from PyTorch on pictures."""
    from residuum.data.decode import decode
    from residuum.use import dense as use
    from residuum.use.dense_export import export_onnx

    if out.suffix != ".onnx":
        raise UsageError(f"--out {out}: the file ends in .onnx.")
    bundle, _ = use.load(model, task, "fp32", "cpu")
    proof = export_onnx(bundle, out, [use.as_pixels(decode(file)) for file in pictures(images)])
    figures = {"file": str(out)} | proof._asdict()
    if json:
        return console.print_json(figures)
    unit = "pixels" if task == "detect" else "of a score"
    print(f"{out}: on {proof.pictures:,} pictures {console.percent(proof.agreement)} agreement with PyTorch, ")
    return print(f"largest difference {proof.largest_difference:.2g} {unit}")
