"""`resnetlab detect train`, `evaluate`, `predict`, `export` and `localise`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from resnetlab.cli import annotated, console
from resnetlab.formatting import format_percent

if TYPE_CHECKING:
    from resnetlab.models.head_spec import DetectionOptions


def train(
    data: str | None = None,
    /,
    *,
    on_bad_box: str | None = None,
    options: annotated.TrainOptions = annotated.DEFAULT_OPTIONS,
) -> None:
    """Train a detector, a Faster R-CNN on a residual network; write a run folder with the model and a report.

    Example: `resnetlab detect train blood-cells --steps 1000`

    Parameters
    ----------
    data
        A folder in Pascal VOC's format (Annotations/, JPEGImages/, ImageSets/Main/) or with COCO's JSON (train.json, val.json,
        or annotations/instances_train.json and so on).
    on_bad_box
        stop at an invalid box or image, or skip it: left out, and listed in the run folder.
    """
    result = annotated.train_annotated("detect", data, options, {"on_bad_box": on_bad_box})
    if result is None:
        return None
    if options.json:
        return console.print_json(result.to_json())
    rows = {f"{result.split} mAP@.5": result.map_50, "mAP@[.5:.95]": result.map, "VOC mAP": result.voc_map}
    annotated.print_result(result, [(name, f"{value:.3f}") for name, value in rows.items()])
    return _print_box_classes(result.per_class)


def evaluate(
    model: Path,
    /,
    *,
    data: Path,
    split: str = "test",
    scales: str | None = None,
    refine: bool = False,
    on_bad_box: str = "stop",
    precision: str = "auto",
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Evaluate a detector: mean average precision by COCO's and Pascal VOC's rules, per class.

    Example: `resnetlab detect evaluate runs/blood-cells/model.safetensors --data blood-cells`

    Parameters
    ----------
    model
        A detector's model file.
    data
        A folder in Pascal VOC's format or with COCO's JSON.
    split
        test (the split to evaluate on, whatever its name is), train, or any other split of the data.
    scales
        Multi-scale testing (2015, appendix B): shorter sides in pixels, such as 240,300,360; each region
        uses the two that suit it best.
    refine
        Box refinement with voting (2015, appendix B).
    on_bad_box
        stop at an invalid box or image, or skip it: then it is listed and not counted.
    precision
        fp32, bf16, or auto: bf16 if the hardware supports it.
    device
        cpu, cuda, cuda:1, …; auto uses a GPU if there is one.
    json
        Print the metrics as one JSON document.
    """
    from resnetlab.inference.annotated import evaluate_detector

    with console.ProgressBar("images") as bar:
        metrics = evaluate_detector(
            model,
            data,
            split=split,
            testing=_detection_options(scales, refine),
            on_bad=on_bad_box,
            precision=precision,
            device=device,
            on_progress=bar.update,
        )
    if skipped := metrics.get("skipped"):
        console.log(f"{len(skipped):,} boxes or images were left out and are not counted: {', '.join(skipped)}")
    if json:
        return console.print_json(metrics)
    print(f"{model} on the {metrics['split']} split of {data}, {metrics['n']:,} images, {metrics['boxes']:,} boxes")
    if additions := _describe_additions(metrics):
        print(f"with {additions} (2015, appendix B)")
    print(f"mAP@.5 {metrics['map_50']:.3f}, mAP@[.5:.95] {metrics['map']:.3f}, VOC mAP {metrics['voc_map']:.3f}\n")
    return _print_box_classes(metrics["per_class"])


def predict(
    model: Path,
    /,
    *images: str,
    out: Path | None = None,
    score: float = 0.5,
    scales: str | None = None,
    refine: bool = False,
    precision: str = "fp32",
    device: str = "auto",
) -> None:
    """Find objects in images; print JSON, and write each image with its boxes as a PNG.

    Example: `resnetlab detect predict runs/blood-cells/model.safetensors smear.jpg --out found`

    An unreadable image gives an entry with the reason; the other images are still predicted, and the exit code is 1.

    Parameters
    ----------
    model
        A detector's model file.
    images
        Images, or folders of images.
    out
        Folder for the images with boxes, NAME.boxes.png; by default none are written.
    score
        Minimum score of a box.
    scales
        Multi-scale testing: shorter sides in pixels, such as 240,300,360.
    refine
        Box refinement with voting.
    precision
        fp32, bf16 or auto.
    device
        cpu, cuda, cuda:1, …; auto uses a GPU if there is one.
    """
    from resnetlab.inference.annotated import open_annotated_model, predict_detections

    files = annotated.list_image_paths(images)
    opened = open_annotated_model(model, "detect", precision, device)
    predictions = predict_detections(*opened, files, _detection_options(scales, refine), score)
    annotated.print_annotated_predictions(predictions, out, "boxes")


def export(
    model: Path,
    /,
    *images: str,
    out: Path,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Export the model as an ONNX graph, and check it: agreement with PyTorch and largest difference on images.

    Example: `resnetlab detect export runs/cells/model.safetensors JPEGImages --out cells.onnx`

    Parameters
    ----------
    model
        A detector's model file.
    images
        Images, or folders of images, that the graph is checked on.
    out
        The file to write, ending in .onnx.
    json
        Print the check as one JSON document.
    """
    annotated.export_annotated_model(model, "detect", images, out, json)


def _detection_options(scales: str | None, refine: bool) -> DetectionOptions:
    from resnetlab.models.head_spec import DetectionOptions

    return DetectionOptions(annotated.parse_integers("--scales", scales), refine)


def _describe_additions(metrics: dict[str, Any]) -> str:
    """The paper's additions that were on."""
    scales = f"multi-scale testing at {', '.join(map(str, metrics['scales']))}" if metrics["scales"] else ""
    additions = [metrics["refine"] and "box refinement with voting", scales, metrics["context"] and "global context"]
    return " and ".join(filter(None, additions))


def _print_box_classes(rows: list[dict[str, Any]]) -> None:
    table = [
        (
            row["class"],
            f"{row['n']:,}",
            *("–" if row[k] is None else f"{row[k]:.3f}" for k in ("ap_50", "ap", "voc_ap")),
        )
        for row in rows
    ]
    console.print_table("", ("class", "boxes", "AP@.5", "AP@[.5:.95]", "VOC AP"), table, right=(1, 2, 3, 4))


def localise(
    model: str,
    /,
    *,
    data: Path,
    split: str = "test",
    out: Path | None = None,
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Compare a classifier's Grad-CAM boxes with true boxes: how well it localises objects without training on boxes.

    Example: `resnetlab detect localise runs/photos/model.safetensors --data boxes --out places`

    Parameters
    ----------
    model
        A classifier's model file, or a publisher's name.
    data
        A folder in Pascal VOC's format or with COCO's JSON. If classes have the model's names, only boxes of the predicted
        class count.
    split
        test (the split to evaluate on, whatever its name is), train, or any other split of the data.
    out
        Folder for images with the predicted and true boxes, NAME.place.png; by default none are written.
    device
        cpu, cuda, cuda:1, …; auto uses a GPU if there is one.
    json
        Print the metrics as one JSON document, with one row per image.
    """
    from resnetlab.inference.localization import localize_objects, summarize_localization
    from resnetlab.inference.predict import load

    with console.ProgressBar("images") as bar:
        results = list(localize_objects(load(model, device=device), data, split, bar.update))
    if out is not None:
        for result in results:
            annotated.save_overlay(result.draw(), out, result.image.file.stem, "place")
    metrics = {"model": model, "data": str(data), "split": split} | summarize_localization(results)
    if json:
        rows = [
            {
                "image": r.image.name,
                "class": r.predicted_class,
                "score": round(r.score, 6),
                "box": r.box.tolist(),
                "iou": r.iou,
            }
            for r in results
        ]
        return console.print_json(metrics | {"images": rows})
    print(f"{model} on the {split} split of {data}, {metrics['n']:,} images with boxes")
    return print(
        f"localisation error {format_percent(metrics['localisation_error'])} (IoU with every true box below .5), "
        f"mean IoU with the nearest {metrics['mean_iou']:.3f}"
    )
