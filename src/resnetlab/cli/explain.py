"""`resnetlab explain`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resnetlab.cli import console
from resnetlab.cli.options import Device, Json, ModelName, Precision
from resnetlab.errors import DataError, UsageError
from resnetlab.formatting import format_count

if TYPE_CHECKING:
    from resnetlab.inference.explain import Explanation


def explain(
    model: ModelName,
    /,
    *images: Path,
    out: Path = Path("explained"),
    top: int = 5,
    classes: str | None = None,
    json: Json = False,
    precision: Precision = "fp32",
    device: Device = "auto",
) -> None:
    """Explain predictions for images: where the model looked, and what each residual block did for the prediction.

    Example: `resnetlab explain runs/digits/model.safetensors three.png --out explained`

    Each image gives two files: NAME.heat.png, the heat map (Grad-CAM) over the image, and NAME.blocks.svg, a figure with
    how much each block adds to its shortcut and the prediction without it.

    Parameters
    ----------
    images
        Images, or folders of images.
    out
        Folder for the files.
    top
        How many classes to name for each image.
    classes
        Let only some of the model's classes compete: their names, separated by commas, or a data set that has them, such as a
        folder of class folders. By default all outputs do.
    """
    from resnetlab.data.decode import find_image_files
    from resnetlab.inference.download import find_model
    from resnetlab.inference.explain import explain as explain_image
    from resnetlab.inference.images import read_input
    from resnetlab.inference.predict import load
    from resnetlab.models.annotated_model import read_task
    from resnetlab.run_folder import check_output_folder

    check_output_folder(out)
    console.check_order("explain", model, [str(image) for image in images])
    console.refuse_missing_images(model, [str(image) for image in images])
    model = find_model(model)
    if (task := read_task(Path(model))) != "classify":
        from resnetlab.inference.annotated import PREDICTORS

        raise UsageError(f"{model}: {PREDICTORS[task].no_explanation}")
    if not images:
        raise UsageError("explain needs images: files or folders.")
    if top < 1:
        raise UsageError(f"--top must be 1 or more, not {top}.")
    loaded, files = load(model, precision=precision, device=device), list(find_image_files(images))
    outputs = f"all {format_count(len(loaded.classes), 'output')}"
    if classes is not None:
        loaded.keep_classes(_read_class_names(classes))
        outputs = f"{format_count(len(loaded.classes), 'class')} alone, of {outputs[4:]}"
    documents: list[dict[str, Any]] = []
    taken: set[str] = set()
    with console.ProgressBar("blocks") as bar:
        for done, file in enumerate(files):
            try:
                pixels = loaded.preprocessing(read_input(file, loaded.preprocessing))
            except DataError as error:
                documents.append({"image": str(file), "error": str(error)})
                continue
            explanation = explain_image(
                loaded,
                pixels,
                top=top,
                progress=lambda block, blocks, done=done: bar.update(done * blocks + block, len(files) * blocks),  # type: ignore[misc]
            )
            written = _write_files(explanation, file, out, taken, files)
            documents.append({"image": str(file)} | written | explanation.to_json())
    if json:
        console.print_json({"classes": outputs, "explanations": documents})
    else:
        console.write_line(f"scores are over {outputs}")
        _print_explanations(documents)
    if failed := sum("error" in document for document in documents):
        raise DataError(f"{failed} of {len(files)} images could not be read.")


def _read_class_names(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, or the classes of a data set."""
    from resnetlab.data import sources

    if sources.is_builtin(text) or Path(text).exists():
        return sources.load_dataset(text, Path("data")).classes
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _write_files(
    explanation: Explanation, file: Path, out: Path, taken: set[str], inputs: Sequence[Path]
) -> dict[str, str]:
    """Writes the two files of an image and returns their paths. Images of the same name get different ones."""
    from resnetlab.inference.explain_figure import draw_explanation
    from resnetlab.run_folder import check_output_file, write_atomically, writing

    stem, n = file.stem, 1
    while stem in taken:  # one.jpg beside one.heic gets one.jpg, another one.jpg one.jpg-2
        stem, n = file.name if n == 1 else f"{file.name}-{n}", n + 1
    taken.add(stem)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)  # only now, so that no empty folder is left where no image can be read
    png = io.BytesIO()
    explanation.overlay.save(png, "PNG")
    heat, blocks = out / f"{stem}.heat.png", out / f"{stem}.blocks.svg"
    check_output_file(heat, inputs)
    write_atomically(heat, png.getvalue())
    write_atomically(blocks, draw_explanation(explanation, file.name))
    return {"heat": str(heat), "figure": str(blocks)}


def _print_explanations(documents: list[dict[str, Any]]) -> None:
    """Prints a line for each image: the prediction, the block that matters most, and those that change the prediction."""
    rows = []
    for document in documents:
        if "error" in document:
            rows.append((document["image"], document["error"], "", ""))
            continue
        top = document["top"][0]
        removable = [b for b in document["blocks"] if b["score_without"] is not None]
        changing = [b["block"] for b in removable if b["answer_without"] != top["class"]]
        needed = min(removable, key=lambda b: b["score_without"], default=None)
        rows.append(
            (
                document["image"],
                f"{top['class']} {top['score']:.1%}",
                f"{needed['block']} ({needed['score_without']:.1%} without it)" if needed else "–",
                ", ".join(changing) or "none",
            )
        )
    console.print_table("", ("image", "answer", "needs most", "another answer without"), rows)
    for document in documents:
        for file in ("heat", "figure"):
            if file in document:
                console.write_line(document[file])
