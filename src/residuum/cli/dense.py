"""What `residuum detect` and `residuum segment` share: training a recipe, and answering about pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from residuum.cli import console
from residuum.cli.train import show
from residuum.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from residuum.training.recipe import Training
    from residuum.training.result import Ended


@dataclass(frozen=True)
class Asked:
    """The options of a `train` command, as given."""

    task: str
    data: str | None
    net: str | None
    recipe: str | None
    steps: int | None
    set_: tuple[str, ...]
    seed: int | None
    out: Path | None
    device: str | None
    workers: int | None
    resume: Path | None
    show_recipe: str | None


def train(asked: Asked, values: Mapping[str, str | None]) -> Any:
    """Trains or goes on with a run and gives its result; None where a recipe was only shown, or another process speaks.

    Args:
        values: of the recipe, by options of their own.
    """
    from residuum.runtime import first_process
    from residuum.training import loop, recipes
    from residuum.training.dense_recipe import DENSE_DEFAULTS

    if asked.show_recipe is not None:
        return show(asked.show_recipe, asked.task)
    if asked.workers is not None and asked.workers < 0:
        raise UsageError(f"--workers must be 0 or more, not {asked.workers}.")
    pairs = console.pairs(asked.set_) | {key: value for key, value in values.items() if value}

    def adapted(base: Training) -> Training:
        return loop.adapt(base, data=asked.data, net=asked.net, steps=asked.steps, seed=asked.seed, values=pairs)

    with console.Bar("step") as bar:

        def progress(p: Any) -> None:
            bar.show(p.step, p.steps, console.training_words(p))

        if asked.resume is not None:
            if asked.out is not None or asked.recipe is not None:
                raise UsageError(
                    "--resume goes on with a run's own recipe in its own folder; leave out --out and --recipe."
                )
            result = loop.resume(
                asked.resume,
                task=asked.task,
                device=asked.device,
                workers=asked.workers,
                progress=progress,
                say=console.say,
                expect=adapted,
            )
        elif asked.data is None:
            raise UsageError(
                f"{asked.task} train needs DATA, a folder; `residuum {asked.task} train --help` says of which form."
            )
        else:
            complete = adapted(recipes.named(asked.recipe or DENSE_DEFAULTS[asked.task], asked.task))
            place, kind = Path("data"), asked.device or "auto"
            result = loop.start(complete, asked.out, place, kind, progress, console.say, asked.workers)
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
    from residuum.records import writing_error

    entries, failed = [], []
    for each in answers:
        entry = each.to_json()
        if each.error:
            failed.append(each.error)
        elif out is not None and each.drawn is not None:
            file = _free(out, Path(each.name).stem, suffix)
            try:
                out.mkdir(parents=True, exist_ok=True)
                each.drawn.save(file)
            except OSError as error:
                raise writing_error(file, error) from error
            entry["drawn"] = str(file)
        entries.append(entry)
    console.print_json({"predictions": entries})
    if failed:
        raise DataError(f"{len(failed):,} of {len(entries):,} pictures could not be read: {failed[0]}")


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
