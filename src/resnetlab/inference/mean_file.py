"""Reads a per-pixel mean of images: a NumPy array (.npy) or Caffe's .binaryproto."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnetlab.data.array_files import read_npy
from resnetlab.errors import DataError, ModelFileError, UsageError

SUFFIXES = (".npy", ".binaryproto")
MAX_BYTES = 2**27


def read_mean_file(path: Path, channels: int, channel_order: str) -> tuple[Tensor, list[str]]:
    """Reads a per-pixel mean, float32 (h, w, C) in units of [0, 1] and in RGB order; also returns notes.

    An array may be (h, w, C) or (C, h, w), in units of [0, 1] or of [0, 255]: a mean above 1 is in the latter. Caffe's files
    are BGR.

    Args:
        channel_order: of an array's channels, "rgb" or "bgr".

    Raises:
        ModelFileError: the file is missing, damaged, or not a mean of images of `channels` channels.
        UsageError: its suffix is none of SUFFIXES.
    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"--mean-file {path}: a mean is read from a file that ends in {' or '.join(SUFFIXES)}.")
    try:
        content = path.read_bytes() if path.stat().st_size <= MAX_BYTES else b""
    except OSError as error:
        raise ModelFileError(f"--mean-file {path} cannot be read ({error.strerror}).") from error
    caffe = path.suffix == ".binaryproto"
    try:
        mean = torch.from_numpy(np.array(_read_blob(content) if caffe else read_npy(content), dtype=np.float32))
    except (ValueError, TypeError, OSError, EOFError, IndexError, DataError) as error:
        raise ModelFileError(f"--mean-file {path} is not a mean of images ({error}); write it again.") from error
    if mean.ndim == 3 and (caffe or mean.shape[2] != channels) and mean.shape[0] == channels:
        mean = mean.permute(1, 2, 0)
    if mean.ndim != 3 or mean.shape[2] != channels or not mean.numel() or not bool(mean.isfinite().all()):
        shape = "x".join(map(str, mean.shape))
        raise ModelFileError(
            f"--mean-file {path} holds {shape} numbers; finite ones, height x width x {channels} or {channels} x height x "
            "width, are expected."
        )
    notes = [f"{path.name}: a mean of {mean.shape[0]}x{mean.shape[1]} pixels"]
    if float(mean.max()) > 1:
        mean = mean / 255
        notes.append("in units of [0, 255], divided by 255")
    if caffe or channel_order == "bgr":
        mean = mean.flip(2)
        notes.append("changed from BGR to RGB")
    return mean.contiguous(), [", ".join(notes)]


def crop_mean(mean: Tensor, size: tuple[int, int], resize: int) -> Tensor:
    """The part of a mean (h, w, C) of whole images of `resize` pixels that the centre crop to `size` sees.

    Raises UsageError for a mean of any other size than one of the two.
    """
    found, (height, width) = tuple(mean.shape[:2]), size
    if found == size:
        return mean
    if found != (resize, resize):
        raise UsageError(
            f"--mean-file holds a mean of {found[0]}x{found[1]} pixels for images of {height}x{width}: give --image-size "
            f"{found[0]}, or --eval-resize {found[0]} where the images are cropped from that size."
        )
    top, left = (round((resize - part) / 2) for part in size)
    return mean[top : top + height, left : left + width].contiguous()


def _read_blob(content: bytes) -> np.ndarray:
    """The numbers of a serialised BlobProto (caffe.proto), (C, h, w); raises ValueError if it is not one.

    Fields: num, channels, height and width (1 to 4); data (5) or double_data (8); shape (7), a message of dim (1).
    """
    sides = {1: 1, 2: 1, 3: 1, 4: 1}
    shape: list[int] = []
    parts: list[np.ndarray] = []
    for field, kind, value in _read_fields(content):
        if kind == 0 and field in sides:
            sides[field] = int.from_bytes(value, "little")
        elif field == 7:
            for _, inner, dims in _read_fields(value):
                shape += [int.from_bytes(dims, "little")] if inner == 0 else list(_read_varints(dims))
        elif field in (5, 8):
            parts.append(np.frombuffer(value, "<f4" if field == 5 else "<f8"))
    data = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    shape = shape or list(sides.values())
    while len(shape) > 3 and shape[0] == 1:
        shape = shape[1:]
    return data.reshape(shape)


def _read_fields(content: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number, wire type, value) of each field of a protocol buffer; a varint's value as little-endian bytes."""
    at = 0
    while at < len(content):
        key, at = _read_varint(content, at)
        field, kind = key >> 3, key & 7
        if kind == 0:
            number, at = _read_varint(content, at)
            yield field, kind, number.to_bytes(10, "little")
            continue
        if kind == 2:
            length, at = _read_varint(content, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field {field} has the unknown type {kind}")
        if at + length > len(content):
            raise ValueError("it is truncated")
        yield field, kind, content[at : at + length]
        at += length


def _read_varints(content: bytes) -> Iterator[int]:
    at = 0
    while at < len(content):
        number, at = _read_varint(content, at)
        yield number


def _read_varint(content: bytes, at: int) -> tuple[int, int]:
    """An integer of 7 bits a byte, least significant first, and the position after it."""
    number = shift = 0
    while True:
        byte = content[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if not byte & 128:
            return number, at
        if shift > 63:
            raise ValueError("a number has more than 64 bits")
