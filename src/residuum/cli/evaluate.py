"""`residuum evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from residuum.cli import console


def evaluate(
    model: Path,
    /,
    *,
    data: str,
    split: str = "test",
    data_dir: Path = Path("data"),
    on_bad_image: str = "stop",
    precision: str = "auto",
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Judge a model: top-1 and top-5 error with a 95 % interval, per class, calibration, confusion.

    Example: `residuum evaluate runs/digits/model.safetensors --data digits`

    Parameters
    ----------
    model
        A model file.
    data
        Data set: digits, cifar10, or a folder of class folders.
    split
        test, train, or any split that the data have (val, held-out, all). A folder's val is its test where it has no other.
    data_dir
        Where archives lie.
    on_bad_image
        stop at a picture that cannot be read, or skip it: then it is named and not counted.
    precision
        fp32, bf16, or auto: bf16 where the hardware computes it.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    json
        Print the figures as one JSON document.
    """
    from residuum.evaluation.evaluate import evaluate as judge

    with console.Bar("pictures") as bar:
        judgement = judge(
            model,
            data,
            split=split,
            data_dir=data_dir,
            on_bad_image=on_bad_image,
            precision=precision,
            device=device,
            progress=bar.show,
        )
    split = judgement.split
    skipped = {"skipped": dict(judgement.skipped)} if judgement.skipped else {}
    if judgement.skipped:
        console.say(
            f"{len(judgement.skipped):,} pictures could not be read and are not counted: {', '.join(judgement.skipped)}"
        )
    figures = judgement.to_json()
    if json:
        return console.print_json(
            {"model": str(model), "data": data, "split": split, "protocol": "1crop"} | figures | skipped
        )
    low, high = figures["top1_interval"]
    print(f"{model} on the {split} split of {data}, {judgement.n:,} pictures, one view each")
    print(f"top-1 error {console.percent(judgement.top1_error)}  (95 % interval {100 * low:.2f} to {100 * high:.2f} %)")
    if len(judgement.classes) > 5:
        print(f"top-5 error {console.percent(judgement.top5_error)}")
    print(f"expected calibration error {console.percent(judgement.calibration_error)}\n")
    errors = {c["class"]: c for c in figures["per_class"]}
    rows = [
        (
            name,
            f"{c['n']:,}",
            "–" if c["top1_error"] is None else console.percent(c["top1_error"]),
            _confused(judgement.classes, row, i),
        )
        for i, ((name, c), row) in enumerate(zip(errors.items(), figures["confusion"], strict=True))
    ]
    console.print_table("", ("class", "n", "top-1 error", "taken for"), rows, right=(1, 2))
    return None


def _confused(classes: tuple[str, ...], row: list[int], own: int) -> str:
    """The classes that pictures of class `own` are most often taken for."""
    wrong = sorted(((n, classes[i]) for i, n in enumerate(row) if n and i != own), reverse=True)
    return ", ".join(f"{name} ({n})" for n, name in wrong[:3])
