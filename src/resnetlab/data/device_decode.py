"""Batches of images whose JPEGs the GPU decodes, for machines whose processors do not keep up with it.

Threads and workers read the files, and decode what a GPU does not take: other formats, and JPEGs that are grey, CMYK or turned
by their EXIF. The GPU's decoder may round a value otherwise than a CPU's, so this is a value of the recipe. On a CPU nothing
differs.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import NamedTuple, TypeGuard

import torch
from PIL import Image
from torch import Tensor

from resnetlab.data.dataset import Split
from resnetlab.data.decode import decode_on_gpu
from resnetlab.data.disk_split import DiskSplit
from resnetlab.device import to_device
from resnetlab.errors import UsageError, first_line, warn

AT_ONCE = 64  # JPEGs that are decoded together


class PackedImages(NamedTuple):
    """Files and decoded images in one tensor, since each tensor that comes from a worker takes an open file.

    Attributes:
        values: uint8 (N,), of all of them.
        shapes: of each, (bytes,) of a JPEG or (H, W, C).
    """

    values: Tensor
    shapes: list[tuple[int, ...]]


def pack_images(images: list[Tensor]) -> PackedImages:
    """Files uint8 (n,) and images uint8 (H, W, C) as one tensor."""
    values = torch.cat([x.reshape(-1) for x in images]) if images else torch.empty(0, dtype=torch.uint8)
    return PackedImages(values, [tuple(x.shape) for x in images])


def unpack_images(packed: PackedImages) -> list[Tensor]:
    """The inverse of `pack_images`; views of its tensor."""
    sizes = [torch.Size(shape).numel() for shape in packed.shapes]
    return [x.view(shape) for x, shape in zip(torch.split(packed.values, sizes), packed.shapes, strict=True)]


def decodes_on_device(split: Split, device: torch.device) -> TypeGuard[DiskSplit]:
    """Whether the device, a GPU, decodes the JPEGs of a split; raises UsageError if it is to and cannot."""
    if device.type == "cpu" or not isinstance(split, DiskSplit) or split.decode_on != "device":
        return False
    _require_decoder(device)
    return True


@functools.cache
def _require_decoder(device: torch.device) -> None:
    reason, file = f"{device.type} decodes none", io.BytesIO()
    if device.type == "cuda":
        Image.new("RGB", (16, 16)).save(file, "JPEG")
        try:
            decode_on_gpu([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], device)
            return
        except (RuntimeError, ImportError) as error:
            reason = first_line(error)
    raise UsageError(f"JPEGs cannot be decoded on this device ({reason}); leave it to the CPU: decode_on=cpu.")


def decode_images(
    split: Split, images: Sequence[Tensor], indices: Sequence[int], device: torch.device
) -> tuple[list[int], list[Tensor]]:
    """Files, uint8 (n,), and images (H, W, C) of a split as images on the device, and their positions in `images`.

    If the device fails on one of them, the CPU decodes all.

    Args:
        indices: of the images in the split.

    Raises DataError under "stop" for an image that the CPU cannot decode either; otherwise that one is left out.
    """
    files = [i for i, x in enumerate(images) if x.ndim == 1]
    decoded = dict[int, Tensor]()
    try:
        for start in range(0, len(files), AT_ONCE):
            group = files[start : start + AT_ONCE]
            decoded |= zip(group, decode_on_gpu([images[i] for i in group], device), strict=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        pairs = enumerate(indices)
        found = split.errors.read_each(
            pairs, lambda pair: split.read_image(pair[1]), lambda pair: split.name_of(pair[1])
        )
        read = {k: x for (k, _), x in found}
        if len(read) == len(images):
            reason = first_line(error)
            warn(f"the GPU cannot decode some JPEG ({reason}), so the CPU decodes the batches with it.")
        return list(read), [to_device(x, device) for x in read.values()]
    decoded |= {i: to_device(x, device) for i, x in enumerate(images) if i not in decoded}
    return list(range(len(images))), [decoded[i] for i in range(len(images))]
