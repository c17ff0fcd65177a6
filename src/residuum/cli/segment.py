"""`residuum segment train`, `evaluate` and `predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from residuum.cli import console, dense


def train(data: str | None = None, /, *, on_bad_mask: str | None = None, asked: dense.Asked = dense.NOTHING) -> None:
    """Train a segmenter, a fully convolutional head on a residual network; write a run folder with the model and a report.

    Example: `residuum segment train cells --set head=deeplab`

    Parameters
    ----------
    data
        A folder in Pascal VOC's form (SegmentationClass/, JPEGImages/, ImageSets/Segmentation/, classes.txt) or with COCO's
        JSON.
    on_bad_mask
        stop at a mask or picture that cannot be right, or skip it: left out, and listed in the run folder.
    """
    result = dense.train("segment", data, asked, {"on_bad_mask": on_bad_mask})
    if result is None:
        return None
    if asked.json:
        return console.print_json(result.to_json())
    merits = {f"{result.split} mean IoU": f"{result.mean_iou:.3f}", "wrong pixels": console.percent(result.pixel_error)}
    dense.print_result(result, list(merits.items()))
    return _print_classes(result.per_class)


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
    """Judge a segmenter: intersection over union of each class and their mean, on pictures at their own size.

    Example: `residuum segment evaluate runs/cells/model.safetensors --data cells`

    Parameters
    ----------
    model
        A segmenter's model file.
    data
        A folder in Pascal VOC's form or with COCO's JSON.
    split
        test (what the data are judged by, whatever it is called), train, or any split that they have.
    on_bad_mask
        stop at a mask or picture that cannot be right, or skip it: then it is named and not counted.
    precision
        fp32, bf16, or auto: bf16 where the hardware computes it.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    json
        Print the figures as one JSON document.
    """
    from residuum.use.dense import evaluate_masks

    with console.Bar("pictures") as bar:
        figures = evaluate_masks(
            model, data, split=split, on_bad=on_bad_mask, precision=precision, device=device, progress=bar.show
        )
    if skipped := figures.get("skipped"):
        console.say(f"{len(skipped):,} masks or pictures were left out and are not counted: {', '.join(skipped)}")
    if json:
        return console.print_json(figures)
    print(f"{model} on the {figures['split']} split of {data}, {figures['n']:,} pictures")
    print(f"mean IoU {figures['mean_iou']:.3f}, wrong pixels {console.percent(figures['pixel_error'])}\n")
    return _print_classes(figures["per_class"])


def predict(
    model: Path,
    /,
    *images: str,
    out: Path | None = None,
    precision: str = "fp32",
    device: str = "auto",
) -> None:
    """Say what pixels show: each class's share as JSON on standard output, and each picture tinted by class, as a PNG.

    Example: `residuum segment predict runs/cells/model.safetensors smear.jpg --out found`

    A picture that cannot be read gives an entry with the reason; the others are still looked at, and the exit code is 1.

    Parameters
    ----------
    model
        A segmenter's model file.
    images
        Pictures, or folders of pictures.
    out
        Folder for the tinted pictures, NAME.mask.png; by default they are not drawn.
    precision
        fp32, bf16 or auto.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    """
    from residuum.use import dense as use

    files = dense.pictures(images)
    bundle, engine = use.load(model, "segment", precision, device)
    dense.answer(use.segmentations(bundle, engine, files), out, "mask")


def export(
    model: Path,
    /,
    *images: str,
    out: Path,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the model as an ONNX graph, and prove it: agreement and largest difference to PyTorch on pictures.

    Example: `residuum segment export runs/cells/model.safetensors JPEGImages --out cells.onnx`

    Parameters
    ----------
    model
        A segmenter's model file.
    images
        Pictures, or folders of pictures, that the graph is proved on.
    out
        The file to write, ending in .onnx.
    json
        Print the proof as one JSON document.
    """
    dense.export(model, "segment", images, out, json)


def _print_classes(rows: list[dict[str, Any]]) -> None:
    shown = [(r["class"], f"{r['pixels']:,}", "–" if r["iou"] is None else f"{r['iou']:.3f}") for r in rows]
    console.print_table("", ("class", "pixels", "IoU"), shown, right=(1, 2))
