"""Images for the parity check of an exported file, and others to calibrate int8 on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from resnetlab.data import sources
from resnetlab.data.dataset import Split
from resnetlab.data.decode import list_images
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.prefetch import preprocess_image
from resnetlab.errors import DataError, UsageError
from resnetlab.evaluation.split_selection import common_pixel_format
from resnetlab.inference.images import read_input
from resnetlab.models.model_file import TrainedModel
from resnetlab.models.reference_images import exclude_images, spread_positions
from resnetlab.preprocessing import Preprocessing, pil_to_tensor, tensor_to_pil

T = TypeVar("T")
MAX_IMAGES = 256  # of each kind
MAX_VALUES = 2**28  # limit for all images at their own sizes
STRETCHES = ((1.0, 1.0), (1.5, 1.5), (1.2, 1.0), (2.5, 2.5), (1.3, 1.6))  # (height, width), of the network's input size


def load_export_images(
    model: TrainedModel, data: str | None, folder: Path | None, data_dir: Path
) -> tuple[list[Tensor], Tensor | None]:
    """Loads images for the parity check, each (H, W, C), and other images for int8, (n, h, w, C).

    Reference images have their own sizes; those of the model file have the network's and are stretched to several.

    Args:
        data: a data set; its evaluated split is for the check, its training split for int8. Classes do not matter.
        folder: a folder of images; every second one is for int8.

    Raises:
        DataError: the data cannot be read, or has no image.
        UsageError: neither is given, and the model file has no images.
    """
    preprocessing = model.preprocessing
    if data is not None:
        source = sources.load_dataset(data, data_dir, ReadOptions(multi_label=True, one_class=True))
        source = source.with_pixel_format(common_pixel_format([model]))
        check, calibration = (_read_split(split, preprocessing) for split in (source.test, source.train))
    elif folder is not None:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; --images takes a folder of images.")
        found = islice(list_images(folder), 2 * MAX_IMAGES)
        images = _read_bounded(found, lambda f: preprocessing.to_pixels(read_input(f, preprocessing)), 2 * MAX_VALUES)
        check, calibration = images[::2], images[1::2]
    elif model.reference_images is not None:
        return _stretch(model.reference_images.check), model.reference_images.training
    else:
        raise UsageError(
            "the model file has no images to check the export on (it was not trained here); give some: --data DATA or "
            "--images FOLDER"
        )
    if not check:
        raise DataError(f"{data or folder} has no readable image; the export is checked on real images.")
    return check, exclude_images(_resize_and_crop(calibration, preprocessing), _resize_and_crop(check, preprocessing))


def _read_split(split: Split, preprocessing: Preprocessing) -> list[Tensor]:
    def read(i: int) -> Tensor:
        image = split.read_image(i)
        return image if image.is_floating_point() else preprocessing.to_pixels(tensor_to_pil(image))

    return _read_bounded(spread_positions(len(split), MAX_IMAGES, 1), read, MAX_VALUES)


def _read_bounded(items: Iterable[T], read: Callable[[T], Tensor], limit: int) -> list[Tensor]:
    """The readable images, (H, W, C) each, until they have more than `limit` values together."""
    images, total = [], 0
    for item in items:
        with contextlib.suppress(DataError):
            image = read(item)
            if (total := total + image.numel()) > limit:
                break
            images.append(image)
    return images


def _stretch(images: Tensor) -> list[Tensor]:
    """Resizes images (n, h, w, C) to several heights and widths."""
    stretched = []
    for image, (tall, wide) in zip(images, cycle(STRETCHES), strict=False):
        h, w, _ = image.shape
        height, width = max(1, round(tall * h)), max(1, round(wide * w))
        if image.is_floating_point():
            x = F.interpolate(image.permute(2, 0, 1)[None], (height, width), mode="bicubic")
            stretched.append(x[0].permute(1, 2, 0).contiguous())
        else:
            stretched.append(pil_to_tensor(tensor_to_pil(image).resize((width, height))))
    return stretched


def _resize_and_crop(images: Sequence[Tensor], preprocessing: Preprocessing) -> Tensor:
    """Resizes and crops images to the network's input, (n, h, w, C)."""
    return torch.cat(
        [
            preprocessing.blank_image(*preprocessing.size)[None][:0],
            *(preprocess_image(preprocessing, image)[None] for image in images),
        ]
    )
