"""`residuum evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import RunError, UsageError

if TYPE_CHECKING:
    from residuum.evaluation.evaluate import Evaluation


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
    """Judge a model, or several as an ensemble: errors with a 95 % interval, per class, calibration, confusion.

    Example: `residuum evaluate runs/digits/model.safetensors --data digits --protocol 1crop`

    Under torchrun the processes share the pictures: `torchrun --nproc-per-node 2 -m residuum evaluate …`

    Parameters
    ----------
    models
        Model files, or publishers' names such as torchvision:resnet50.IMAGENET1K_V2. The scores of several are averaged, their
        classes matched by name.
    data
        Data set: digits, cifar10, cifar100, a folder of class folders, or a pattern of tar shards.
    protocol
        How pictures are shown: 1crop, flip, 10crop, dense:320, multiscale:224,256,384,480,640. Options follow with +, such as
        10crop+logits (logits averaged, not scores), multiscale:224,256+noflip or dense:320+window (scores at every position).
    weights
        Of the ensemble's members, in their order, with commas between; equal ones by default.
    split
        test, train, or any split that the data have (val, held-out, all). A folder's val is its test where it has no other; of
        a folder without either, those pictures are judged that the model's own run held out.
    fit_temperature
        Fit each model's temperature first: on another split, or on so many pictures of the judged one, which are then left out
        of the judgement.
    save_temperature
        Write what was fitted into the model files.
    data_dir
        Where archives lie.
    on_bad_image
        stop at a picture that cannot be read, or skip it: then it is named and not counted.
    quarantine
        A list of pictures to leave out, as `residuum data check --quarantine` writes it.
    precision
        fp32, bf16, or auto: bf16 where the hardware computes it.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    out
        Folder for evaluation.json and evaluation.html; by default the first model's.
    predictions
        Write what was said of each picture to this file, .csv or .parquet.
    json
        Print the figures as one JSON document.
    """
    from residuum.evaluation import page
    from residuum.evaluation import predictions as table
    from residuum.evaluation.evaluate import evaluate as judge
    from residuum.use.download import model_of, scheme_of
    from residuum.world import first_process

    if predictions is not None:
        table.check(predictions)
    if save_temperature and (fit_temperature is None or any(map(scheme_of, models))):
        raise UsageError(
            "--save-temperature goes with --fit-temperature, and with model files: import what is downloaded."
        )
    with console.Bar("pictures") as bar:
        evaluation = judge(
            [model_of(model) for model in models],
            data,
            protocol=protocol,
            weights=_numbers(weights),
            split=split,
            fit_on=fit_temperature,
            names=models,
            data_dir=data_dir,
            on_bad_image=on_bad_image,
            quarantine=quarantine or "",
            precision=precision,
            device=device,
            progress=bar.show,
        )
    if not first_process():
        return
    if skipped := evaluation.judgement.skipped:
        console.say(f"{len(skipped):,} pictures could not be read and are not counted: {', '.join(skipped)}")
    for sentence in evaluation.notes:
        console.say(f"residuum: warning: {sentence}.")
    if save_temperature:
        for model, bundle in zip(models, evaluation.bundles, strict=True):
            bundle.save(Path(model))
    folder = Path(models[0]).parent if out is None else out
    try:
        page.write(evaluation, folder)
        console.say(f"page: {folder / 'evaluation.html'}")
    except RunError as error:
        if out is not None:
            raise
        console.say(f"residuum: warning: no page: {error}")
    if predictions is not None:
        table.write(predictions, evaluation.judgement, evaluation.pictures.names)
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
    print(f"expected calibration error {console.percent(judgement.calibration_error)}")
    for name, sentence in zip(evaluation.models, evaluation.calibration, strict=True):
        print(sentence if len(evaluation.models) == 1 else f"{name}: {sentence}")
    if (known := figures["published"]) is not None:
        print(f"published: top-1 error {console.percent(known['top1_error'])} ({known['source']})")
    print()
    if evaluation.members:
        _print_members(figures)
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


def _print_members(figures: dict[str, Any]) -> None:
    """Each member beside the ensemble, and what two of them differ by."""
    errors = ("top1_error", "top5_error", "calibration_error")
    rows = [
        (
            m["model"],
            f"{m['weight']:.3f}",
            *(console.percent(m[key]) for key in errors),
        )
        for m in [*figures["members"], figures | {"model": "the ensemble", "weight": 1.0}]
    ]
    console.print_table(
        "", ("model", "weight", "top-1 error", "top-5 error", "calibration error"), rows, right=(1, 2, 3, 4)
    )
    print()
    differences = [
        (
            c["a"],
            c["b"],
            console.percent(c["difference"]),
            f"{100 * c['interval'][0]:.2f} to {100 * c['interval'][1]:.2f} %",
            f"{c['p_value']:.2g}",
        )
        for c in figures["comparisons"]
    ]
    columns = ("a", "b", "error of a - b", "95 % (paired bootstrap)", "p (McNemar)")
    console.print_table("", columns, differences, right=(2, 3, 4))
    print()


def _confused(classes: tuple[str, ...], row: list[int], own: int) -> str:
    """The classes that pictures of class `own` are most often taken for."""
    wrong = sorted(((n, classes[i]) for i, n in enumerate(row) if n and i != own), reverse=True)
    return ", ".join(f"{name} ({n})" for n, name in wrong[:3])
