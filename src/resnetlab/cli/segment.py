"""`resnetlab segment train`, `evaluate`, `predict` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from resnetlab.cli import annotated, console
from resnetlab.formatting import format_percent


def train(
    data: str | None = None,
    /,
    *,
    on_bad_mask: str | None = None,
    options: annotated.TrainOptions = annotated.DEFAULT_OPTIONS,
) -> None:
    """Train a segmenter, a fully convolutional head on a residual network; write a run folder with the model and a report.

    Example: `resnetlab segment train cells --set head=deeplab`

    Parameters
    ----------
    data
        A folder in Pascal VOC's format (SegmentationClass/, JPEGImages/, ImageSets/Segmentation/, classes.txt) or with COCO's
        JSON.
    on_bad_mask
        stop at an invalid mask or image, or skip it: left out, and listed in the run folder.
    """
    result = annotated.train_annotated("segment", data, options, {"on_bad_mask": on_bad_mask})
    if result is None:
        return None
    if options.json:
        return console.print_json(result.to_json())
    rows = {
        f"{result.split} mean IoU": f"{result.mean_iou:.3f}",
        "wrong pixels": format_percent(result.pixel_error),
    }
    annotated.print_result(result, list(rows.items()))
    return _print_mask_classes(result.per_class)


def evaluate(
    model: Path,
    /,
    *,
    data: Path,
    split: str = "test",
    on_bad_mask: str = "stop",
    precision: str = "auto",
    device: str = "auto",
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Evaluate a segmenter: intersection over union of each class and their mean, on images at their own size.

    Example: `resnetlab segment evaluate runs/cells/model.safetensors --data cells`

    Parameters
    ----------
    model
        A segmenter's model file.
    data
        A folder in Pascal VOC's format or with COCO's JSON.
    split
        test (the split to evaluate on, whatever its name is), train, or any other split of the data.
    on_bad_mask
        stop at an invalid mask or image, or skip it: then it is listed and not counted.
    precision
        fp32, bf16, or auto: bf16 if the hardware supports it.
    device
        cpu, cuda, cuda:1, …; auto uses a GPU if there is one.
    json
        Print the metrics as one JSON document.
    """
    from resnetlab.inference.annotated import evaluate_segmenter

    with console.ProgressBar("images") as bar:
        metrics = evaluate_segmenter(
            model, data, split=split, on_bad=on_bad_mask, precision=precision, device=device, on_progress=bar.update
        )
    if skipped := metrics.get("skipped"):
        console.log(f"{len(skipped):,} masks or images were left out and are not counted: {', '.join(skipped)}")
    if json:
        return console.print_json(metrics)
    print(f"{model} on the {metrics['split']} split of {data}, {metrics['n']:,} images")
    print(f"mean IoU {metrics['mean_iou']:.3f}, wrong pixels {format_percent(metrics['pixel_error'])}\n")
    return _print_mask_classes(metrics["per_class"])


def predict(
    model: Path,
    /,
    *images: str,
    out: Path | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> None:
    """Segment images; print each class's fraction as JSON, and write each image tinted by class as a PNG.

    Example: `resnetlab segment predict runs/cells/model.safetensors smear.jpg --out found`

    An unreadable image gives an entry with the reason; the other images are still predicted, and the exit code is 1.

    Parameters
    ----------
    model
        A segmenter's model file.
    images
        Images, or folders of images.
    out
        Folder for the tinted images, NAME.mask.png; by default none are written.
    precision
        fp32, bf16 or auto.
    device
        cpu, cuda, cuda:1, …; auto uses a GPU if there is one.
    """
    from resnetlab.inference.annotated import open_annotated_model, predict_segmentations

    files = annotated.list_image_paths(images)
    opened = open_annotated_model(model, "segment", precision, device)
    annotated.print_annotated_predictions(predict_segmentations(*opened, files), out, "mask")


def export(
    model: Path,
    /,
    *images: str,
    out: Path,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Export the model as an ONNX graph, and check it: agreement with PyTorch and largest difference on images.

    Example: `resnetlab segment export runs/cells/model.safetensors JPEGImages --out cells.onnx`

    Parameters
    ----------
    model
        A segmenter's model file.
    images
        Images, or folders of images, that the graph is checked on.
    out
        The file to write, ending in .onnx.
    json
        Print the check as one JSON document.
    """
    annotated.export_annotated_model(model, "segment", images, out, json)


def _print_mask_classes(rows: list[dict[str, Any]]) -> None:
    table = [(r["class"], f"{r['pixels']:,}", "–" if r["iou"] is None else f"{r['iou']:.3f}") for r in rows]
    console.print_table("", ("class", "pixels", "IoU"), table, right=(1, 2))
