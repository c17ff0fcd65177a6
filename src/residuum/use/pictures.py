"""Pictures to hold an exported file to, and others to calibrate int8 on."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from residuum.data import sources
from residuum.data.dataset import Pictures
from residuum.data.decode import decode, listed
from residuum.data.reading import Views
from residuum.errors import DataError, UsageError
from residuum.models.bundle import Bundle
from residuum.models.samples import apart, spread
from residuum.preprocessing import Preprocessing

MOST = 256  # of either kind


def for_export(bundle: Bundle, data: str | None, folder: Path | None, data_dir: Path) -> tuple[Tensor, Tensor | None]:
    """Pictures of the proof and, none of them among those, pictures for int8; both uint8 (n, h, w, C).

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
        check = _stacked(_views(source.test, prepared), prepared)
        training = _stacked(_views(source.train, prepared), prepared)
    elif folder is not None:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; --pictures takes a folder of pictures.")
        read = _stacked(_files(folder, prepared), prepared)
        check, training = read[::2], read[1::2]
    elif bundle.samples is not None:
        return bundle.samples.check, bundle.samples.training
    else:
        raise UsageError(
            "the model file holds no pictures to prove the export on (it was not trained here); give some: --data DATA or "
            "--pictures FOLDER"
        )
    if not len(check):
        raise DataError(f"{data or folder} holds no picture that can be read; the export is proved on real pictures.")
    return check, apart(training, check)


def _views(split: Pictures, prepared: Preprocessing) -> Iterable[Tensor]:
    views = Views(split, prepared)
    for i in spread(len(split), MOST, 1):
        try:
            picture = views[i]
        except DataError:
            continue
        if picture.shape[-1] == prepared.channels:
            yield picture


def _files(folder: Path, prepared: Preprocessing) -> Iterable[Tensor]:
    for found in islice(listed(folder), 2 * MOST):
        try:
            if isinstance(found, Path):
                yield prepared(decode(found))
        except DataError:
            continue


def _stacked(pictures: Iterable[Tensor], prepared: Preprocessing) -> Tensor:
    return torch.stack([torch.empty(*prepared.size, prepared.channels, dtype=torch.uint8), *pictures])[1:]
