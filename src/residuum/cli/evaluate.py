"""`residuum evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import UsageError

if TYPE_CHECKING:
    from residuum.evaluation.evaluate import Evaluation


def evaluate(
    *models: Path,
    data: str,
    protocol: str = "1crop",
    weights: str | None = None,
    split: str = "test",
    data_dir: Path = Path("data"),
    precision: str = "auto",
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Judge a model, or several as an ensemble: errors with a 95 % interval, per class, calibration, confusion.

    Example: `residuum evaluate runs/digits/model.safetensors --data digits --protocol 10crop`

    Under torchrun the processes share the pictures: `torchrun --nproc-per-node 2 -m residuum evaluate …`

    Parameters
    ----------
    models
        Model files. The scores of several are averaged, their classes matched by name.
    data
        Data set: digits or cifar10.
    protocol
        How pictures are shown: 1crop, flip, 10crop, dense:320, multiscale:224,256,384,480,640. Options follow with +, such as
        10crop+logits (logits averaged, not scores), multiscale:224,256+noflip or dense:320+window (scores at every position).
    weights
        Of the ensemble's members, in their order, with commas between; equal ones by default.
    split
        test or train.
    data_dir
        Where archives lie.
    precision
        fp32, bf16, or auto: bf16 where the hardware computes it.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    json
        Print the figures as one JSON document.
    """
    from residuum.evaluation.evaluate import evaluate as judge
    from residuum.runtime import first_process

    with console.Bar("pictures") as bar:
        evaluation = judge(
            models,
            data,
            protocol=protocol,
            weights=_numbers(weights),
            split=split,
            data_dir=data_dir,
            precision=precision,
            device=device,
            progress=bar.show,
        )
    if not first_process():
        return
    if json:
        console.print_json(evaluation.to_json())
    else:
        _print(evaluation)


def _numbers(text: str | None) -> list[float] | None:
    """Weights given as text."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--weights takes numbers with commas between, such as 2,1,1, not {text!r}.") from None


def _print(evaluation: Evaluation) -> None:
    """The figures as text."""
    judgement, figures = evaluation.judgement, evaluation.to_json()
    what = " + ".join(evaluation.models)
    print(
        f"{what} on the {evaluation.split} split of {evaluation.data}, {judgement.n:,} pictures, {evaluation.protocol}"
    )
    low, high = figures["top1_interval"]
    print(f"top-1 error {console.percent(judgement.top1_error)}  (95 % interval {100 * low:.2f} to {100 * high:.2f} %)")
    if len(judgement.classes) > 5:
        print(f"top-5 error {console.percent(judgement.top5_error)}")
    print(f"expected calibration error {console.percent(judgement.calibration_error)}\n")
    rows = [
        (
            c["class"],
            f"{c['n']:,}",
            "–" if c["top1_error"] is None else console.percent(c["top1_error"]),
            _confused(judgement.classes, row, i),
        )
        for i, (c, row) in enumerate(zip(figures["per_class"], figures["confusion"], strict=True))
    ]
    console.print_table("", ("class", "n", "top-1 error", "taken for"), rows, right=(1, 2))


def _confused(classes: tuple[str, ...], row: list[int], own: int) -> str:
    """The classes that pictures of class `own` are most often taken for."""
    wrong = sorted(((n, classes[i]) for i, n in enumerate(row) if n and i != own), reverse=True)
    return ", ".join(f"{name} ({n})" for n, name in wrong[:3])
