"""Feature vectors of images: what the fully connected layer gets, the last map averaged over its positions."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from resnetlab.data import sources
from resnetlab.data.archives import is_archive
from resnetlab.data.dataset import Dataset, Split
from resnetlab.data.disk_split import DiskSplit, ReadOptions
from resnetlab.data.tables import is_table
from resnetlab.errors import DataError
from resnetlab.evaluation.predictions import check_table_file
from resnetlab.evaluation.split_selection import common_pixel_format
from resnetlab.inference.images import DecodedImage, ImageInput, expand_images
from resnetlab.inference.predict import Model
from resnetlab.run_folder import move_into_place, write_error

SUFFIXES = (".npz", ".parquet")
PART = 4096  # rows of a Parquet file that are written at once


class EmbeddingRow(NamedTuple):
    """An image: its name, split and class ("" where there are none), its features (C,), or why it cannot be read."""

    image: str
    split: str
    label: str
    features: Tensor | None
    error: str = ""


def embed_data(model: Model, data: str | Path, data_dir: Path = Path("data")) -> Iterator[EmbeddingRow]:
    """The features of every image of a data set, or of a folder or pattern of images without classes.

    Raises DataError if there is no image.
    """
    yield from embed_rows(model, find_data_images(model, data, data_dir))


def find_data_images(model: Model, data: str | Path, data_dir: Path) -> Iterator[tuple[str, tuple[str, str, Any]]]:
    """(name, (split, class, image)) of every image that `embed_data` embeds."""
    name = str(data)
    try:
        source = sources.load_dataset(name, data_dir, ReadOptions(one_class=True))
    except DataError:
        if not Path(name).exists() or is_table(name) or is_archive(name):
            raise
        return iter((image, ("", "", each)) for image, each in expand_images(name))
    return _list_labelled(source.with_pixel_format(common_pixel_format([model])))


def _list_labelled(source: Dataset) -> Iterator[tuple[str, tuple[str, str, Any]]]:
    """(name, (split, class, image)) of every image of a data set, once."""
    splits = {"all": source.all_images} if source.all_images is not None else source.splits
    for name, split in splits.items():
        for i, label in enumerate(split.labels.tolist()):
            yield split.name_of(i), (name, source.classes[label] if label >= 0 else "", read_encoded_image(split, i))


def read_encoded_image(split: Split, i: int) -> ImageInput | DataError:
    """The encoded image, which threads decode, or the pixels of a split in memory."""
    try:
        if isinstance(split, DiskSplit):
            return split.source.read(int(split.indices[i]))
        pixels = split.read_image(i)
        return DecodedImage(pixels) if pixels.is_floating_point() else pixels
    except DataError as error:
        return error


def embed_rows(model: Model, images: Iterable[tuple[str, tuple[str, str, Any]]]) -> Iterator[EmbeddingRow]:
    """The features of (name, (split, class, image)), in order, at the speed of predictions."""
    ahead = deque[tuple[str, str]]()  # split and class of the images that are decoded ahead

    def remember() -> Iterator[tuple[str, Any]]:
        for name, (split, label, image) in images:
            ahead.append((split, label))
            yield name, image

    for name, found in model.embeddings(remember()):
        features, error = (None, found) if isinstance(found, str) else (found, "")
        yield EmbeddingRow(name, *ahead.popleft(), features, error)


def write_features(path: Path, rows: Iterator[EmbeddingRow]) -> tuple[int, dict[str, str]]:
    """Writes image, split, class and features of each readable image; returns their number, and the others' errors.

    Features are written as they come, so memory holds those of one part at most.

    Raises RunError where there is no space or no permission, DataError if no image can be read.
    """
    check_table_file(path, "features", SUFFIXES)
    errors: dict[str, str] = {}

    def readable() -> Iterator[EmbeddingRow]:
        for row in rows:
            if row.features is None:
                errors[row.image] = row.error
            else:
                yield row

    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        n = (_write_parquet if path.suffix == ".parquet" else _write_npz)(temporary, readable())
        if not n:
            raise DataError("no image can be read; fix them: resnetlab data check.")
        move_into_place(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)
    return n, errors


def is_feature_file(data: str | Path) -> bool:
    """Whether data are a file as `write_features` writes it: one of its columns is "features"."""
    path = Path(data)
    if path.suffix not in SUFFIXES or not path.is_file():
        return False
    if path.suffix == ".npz":
        return True
    import pyarrow.parquet

    try:
        return "features" in pyarrow.parquet.read_schema(path).names
    except pyarrow.ArrowInvalid:
        return False


def read_features(path: Path) -> Iterator[EmbeddingRow]:
    """The rows of a file that `write_features` wrote. Raises DataError if it is damaged or another kind of file."""
    try:
        columns = _read_parquet_columns(path) if path.suffix == ".parquet" else _read_npz_columns(path)
        names, splits, labels, features = (columns[key] for key in ("image", "split", "class", "features"))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is no file that embed wrote ({error}); write it again: resnetlab embed.") from error
    lengths = {len(column) for column in (names, splits, labels, features)}
    if features.ndim != 2 or features.dtype != np.float32 or len(lengths) > 1:
        raise DataError(f"{path} is no file that embed wrote: its columns do not fit; write it again: resnetlab embed.")
    for name, split, label, row in zip(names, splits, labels, torch.from_numpy(features), strict=True):
        yield EmbeddingRow(str(name), str(split), str(label), row)


def _read_npz_columns(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # numpy would unpack records of any size
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("its records are packed")
    with np.load(path, allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def _read_parquet_columns(path: Path) -> dict[str, Any]:
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    features = table.column("features").combine_chunks()
    values = np.array(features.flatten()).reshape(len(features), -1)  # a copy, which may be written to
    return {key: table.column(key).to_pylist() for key in ("image", "split", "class")} | {"features": values}


def _to_columns(rows: list[EmbeddingRow]) -> tuple[dict[str, list[str]], Tensor]:
    """Image, split and class of readable rows, and their features (n, C)."""
    columns = {"image": [r.image for r in rows], "split": [r.split for r in rows], "class": [r.label for r in rows]}
    return columns, torch.stack([row.features for row in rows if row.features is not None])


def _write_parquet(path: Path, rows: Iterator[EmbeddingRow]) -> int:
    import pyarrow
    import pyarrow.parquet

    n, writer = 0, None
    while part := list(islice(rows, PART)):
        columns, features = _to_columns(part)
        vectors = pyarrow.array(features.tolist(), pyarrow.list_(pyarrow.float32()))
        table = pyarrow.table({**columns, "features": vectors})
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
        n += len(part)
    if writer is not None:
        writer.close()
    return n


def _write_npz(path: Path, rows: Iterator[EmbeddingRow]) -> int:
    columns: dict[str, list[str]] = {"image": [], "split": [], "class": []}
    length = 0
    with tempfile.TemporaryFile(dir=path.parent) as vectors:
        for row in rows:
            if row.features is not None:
                length = len(row.features)
                vectors.write(row.features.float().numpy().astype("<f4").tobytes())
                for column, value in zip(columns.values(), row[:3], strict=True):
                    column.append(value)
        if not (n := len(columns["image"])):
            return 0
        with zipfile.ZipFile(path, "w") as archive:
            with archive.open("features.npy", "w", force_zip64=True) as file:
                header = {"descr": "<f4", "fortran_order": False, "shape": (n, length)}
                np.lib.format.write_array_header_1_0(file, header)
                vectors.seek(0)
                shutil.copyfileobj(vectors, file)
            for key, values in columns.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.array(values))
    return n
