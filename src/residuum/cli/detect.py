"""`residuum detect train`, `evaluate`, `predict`, `export` and `localise`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from residuum.cli import console, dense

if TYPE_CHECKING:
    from residuum.models.values import Additions


def train(data: str | None = None, /, *, on_bad_box: str | None = None, asked: dense.Asked = dense.NOTHING) -> None:
    """Train a detector, a Faster R-CNN on a residual network; write a run folder with the model and a report.

    Example: `residuum detect train blood-cells --steps 1000`

    Parameters
    ----------
    data
        A folder in Pascal VOC's form (Annotations/, JPEGImages/, ImageSets/Main/) or with COCO's JSON (train.json, val.json, or
        annotations/instances_train.json and so on).
    on_bad_box
        stop at a box or picture that cannot be right, or skip it: left out, and listed in the run folder.
    """
    result = dense.train("detect", data, asked, {"on_bad_box": on_bad_box})
    if result is None:
        return None
    if asked.json:
        return console.print_json(result.to_json())
    merits = {f"{result.split} mAP@.5": result.map_50, "mAP@[.5:.95]": result.map, "VOC mAP": result.voc_map}
    dense.print_result(result, [(name, f"{value:.3f}") for name, value in merits.items()])
    return _print_classes(result.per_class)


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
    """Judge a detector: mean average precision as COCO and as Pascal VOC count it, per class.

    Example: `residuum detect evaluate runs/blood-cells/model.safetensors --data blood-cells`

    Parameters
    ----------
    model
        A detector's model file.
    data
        A folder in Pascal VOC's form or with COCO's JSON.
    split
        test (what the data are judged by, whatever it is called), train, or any split that they have.
    scales
        Multi-scale testing (2015, appendix B): shorter sides in pixels, such as 240,300,360; regions take the better two.
    refine
        Box refinement with voting (2015, appendix B).
    on_bad_box
        stop at a box or picture that cannot be right, or skip it: then it is named and not counted.
    precision
        fp32, bf16, or auto: bf16 where the hardware computes it.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    json
        Print the figures as one JSON document.
    """
    from residuum.use.dense import evaluate_boxes

    with console.Bar("pictures") as bar:
        figures = evaluate_boxes(
            model,
            data,
            split=split,
            testing=_testing(scales, refine),
            on_bad=on_bad_box,
            precision=precision,
            device=device,
            progress=bar.show,
        )
    if skipped := figures.get("skipped"):
        console.say(f"{len(skipped):,} boxes or pictures were left out and are not counted: {', '.join(skipped)}")
    if json:
        return console.print_json(figures)
    print(f"{model} on the {figures['split']} split of {data}, {figures['n']:,} pictures, {figures['boxes']:,} boxes")
    if additions := _additions(figures):
        print(f"with {additions} (2015, appendix B)")
    print(f"mAP@.5 {figures['map_50']:.3f}, mAP@[.5:.95] {figures['map']:.3f}, VOC mAP {figures['voc_map']:.3f}\n")
    return _print_classes(figures["per_class"])


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
    """Find objects on pictures: JSON on standard output, and each picture with its boxes drawn, as a PNG.

    Example: `residuum detect predict runs/blood-cells/model.safetensors smear.jpg --out found`

    A picture that cannot be read gives an entry with the reason; the others are still looked at, and the exit code is 1.

    Parameters
    ----------
    model
        A detector's model file.
    images
        Pictures, or folders of pictures.
    out
        Folder for the drawn pictures, NAME.boxes.png; by default they are not drawn.
    score
        Least score of a box.
    scales
        Multi-scale testing: shorter sides in pixels, such as 240,300,360.
    refine
        Box refinement with voting.
    precision
        fp32, bf16 or auto.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    """
    from residuum.use import dense as use

    files = dense.pictures(images)
    bundle, engine = use.load(model, "detect", precision, device)
    dense.answer(use.detections(bundle, engine, files, _testing(scales, refine), score), out, "boxes")


def export(
    model: Path,
    /,
    *images: str,
    out: Path,
    json: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Write the model as an ONNX graph, and prove it: agreement and largest difference to PyTorch on pictures.

    Example: `residuum detect export runs/cells/model.safetensors JPEGImages --out cells.onnx`

    Parameters
    ----------
    model
        A detector's model file.
    images
        Pictures, or folders of pictures, that the graph is proved on.
    out
        The file to write, ending in .onnx.
    json
        Print the proof as one JSON document.
    """
    dense.export(model, "detect", images, out, json)


def _testing(scales: str | None, refine: bool) -> Additions:
    from residuum.models.values import Additions

    return Additions(dense.numbers("--scales", scales), refine)


def _additions(figures: dict[str, Any]) -> str:
    """Which of the paper's additions were on."""
    scales = f"multi-scale testing at {', '.join(map(str, figures['scales']))}" if figures["scales"] else ""
    given = [figures["refine"] and "box refinement with voting", scales, figures["context"] and "global context"]
    return " and ".join(filter(None, given))


def _print_classes(rows: list[dict[str, Any]]) -> None:
    shown = [
        (
            row["class"],
            f"{row['n']:,}",
            *("–" if row[k] is None else f"{row[k]:.3f}" for k in ("ap_50", "ap", "voc_ap")),
        )
        for row in rows
    ]
    console.print_table("", ("class", "boxes", "AP@.5", "AP@[.5:.95]", "VOC AP"), shown, right=(1, 2, 3, 4))


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
    """Hold a classifier's Grad-CAM boxes against given ones: how far it knows where things are, never having seen a box.

    Example: `residuum detect localise runs/photos/model.safetensors --data boxes --out places`

    Parameters
    ----------
    model
        A classifier's model file, or a publisher's name.
    data
        A folder in Pascal VOC's form or with COCO's JSON. Where classes have the model's names, only boxes of the answer count.
    split
        test (what the data are judged by, whatever it is called), train, or any split that they have.
    out
        Folder for pictures with the box and the given ones, NAME.place.png; by default they are not drawn.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    json
        Print the figures as one JSON document, a picture a row.
    """
    from residuum.use.localise import figures, localise
    from residuum.use.predict import load

    with console.Bar("pictures") as bar:
        placed = list(localise(load(model, device=device), data, split, bar.show))
    if out is not None:
        for each in placed:
            dense.save(each.drawn(), out, each.picture.file.stem, "place")
    found = {"model": model, "data": str(data), "split": split} | figures(placed)
    if json:
        rows = [{"image": p.picture.name, "class": p.said, "score": round(p.score, 6), "box": p.box.tolist(), "iou": p.iou}
                for p in placed]  # fmt: skip
        return console.print_json(found | {"pictures": rows})
    print(f"{model} on the {split} split of {data}, {found['n']:,} pictures with boxes")
    return print(
        f"localisation error {console.percent(found['localisation_error'])} (no given box covered with IoU .5), "
        f"mean IoU with the nearest {found['mean_iou']:.3f}"
    )
