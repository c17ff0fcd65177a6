"""`resnetlab embed`, `neighbours` and `data audit`: what a model's features show of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resnetlab.cli import console
from resnetlab.cli.options import DataDir, Device, Json, ModelName, Precision
from resnetlab.formatting import format_count, format_percent

if TYPE_CHECKING:
    from torch import Tensor

    from resnetlab.inference.predict import Model

MAX_SHOWN = 500  # likely errors on a page


def embed(
    model: ModelName,
    data: str,
    /,
    *,
    out: Path = Path("features.npz"),
    data_dir: DataDir = Path("data"),
    backend: str | None = None,
    precision: str = "auto",
    calibrate: Path | None = None,
    device: Device = "auto",
) -> None:
    """Write the feature vector of every image, the input of the fully connected layer, to .npz or Parquet.

    Example: `resnetlab embed runs/photos/model.safetensors photos --out features.parquet`

    Parameters
    ----------
    data
        A data set, or a folder of images.
    out
        The file to write, .npz or .parquet: image, split, class and features of each image, written as they are computed.
    backend
        torch, onnxruntime or openvino; auto takes the fastest installed one that agrees with torch on the model's check
        images, or torch in fp32 for at most 64 images. It is reported on standard error. Without --backend torch computes.
    precision
        fp32, bf16 or, with --backend, int8; auto is bf16 if the hardware supports it (and that --backend agrees), else fp32.
    calibrate
        A folder of images to calibrate int8 on, instead of the training images in the model file.
    """
    from resnetlab.cli.predict import choose_backend
    from resnetlab.data.sources import refuse_missing
    from resnetlab.errors import UsageError
    from resnetlab.evaluation.predictions import check_table_file
    from resnetlab.inference.backends import FEW_IMAGES, check_backend_request
    from resnetlab.inference.embed import SUFFIXES, embed_rows, find_data_images, write_features
    from resnetlab.inference.predict import load
    from resnetlab.run_folder import check_output_file

    console.check_order("embed", model, [data])
    refuse_missing(data)
    check_table_file(out, "features", SUFFIXES)
    check_output_file(out, [model, data], makes_folder=True)
    check_backend_request(backend or "torch", precision, calibrate)
    if backend is None and (precision == "int8" or calibrate is not None):
        raise UsageError("int8 and --calibrate need a backend that computes in int8; add --backend auto.")
    loaded = load(model, precision=precision if backend is None else "fp32", device=device)
    images = find_data_images(loaded, data, data_dir)
    with console.ProgressBar("images") as bar:
        if backend is not None:
            first = list(islice(images, FEW_IMAGES + 1))
            named = [(name, image) for name, (*_, image) in first]
            choose_backend(loaded, (backend, precision, calibrate), named, "features")
            images = chain(first, images)
        n, errors = write_features(out, bar.count(embed_rows(loaded, images)))
    _warn_of_unreadable(errors)
    console.write_line(f"{format_count(n, 'image')} in {out}")


def _warn_of_unreadable(reasons: Mapping[str, str]) -> None:
    for name, reason in reasons.items():
        console.log(f"resnetlab: warning: {name} is left out: {reason}")


def neighbours(
    model: ModelName,
    data: str,
    /,
    *images: str,
    top: int = 8,
    out: Path | None = None,
    data_dir: DataDir = Path("data"),
    precision: Precision = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the images of a data set that are most similar to given ones, by exact search over feature vectors.

    Example: `resnetlab neighbours runs/photos/model.safetensors photos one.jpg --out neighbours.html`

    Parameters
    ----------
    data
        The images that are searched: a data set, a folder of images, or a file that `embed` wrote with this model.
    images
        The images to find similar ones of: files, folders, patterns or addresses.
    top
        How many to find of each.
    out
        Write a page that shows them, .html.
    """
    from resnetlab.data.sources import refuse_missing
    from resnetlab.errors import UsageError
    from resnetlab.inference.embed import embed_data, is_feature_file, read_features
    from resnetlab.inference.neighbours import FeatureIndex, ShownImage, leave_out_query, render_images
    from resnetlab.inference.predict import load
    from resnetlab.run_folder import write_atomically

    console.check_order("neighbours", model, [data, *images])
    if not images:
        raise UsageError("name the images to find similar ones of: resnetlab neighbours MODEL DATA IMAGE...")
    if top < 1:
        raise UsageError(f"--top must be 1 or more, not {top}.")
    console.check_page(out, [model, data, *images])
    console.refuse_missing_images(model, images)
    if not is_feature_file(data):
        refuse_missing(data)
    loaded = load(model, precision=precision, device=device)
    queries = _embed_queries(loaded, images)
    with console.ProgressBar("images") as bar:
        rows = read_features(Path(data)) if is_feature_file(data) else bar.count(embed_data(loaded, data, data_dir))
        index = FeatureIndex.from_rows(rows)
    _warn_of_unreadable(index.unreadable)
    found = {}
    for query, near in zip(queries, index.search(queries.values(), top + 1), strict=True):
        others = leave_out_query(query, near)
        if len(others) < len(near):
            console.log(f"{query} is in {data}, and is left out of its neighbours")
        found[query] = others[:top]
    if out is not None:
        groups = []
        for query, near in found.items():
            similar = [ShownImage(n.image, (n.label, f"{n.similarity:.3f}")) for n in near]
            groups.append((query, [ShownImage(query, ("the image",)), *similar]))
        lead = (
            f"The {top} most similar of {format_count(len(index.rows), 'image')} of {data}, by the "
            "cosine of their features."
        )
        write_atomically(out, render_images("Similar images", lead, groups, data, data_dir))
        console.log(f"page: {out}")
    if json:
        answer = [{"image": query, "neighbours": [n.to_json() for n in near]} for query, near in found.items()]
        return console.print_json({"n": len(index.rows), "images": answer})
    table = [
        (query if rank == 1 else "", str(rank), n.image, n.label, f"{n.similarity:.3f}")
        for query, near in found.items()
        for rank, n in enumerate(near, 1)
    ]
    console.print_table("", ("image", "rank", "similar", "class", "similarity"), table, right=(1, 4))
    return None


def _embed_queries(model: Model, images: Sequence[str]) -> dict[str, Tensor]:
    """The features of each image that can be read, with a warning of the others; raises DataError if none can."""
    from resnetlab.errors import DataError
    from resnetlab.inference.images import expand_images

    queries: dict[str, Tensor] = {}
    unreadable: dict[str, str] = {}
    for name, found in model.embeddings(pair for each in images for pair in expand_images(each)):
        if isinstance(found, str):
            unreadable[name] = found
        else:
            queries[name] = found
    _warn_of_unreadable(unreadable)
    if not queries:
        raise DataError("none of the images to find similar ones of can be read.")
    return queries


def audit(
    data: str,
    /,
    *,
    model: str,
    quarantine: Path | None = None,
    out: Path | None = None,
    folds: int | None = None,
    seed: int | None = None,
    method: Literal["resnetlab", "cleanlab"] = "resnetlab",
    data_dir: DataDir = Path("data"),
    json: Json = False,
) -> None:
    """Find images whose label is likely wrong, by confident learning on out-of-fold predictions.

    Example: `resnetlab data audit photos --model runs/photos/model.safetensors --quarantine suspects.txt`

    Parameters
    ----------
    data
        A data set with labels.
    model
        The model whose features linear heads are fitted on, each without the images that it then predicts: a model file, or a
        published name such as torchvision:resnet50.IMAGENET1K_V2. Or the folder that `resnetlab train DATA --folds 5` wrote,
        which finds more: no network has seen the labels of the images that it predicts.
    quarantine
        Write the names of the likely errors into this file, for `resnetlab train DATA --quarantine FILE`.
    out
        Write a page that shows the likely errors, .html.
    folds
        Parts of the data; each is predicted by a head that was fitted on the others. By default 5.
    seed
        Of the parts; by default 0.
    method
        Whose rule decides: ours, or cleanlab's find_label_issues (needs an extra).
    """
    from resnetlab.data.sources import refuse_missing
    from resnetlab.errors import UsageError
    from resnetlab.evaluation.label_errors import FOLDS
    from resnetlab.inference.audit import audit_labels
    from resnetlab.inference.neighbours import ShownImage, render_images
    from resnetlab.inference.predict import load
    from resnetlab.run_folder import FOLDS_FILE, check_output_file, write_atomically

    by_runs = (Path(model) / FOLDS_FILE).is_file()
    if by_runs and (folds, seed) != (None, None):
        raise UsageError(f"{model} has folds of its own; leave out --folds and --seed.")
    if folds is not None and folds < 2:
        raise UsageError(f"--folds must be 2 or more, not {folds}.")
    if quarantine is not None:
        check_output_file(quarantine, [model, data], "--quarantine")
    console.check_page(out, [model, data])
    refuse_missing(data)
    source = Path(model) if by_runs else load(model, precision="auto")
    with console.ProgressBar("images") as bar:
        found = audit_labels(source, data, data_dir, folds or FOLDS, seed or 0, method, bar.count)
    _warn_of_unreadable(found.unreadable)
    if quarantine is not None:
        names = [row["image"] for row in found.errors]
        console.write_quarantine(quarantine, names, f"of {found.data} whose labels are likely wrong")
    n = len(found.errors)
    what = f"{n:,} of {found.n:,} labels of {found.data} {'is' if n == 1 else 'are'} likely wrong"
    if doubt := found.describe_doubt():
        console.log(f"resnetlab: warning: {doubt}")
    if out is not None:
        pairs = {(row["class"], row["likely"]): list[ShownImage]() for row in found.errors[:MAX_SHOWN]}
        for row in found.errors[:MAX_SHOWN]:
            lines = (f"{row['class']} {row['score']:.1%}", f"{row['likely']} {row['likely_score']:.1%}")
            pairs[row["class"], row["likely"]].append(ShownImage(row["image"], lines))
        groups = [(f"{given}, likely {likely} ({len(rows):,})", rows) for (given, likely), rows in pairs.items()]
        error = format_percent(found.out_of_fold_error)
        how = f"by confident learning ({found.method}'s rule, {found.folds} folds, out-of-fold error {error})"
        lead = f"{what}, {how}; at most {MAX_SHOWN} are shown. {doubt}"
        write_atomically(out, render_images("Likely label errors", lead, groups, data, data_dir))
        console.log(f"page: {out}")
    if json:
        return console.print_json(found.to_json())
    console.write_line(what)
    console.write_line(
        f"out-of-fold error of the labels {format_percent(found.out_of_fold_error)}, {found.folds} folds"
    )
    print()
    rows = [
        (r["image"], r["class"], f"{r['score']:.1%}", r["likely"], f"{r['likely_score']:.1%}") for r in found.errors
    ]
    columns = ("image", "class", "score", "likely", "score")
    return console.print_first(columns, rows, "--json or --quarantine", right=(2, 4))
