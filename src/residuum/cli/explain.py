"""`residuum explain`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from residuum.cli import console
from residuum.errors import DataError, UsageError

if TYPE_CHECKING:
    from residuum.use.explain import Explanation


def explain(
    model: str,
    /,
    *images: Path,
    out: Path = Path("explained"),
    top: int = 5,
    json: Annotated[bool, Parameter(negative="")] = False,
    precision: str = "fp32",
    device: str = "auto",
) -> None:
    """Show why the model says what it says of pictures: where it looked, and what each residual block did for the answer.

    Example: `residuum explain runs/digits/model.safetensors three.png --out explained`

    Each picture gives two files: NAME.heat.png, the heat map (Grad-CAM) over the picture, and NAME.blocks.svg, a figure with
    how much each block adds to its shortcut and what the answer would be without it.

    Parameters
    ----------
    model
        A model file, or a publisher's name such as torchvision:resnet50.IMAGENET1K_V2.
    images
        Pictures, or folders of pictures.
    out
        Folder for the files.
    top
        How many classes to name for each picture.
    json
        Print the figures as one JSON document.
    precision
        fp32, bf16 or auto.
    device
        cpu, cuda, cuda:1, … ; auto takes a GPU where there is one.
    """
    from residuum.data.decode import decode, picture_files
    from residuum.use.explain import explain as explained
    from residuum.use.predict import load

    if not images:
        raise UsageError("explain needs pictures: files or folders.")
    if top < 1:
        raise UsageError(f"--top must be 1 or more, not {top}.")
    loaded, files = load(model, precision=precision, device=device), list(picture_files(images))
    documents: list[dict[str, Any]] = []
    taken: set[str] = set()
    with console.Bar("blocks") as bar:
        for done, file in enumerate(files):
            try:
                pixels = loaded.preprocessing(decode(file))
            except DataError as error:
                documents.append({"image": str(file), "error": str(error)})
                continue
            explanation = explained(
                loaded,
                pixels,
                top=top,
                progress=lambda block, blocks, done=done: bar.show(done * blocks + block, len(files) * blocks),  # type: ignore[misc]
            )
            written = _write(explanation, file, out, taken)
            documents.append({"image": str(file)} | written | explanation.to_json())
    if json:
        console.print_json({"explanations": documents})
    else:
        _print(documents)
    if failed := sum("error" in document for document in documents):
        raise DataError(f"{failed} of {len(files)} pictures could not be read.")


def _write(explanation: Explanation, file: Path, out: Path, taken: set[str]) -> dict[str, str]:
    """Writes the two files of a picture; their paths. Pictures of one name get different ones."""
    from residuum.records import write_atomically, writing_error
    from residuum.use.explain_figure import draw

    stem, n = file.stem, 1
    while stem in taken:
        n += 1
        stem = f"{file.stem}-{n}"
    taken.add(stem)
    try:
        out.mkdir(parents=True, exist_ok=True)  # only now: where no picture can be read, no folder is left behind
    except OSError as error:
        raise writing_error(out, error) from error
    png = io.BytesIO()
    explanation.overlay.save(png, "PNG")
    heat, blocks = out / f"{stem}.heat.png", out / f"{stem}.blocks.svg"
    write_atomically(heat, png.getvalue())
    write_atomically(blocks, draw(explanation, file.name))
    return {"heat": str(heat), "figure": str(blocks)}


def _print(documents: list[dict[str, Any]]) -> None:
    """A line a picture: what it says, and which block matters most and least."""
    rows = []
    for document in documents:
        if "error" in document:
            rows.append((document["image"], document["error"], "", ""))
            continue
        best = document["top"][0]
        known = [b for b in document["blocks"] if b["score_without"] is not None]
        changing = [b["block"] for b in known if b["answer_without"] != best["class"]]
        needed = min(known, key=lambda b: b["score_without"], default=None)
        rows.append(
            (
                document["image"],
                f"{best['class']} {best['score']:.1%}",
                f"{needed['block']} ({needed['score_without']:.1%} without it)" if needed else "–",
                ", ".join(changing) or "none",
            )
        )
    console.print_table("", ("image", "answer", "needs most", "another answer without"), rows)
    for document in documents:
        if "figure" in document:
            print(console.visible(document["figure"]))
