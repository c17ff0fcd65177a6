"""The most similar images of a data set, by exact search over a model's features; and pages that show images of it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.data import sources
from resnetlab.data.check import read_as_found
from resnetlab.data.decode import decode_as, find_pixel_format
from resnetlab.data.disk_split import ReadOptions, read_image_file
from resnetlab.data.object_store import is_address
from resnetlab.device import standard_torch_state
from resnetlab.errors import DataError
from resnetlab.evaluation.figures import image_uri, pil_image_uri
from resnetlab.evaluation.page import render_page
from resnetlab.formatting import format_count
from resnetlab.inference.embed import EmbeddingRow
from resnetlab.inference.images import ImageInput, expand_images, read_image

# the least similarity of an image with itself: in another batch its features may be rounded differently
SELF_SIMILARITY = 0.999


class Neighbour(NamedTuple):
    """An image of the data, and the cosine of the angle between its features and the query's: 1 for the same direction."""

    image: str
    split: str
    label: str
    similarity: float

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; keys as in docs/json.md."""
        values = {"image": self.image, "split": self.split, "class": self.label, "similarity": self.similarity}
        return {key: value for key, value in values.items() if value != ""}


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """The features of a data set's images.

    Attributes:
        rows: (name, split, class) of each image.
        features: of length 1, float32 (n, C).
        unreadable: name -> reason.
    """

    rows: Sequence[tuple[str, str, str]]
    features: Tensor
    unreadable: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    @standard_torch_state()
    def from_rows(rows: Iterable[EmbeddingRow]) -> FeatureIndex:
        """The index of embedded images. Raises DataError if none can be read."""
        found, vectors, unreadable = [], [], {}
        for row in rows:
            if row.features is None:
                unreadable[row.image] = row.error
            else:
                found.append((row.image, row.split, row.label))
                vectors.append(row.features)
        if not vectors:
            raise DataError("no image can be read; fix them: resnetlab data check.")
        return FeatureIndex(found, F.normalize(torch.stack(vectors).float(), dim=1), unreadable)

    @standard_torch_state()
    def search(self, queries: Iterable[Tensor], top: int) -> list[list[Neighbour]]:
        """The `top` most similar images of each query, (C,), best first; of equal ones the image that comes first.

        Raises DataError for a query of another length than the features.
        """
        found = []
        for query in queries:
            if len(query) != self.features.shape[1]:
                raise DataError(
                    f"the images searched have {self.features.shape[1]:,} features each, this model gives {len(query):,}; "
                    "embed them with the same model."
                )
            values, positions = (self.features @ F.normalize(query.float().cpu(), dim=0)).sort(
                descending=True, stable=True
            )
            pairs = zip(values[:top].tolist(), positions[:top].tolist(), strict=True)
            rows = [(self.rows[i], round(value, 6)) for value, i in pairs]
            found.append([Neighbour(image, split, label, value) for (image, split, label), value in rows])
        return found


def leave_out_query(query: str, near: Sequence[Neighbour]) -> list[Neighbour]:
    """The neighbours of an image, given by its path, without that image itself: one of its name and features."""
    path = Path(query).resolve()
    names = ("/".join(path.parts[-n:]) for n in range(1, len(path.parts)))  # below every folder that it is in
    same = {*names, str(path), query}
    return [each for each in near if each.similarity < SELF_SIMILARITY or Path(each.image).as_posix() not in same]


class ShownImage(NamedTuple):
    """An image on a page: its name in the data (or its path, if it is not of the data), and the lines below it."""

    name: str
    lines: Sequence[str]


def render_images(
    title: str, lead: str, groups: Sequence[tuple[str, Sequence[ShownImage]]], data: str | Path, data_dir: Path
) -> str:
    """A page of images in groups with headings, as HTML that needs no other file; an unreadable image has its name only."""
    uris = _read_uris({image.name for _, images in groups for image in images}, str(data), data_dir)
    if missing := sorted(name for name, uri in uris.items() if not uri):
        features = str(data).endswith((".npz", ".parquet")) and len(missing) > 0.5 * len(uris)
        hint = f"; give the data themselves in the place of {data}" * features
        words = f"{format_count(len(missing), 'image')} of the page cannot be read, such as {missing[0]}{hint}."
        warnings.warn(words, UserWarning, stacklevel=2)
    shown = [(heading, [(uris.get(i.name, ""), i.name, i.lines) for i in images]) for heading, images in groups]
    return render_page("images.html.j2", title=title, lead=lead, groups=shown)


def _render_input(image: ImageInput) -> str:
    """An image that is not in a data set as a data URI."""
    if not isinstance(image, str | Path) or is_address(str(image)):
        return pil_image_uri(read_image(image).convert("RGB"))
    content = read_image_file(Path(image))
    return image_uri(decode_as(content, str(image), find_pixel_format(content, str(image))))


def _read_uris(names: set[str], data: str, data_dir: Path) -> dict[str, str]:
    """name -> the image as a data URI, of the images of a data set, or of a folder without classes, or paths."""
    uris: dict[str, str] = {}
    try:
        source = sources.load_dataset(data, data_dir, ReadOptions(one_class=True, multi_label=True))
    except DataError:  # a folder without classes, or a file of features, which holds no image
        folder = Path(data).is_dir()
        others = {name: image for name, image in expand_images(data) if name in names} if folder else {}
    else:
        source, others = read_as_found(source), {}
        for split in source.splits.values():
            for i, name in enumerate(split.names):
                if name in names and name not in uris:
                    try:
                        uris[name] = image_uri(split.read_image(i))
                    except DataError:
                        uris[name] = ""
    for name in names - uris.keys():
        try:
            uris[name] = _render_input(others.get(name, name))
        except DataError:
            uris[name] = ""
    return uris
