"""`resnetlab evaluate`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter

from resnetlab.cli import console
from resnetlab.cli.options import DataDir, Device, Flag, Json, Precision, Refine, Scales
from resnetlab.cli.predict import configure_detector
from resnetlab.errors import RunError, UsageError
from resnetlab.formatting import format_count, format_known, format_percent, format_split_of
from resnetlab.process_place import read_process_place

if TYPE_CHECKING:
    from resnetlab.evaluation.corruptions import CorruptionErrors
    from resnetlab.evaluation.evaluate import Evaluation, MultiLabelEvaluation
    from resnetlab.inference.annotated import Detector, Segmenter

CLASSIFIER_EVALUATION = {  # options that only classifiers have
    "protocol", "weights", "fit_temperature", "save_temperature", "data_dir", "quarantine", "out", "predictions", "classes",
    "corrupted", "decode_on",
}  # fmt: skip


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class CorruptionOptions:
    """The options of an evaluation on corrupted images.

    Parameters
    ----------
    corruptions
        Evaluate on corrupted copies of the images too (Hendrycks & Dietterich 2019): all, or kinds separated by commas, such as
        gaussian_noise,fog.
    severities
        Of the corruptions, 1 to 5.
    baseline
        What the mean corruption error is relative to: a model file of the same classes, or alexnet for its published errors on
        ImageNet, which is the default for data with all of ImageNet's classes.
    seed
        Of the corruptions' random numbers.
    """

    corruptions: str | None = None
    severities: str = "1,2,3,4,5"
    baseline: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Raises UsageError, before any work is done, for an unknown kind or severity, or a baseline of nothing."""
        from resnetlab.evaluation.corruptions import parse_corruptions

        if self.corruptions is not None:
            parse_corruptions(self.corruptions, self.severities)
        elif self != NO_CORRUPTIONS:
            raise UsageError("--severities, --baseline and --seed are for --corruptions; give that too.")

    def evaluate(self, evaluation: Evaluation, precision: str, device: str) -> Evaluation:
        """The evaluation with the errors on corrupted images, if they are asked for."""
        if self.corruptions is None:
            return evaluation
        from resnetlab.evaluation.corruptions import parse_corruptions
        from resnetlab.evaluation.robustness import ALEXNET, evaluate_corruptions
        from resnetlab.inference.download import load_or_download

        choice = parse_corruptions(self.corruptions, self.severities, self.seed)
        baseline = self.baseline if self.baseline in (None, ALEXNET) else load_or_download(self.baseline)
        with console.ProgressBar("corrupted images") as bar:
            return evaluate_corruptions(
                evaluation, choice, baseline=baseline, precision=precision, device=device, progress=bar.update
            )


NO_CORRUPTIONS = CorruptionOptions()


def evaluate(
    *models: str,
    data: str,
    protocol: str = "1crop",
    weights: str | None = None,
    split: str = "test",
    classes: str = "all",
    corrupted: CorruptionOptions = NO_CORRUPTIONS,
    fit_temperature: str | None = None,
    save_temperature: Flag = False,
    data_dir: DataDir = Path("data"),
    on_bad_image: Annotated[str, Parameter(name=("--on-bad-image", "--on-bad-box", "--on-bad-mask"))] = "stop",
    scales: Scales = None,
    refine: Refine = False,
    quarantine: Path | None = None,
    decode_on: str = "cpu",
    precision: Precision = "auto",
    device: Device = "auto",
    out: Path | None = None,
    predictions: Path | None = None,
    json: Json = False,
) -> None:
    """Evaluate a model, or several as an ensemble: errors with a 95 % interval, calibration, confusion; mAP; IoU.

    Example: `resnetlab evaluate runs/digits/model.safetensors --data digits --protocol 1crop`

    Under torchrun the processes share the images: `torchrun --nproc-per-node 2 -m resnetlab evaluate …`

    Parameters
    ----------
    models
        Model files, or publishers' names such as torchvision:resnet50.IMAGENET1K_V2. The scores of several are averaged, their
        classes matched by name; several detectors classify the union of their proposals (2015, appendix B).
    data
        Data set: digits, cifar10, cifar100, a folder of class folders (or a zip or tar of one), a table of paths and labels, or
        a pattern of tar shards. For a detector or segmenter a folder as the tool wrote it: VOC, COCO, YOLO, mask
        files and others.
    protocol
        Test protocol: 1crop, flip, 10crop, dense:320, multiscale:224,256,384,480,640. Options follow with +, such as
        10crop+logits (logits averaged, not scores), multiscale:224,256+noflip or dense:320+window (scores at every position).
    weights
        Of the ensemble's members, in their order, separated by commas; equal ones by default.
    split
        test, train, or any split of the data (val, held-out, all). A folder's val is its test where it has no other; for
        a folder with neither, the images that the model's own run held out are evaluated.
    classes
        Where the data have only some of the model's classes, such as ten of ImageNet's 1,000: all scores over all outputs, data
        over the data's classes alone. Classes are matched by name.
    fit_temperature
        Fit each model's temperature first: on another split, or on this number of images of the evaluated split, which are then
        left out of the evaluation.
    save_temperature
        Write the fitted temperatures into the model files.
    on_bad_image
        stop at an image that cannot be read (or an invalid box or mask), or skip it: then it is listed and not counted.
    quarantine
        A file that lists images to leave out, as written by `resnetlab data check --quarantine`.
    decode_on
        device lets a GPU decode JPEGs and resize images, where the processors are too slow for it; the scores differ a little
        from those of cpu.
    out
        Folder for evaluation.json and evaluation.html; by default the first model's, or a folder in it named after the data,
        split and protocol if those of another evaluation are there.
    predictions
        Write the prediction for each image to this file, .csv or .parquet.
    """
    from resnetlab.evaluation.evaluate import evaluate as evaluate_models
    from resnetlab.inference.download import find_model, find_trained, get_scheme, load_or_download
    from resnetlab.models.annotated_model import TASK_NOUNS, read_task

    _check_argument_order(models, data)
    _check_out(out)
    given, models = models, tuple(map(find_model, models))
    task = next((task for task in map(read_task, map(Path, models)) if task != "classify"), None)
    if task is not None:
        own = {"weights": weights, "fit_temperature": fit_temperature, "quarantine": quarantine, "out": out}
        is_set = {name: value is not None for name, value in (own | {"predictions": predictions}).items()}
        is_set |= {"save_temperature": save_temperature, "protocol": protocol != "1crop", "classes": classes != "all"}
        is_set |= {"decode_on": decode_on != "cpu", "data_dir": data_dir != Path("data")}
        console.refuse_options(TASK_NOUNS[task], is_set | {"corruptions": corrupted != NO_CORRUPTIONS})
        predictor = configure_detector(_open_annotated(models, task, precision, device), scales, refine)
        return _evaluate_annotated(predictor, Path(data), split, on_bad_image, json)
    console.refuse_options("a classifier", {"scales": scales is not None, "refine": refine})
    _check_inputs(data, predictions, [*models, data, *filter(None, [quarantine])])
    corrupted.check()
    if save_temperature and (fit_temperature is None or any(get_scheme(m) or find_trained(m) for m in given)):
        raise UsageError("--save-temperature needs --fit-temperature and model files; import published weights first.")
    with console.ProgressBar("images") as bar:
        evaluation = evaluate_models(
            [load_or_download(model) for model in models],
            data,
            protocol=protocol,
            weights=None if weights is None else console.parse_numbers("--weights", weights, "2,1,1"),
            split=split,
            fit_on=fit_temperature,
            classes=classes,
            names=models,
            data_dir=data_dir,
            on_bad_image=on_bad_image,
            quarantine=quarantine or "",
            decode_on=decode_on,
            precision=precision,
            device=device,
            progress=bar.update,
        )
    evaluation = corrupted.evaluate(evaluation, precision, device)
    if read_process_place().rank:
        return None
    for path, model in zip(models, evaluation.trained_models, strict=True) if save_temperature else ():
        model.save(Path(path))
    _write_files(evaluation, Path(models[0]).parent, out, predictions)
    return console.print_json(evaluation.to_json()) if json else _print_evaluation(evaluation)


def _check_inputs(data: str, file: Path | None, inputs: Sequence[str | Path]) -> None:
    """Raises, before any work is done, for data that are not there, or a file of predictions that cannot be written.

    A file that is an input cannot be written.
    """
    from resnetlab.data.sources import refuse_missing
    from resnetlab.evaluation.predictions import check_table_file
    from resnetlab.run_folder import check_output_file

    refuse_missing(data)
    if file is not None:
        check_table_file(file)
        check_output_file(file, inputs, "--predictions")


def _write_files(evaluation: Evaluation, default: Path, out: Path | None, predictions: Path | None) -> None:
    """Logs warnings, and writes the page into `out`, by default into `default` if that is possible, and the predictions."""
    from resnetlab.evaluation.page import write_evaluation
    from resnetlab.evaluation.predictions import write_predictions

    if skipped := evaluation.metrics.skipped:
        console.log(f"{format_count(len(skipped), 'image')} could not be read and not counted: {', '.join(skipped)}")
    for sentence in evaluation.notes:
        console.log(f"resnetlab: warning: {sentence}.")
    folder = _choose_folder(evaluation, default) if out is None else out
    try:
        write_evaluation(evaluation, folder)
        console.log(f"page: {folder / 'evaluation.html'}")
    except RunError as error:
        if out is not None:
            raise
        console.log(f"resnetlab: warning: no page: {error}")
    if predictions is not None:
        write_predictions(predictions, evaluation.metrics, evaluation.images.names)


def _choose_folder(evaluation: Evaluation, default: Path) -> Path:
    """The folder for the page: `default`, or one in it named after the evaluation if the page of another is there."""
    from json import loads

    from resnetlab.data.sources import short_name

    protocol = str(evaluation.protocol)
    try:
        known = loads((default / "evaluation.json").read_text("utf-8"))
        same = (known["data"], known["split"], known["protocol"]) == (evaluation.data, evaluation.split, protocol)
    except (OSError, ValueError, KeyError, TypeError):
        return default
    views = "" if protocol == "1crop" else f"-{protocol.replace(':', '-')}"
    return default if same else default / f"evaluation-{short_name(evaluation.data)}-{evaluation.split}{views}"


def _check_out(out: Path | None) -> None:
    """Raises UsageError for a file where a folder is meant, or a folder that cannot be written."""
    from resnetlab.run_folder import check_output_folder

    if out is not None and out.suffix in (".html", ".json", ".pdf", ".csv", ".txt", ".md") and not out.is_dir():
        raise UsageError(
            f"--out is a folder, for evaluation.html and evaluation.json, not {out}; --predictions FILE.csv lists images."
        )
    check_output_folder(out)


def _check_argument_order(models: Sequence[str], data: str) -> None:
    """Raises UsageError, with the right command line, if a model file is given as the data."""
    from shlex import join

    if data.endswith(".safetensors") and not any(model.endswith(".safetensors") for model in models):
        line = join(["resnetlab", "evaluate", data, "--data", *models])
        raise UsageError(f"--data takes the images; give the model first: {line}")


def _open_annotated(models: Sequence[str], task: str, precision: str, device: str) -> Detector | Segmenter:
    """Opens a segmenter, or one or several detectors."""
    from resnetlab.inference.annotated import Detector, open_annotated_model

    if len(models) > 1 and task == "segment":
        raise UsageError("only classifiers and detectors are evaluated together; give one segmenter.")
    first, *others = (open_annotated_model(Path(model), task, precision, device) for model in models)
    return first.join(cast("list[Detector]", others)) if isinstance(first, Detector) and others else first


def _evaluate_annotated(predictor: Detector | Segmenter, data: Path, split: str, on_bad: str, json: bool) -> None:
    """Evaluates a detector or segmenter, and prints its metrics."""
    with console.ProgressBar("images") as bar:
        figures = predictor.evaluate(data, split=split, on_bad=on_bad, on_progress=bar.update)
    console.log(f"{figures['data']}: {figures['layout']}")
    if skipped := figures.get("skipped"):
        console.log(f"{len(skipped):,} of the annotations or images were skipped and not counted: {', '.join(skipped)}")
    if json:
        return console.print_json(figures)
    split, images = format_split_of(figures["split"], figures["data"]), format_count(figures["n"], "image")
    models = " + ".join(figures.get("models", [figures["model"]]))
    console.write_line(f"{models} on {split}, {images}")
    if "map" in figures:
        if additions := _describe_additions(figures):
            console.write_line(f"with {additions} (2015, appendix B)")
        console.write_line(
            f"mAP@.5 {figures['map_50']:.3f}, mAP@[.5:.95] {figures['map']:.3f}, VOC mAP {figures['voc_map']:.3f}"
        )
        print()
        return print_box_classes(figures["per_class"], "--json")
    console.write_line(f"mean IoU {figures['mean_iou']:.3f}, wrong pixels {format_percent(figures['pixel_error'])}")
    print()
    return print_mask_classes(figures["per_class"], "--json")


def _describe_additions(figures: dict[str, Any]) -> str:
    """The paper's additions that were on."""
    scales = f"multi-scale testing at {', '.join(map(str, figures['scales']))}" if figures["scales"] else ""
    additions = [figures["refine"] and "box refinement with voting", scales, figures["context"] and "global context"]
    return " and ".join(filter(None, additions))


def print_box_classes(per_class: Sequence[Mapping[str, Any]], complete: str) -> None:
    """Prints a detector's metrics of each class; the file or option `complete` has them too."""
    keys = ("ap_50", "ap", "voc_ap")
    rows = [(row["class"], f"{row['n']:,}", *(format_known(row[key], "{:.3f}") for key in keys)) for row in per_class]
    columns = ("class", "boxes", "AP@.5", "AP@[.5:.95]", "VOC AP")
    console.print_classes(columns, rows, [row["ap_50"] for row in per_class], complete)


def print_mask_classes(per_class: Sequence[Mapping[str, Any]], complete: str) -> None:
    """Prints a segmenter's metrics of each class, likewise."""
    rows = [(row["class"], f"{row['pixels']:,}", format_known(row["iou"], "{:.3f}")) for row in per_class]
    console.print_classes(("class", "pixels", "IoU"), rows, [row["iou"] for row in per_class], complete)


def _print_evaluation(evaluation: Evaluation) -> None:
    """Prints the figures."""
    from resnetlab.evaluation.evaluate import MultiLabelEvaluation

    if isinstance(evaluation, MultiLabelEvaluation):
        _print_multi_label(evaluation)
        return
    metrics, figures = evaluation.metrics, evaluation.to_json()
    split = format_split_of(evaluation.split, evaluation.data)
    console.write_line(
        f"{' + '.join(evaluation.models)} on {split}, {format_count(metrics.n, 'image')}, {evaluation.protocol}"
    )
    if evaluation.scope:
        console.write_line(f"scores are over {evaluation.scope} (--classes all or data)")
    low, high = figures["top1_interval"]
    interval = f"95 % interval {100 * low:.2f} to {100 * high:.2f} %"
    accuracy = format_percent(1 - metrics.top1_error)
    console.write_line(f"top-1 error {format_percent(metrics.top1_error)}  ({interval}; accuracy {accuracy})")
    if len(metrics.classes) > 5:
        console.write_line(f"top-5 error {format_percent(metrics.top5_error)}")
    precision, recall, f1 = (format_percent(figures[key]) for key in ("precision", "recall", "f1"))
    balanced = format_percent(metrics.balanced_error)
    console.write_line(
        f"precision {precision}, recall {recall}, F1 {f1} (means over the classes); balanced error {balanced}"
    )
    console.write_line(f"expected calibration error {format_percent(metrics.calibration_error)}")
    for name, sentence in zip(evaluation.models, evaluation.calibration, strict=True):
        console.write_line(sentence if len(evaluation.models) == 1 else f"{name}: {sentence}")
    if (known := figures["published"]) is not None:
        console.write_line(f"published: top-1 error {format_percent(known['top1_error'])} ({known['source']})")
    print()
    if evaluation.members:
        _print_members(figures)
    if evaluation.corruptions:
        _print_corruptions(evaluation.corruptions)
    keys = ("top1_error", "precision", "recall", "f1")
    confusions = [", ".join(f"{name} ({n})" for name, n in others[:3]) for others in metrics.taken_for]
    classes = [(c, others) for c, others in zip(figures["per_class"], confusions, strict=True) if c["n"]]
    rows = [(c["class"], f"{c['n']:,}", *(format_known(c[key]) for key in keys), others) for c, others in classes]
    columns = ("class", "n", "top-1 error", "precision", "recall", "F1", "taken for")
    console.print_classes(columns, rows, [c["recall"] for c, _ in classes], "evaluation.json or --json")
    for column, values in figures.get("by_column", {}).items():
        print()
        by_value = [(v["value"], f"{v['n']:,}", format_percent(v["top1_error"])) for v in values]
        console.print_table("", (column, "n", "top-1 error"), by_value, right=(1, 2))


def _print_multi_label(evaluation: MultiLabelEvaluation) -> None:
    """Prints the figures of several classes per image."""
    figures = evaluation.to_json()
    split = format_split_of(evaluation.split, evaluation.data)
    count = format_count(evaluation.n, "image")
    console.write_line(f"{evaluation.models[0]} on {split}, {count}, {evaluation.protocol}")
    if evaluation.scope:
        console.write_line(f"figures are over {evaluation.scope}")
    console.write_line(f"mAP {figures['mean_ap']:.3f}")
    precision, recall, f1, micro, label, image = (
        format_percent(figures[key]) for key in ("precision", "recall", "f1", "micro_f1", "label_error", "set_error")
    )
    console.write_line(f"precision {precision}, recall {recall}, F1 {f1} (means over the classes); micro F1 {micro}")
    console.write_line(f"label error {label} (of all decisions), set error {image} (of the images)")
    console.write_line(evaluation.calibration[0])
    print()
    rows = [
        (
            c["class"],
            f"{c['n']:,}",
            f"{c['predicted']:,}",
            format_known(c["ap"], "{:.3f}"),
            *(format_known(c[key]) for key in ("f1", "precision", "recall")),
            f"{c['threshold']:.3f}",
        )
        for c in figures["per_class"]
    ]
    columns = ("class", "n", "predicted", "AP", "F1", "precision", "recall", "threshold")
    console.print_classes(columns, rows, [c["ap"] for c in figures["per_class"]], "evaluation.json or --json")


def _print_corruptions(errors: CorruptionErrors) -> None:
    """Prints the error of every kind and severity, and the means."""
    rows = []
    for kind, row in errors.errors.items():
        means = sum(row) / len(row), errors.corruption_error(kind)
        rows.append((kind, *map(format_known, (*row, *means))))
    columns = ("corruption", *(f"severity {each}" for each in errors.severities), "mean", "relative")
    console.print_table("", columns, rows, right=tuple(range(1, len(columns))))
    console.write_line(
        f"mean error on corrupted images {format_percent(errors.mean_error)}, clean {format_percent(errors.clean_error)}"
    )
    if (mce := errors.mean_corruption_error) is not None:
        console.write_line(f"mean corruption error {format_percent(mce)}, relative to {errors.baseline}")
    print()


def _print_members(figures: dict[str, Any]) -> None:
    """Prints each member beside the ensemble, and the differences between every two."""
    top5 = len(figures["per_class"]) > 5  # of fewer classes it is always 0
    errors = ("top1_error", *(["top5_error"] if top5 else []), "calibration_error")
    rows = [
        (m["model"], f"{m['weight']:.3f}", *(format_percent(m[key]) for key in errors))
        for m in [*figures["members"], figures | {"model": "the ensemble", "weight": 1.0}]
    ]
    columns = ("model", "weight", "top-1 error", *(["top-5 error"] if top5 else []), "calibration error")
    console.print_table("", columns, rows, right=(1, 2, 3, 4))
    print()
    differences = [
        (
            c["a"],
            c["b"],
            format_percent(c["difference"]),
            f"{100 * c['interval'][0]:.2f} to {100 * c['interval'][1]:.2f} %",
            f"{c['p_value']:.2g}",
        )
        for c in figures["comparisons"]
    ]
    columns = ("a", "b", "error of a - b", "95 % (paired bootstrap)", "p (McNemar)")
    console.print_table("", columns, differences, right=(2, 3, 4))
    print()
