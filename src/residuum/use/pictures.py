"""Pictures to hold an exported file to, and others to calibrate int8 on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from residuum.data import sources
from residuum.data.dataset import Pictures
from residuum.data.decode import decode, listed
from residuum.data.reading import view
from residuum.errors import DataError, UsageError
from residuum.models.bundle import Bundle
from residuum.models.samples import apart, spread
from residuum.preprocessing import Preprocessing, picture_of, pixels_of

MOST = 256  # of either kind
MOST_VALUES = 2**28  # that pictures at their own sizes may have together
SHAPES = ((1.0, 1.0), (1.5, 1.5), (1.2, 1.0), (2.5, 2.5), (1.3, 1.6))  # of the model file's pictures, in its own


def for_export(
    bundle: Bundle, data: str | None, folder: Path | None, data_dir: Path
) -> tuple[list[Tensor], Tensor | None]:
    """Pictures of the proof, each uint8 (H, W, C), and, none of them among those, pictures for int8, uint8 (n, h, w, C).

    Those of the proof have their own sizes; the ones in the model file, which have the network's, are stretched to several.

    Args:
        data: a data set: its judged split and its training split; classes do not matter.
        folder: a folder of pictures: every second one is for int8.

    Raises:
        DataError: the data cannot be read, or there is no picture among them.
        UsageError: neither is given, and the model file has none either.
    """
    prepared = bundle.preprocessing
    if data is not None:
        source = sources.load(data, data_dir)
        check, training = list(_of(source.test, prepared)), list(_of(source.train, prepared))
    elif folder is not None:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; --pictures takes a folder of pictures.")
        read = list(_files(folder, prepared))
        check, training = read[::2], read[1::2]
    elif bundle.samples is not None:
        return _stretched(bundle.samples.check), bundle.samples.training
    else:
        raise UsageError(
            "the model file holds no pictures to prove the export on (it was not trained here); give some: --data DATA or "
            "--pictures FOLDER"
        )
    if not check:
        raise DataError(f"{data or folder} holds no picture that can be read; the export is proved on real pictures.")
    return check, apart(_ready(training, prepared), _ready(check, prepared))


def _of(split: Pictures, prepared: Preprocessing) -> Iterator[Tensor]:
    held = 0
    for i in spread(len(split), MOST, 1):
        try:
            picture = _in_colours(picture_of(split.pictures([i])[0]), prepared)
        except DataError:
            continue
        if (held := held + picture.numel()) > MOST_VALUES:
            return
        yield picture


def _files(folder: Path, prepared: Preprocessing) -> Iterator[Tensor]:
    held = 0
    for found in islice(listed(folder), 2 * MOST):
        try:
            if isinstance(found, DataError):
                continue
            picture = _in_colours(decode(found), prepared)
        except DataError:
            continue
        if (held := held + picture.numel()) > 2 * MOST_VALUES:
            return
        yield picture


def _in_colours(picture: Image.Image, prepared: Preprocessing) -> Tensor:
    return pixels_of(picture.convert("L" if prepared.channels == 1 else "RGB"))


def _stretched(pictures: Tensor) -> list[Tensor]:
    """uint8 (n, h, w, C) at several heights and widths."""
    found = []
    for picture, (tall, wide) in zip(pictures, cycle(SHAPES), strict=False):
        h, w, _ = picture.shape
        found.append(pixels_of(picture_of(picture).resize((max(1, round(wide * w)), max(1, round(tall * h))))))
    return found


def _ready(pictures: Sequence[Tensor], prepared: Preprocessing) -> Tensor:
    """Resized and cropped, uint8 (n, h, w, C)."""
    empty = torch.empty(0, *prepared.size, prepared.channels, dtype=torch.uint8)
    return torch.cat([empty, *(view(prepared, picture)[None] for picture in pictures)])
