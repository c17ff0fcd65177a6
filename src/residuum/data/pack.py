"""Writes tar shards in WebDataset's form, each with an index (data.shards reads them)."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from residuum.data.dataset import Dataset
from residuum.data.decode import decode
from residuum.data.stored import Stored
from residuum.data.tars import FORMAT, index_of
from residuum.errors import DataError, RunError, UsageError
from residuum.records import write_atomically, writing_error
from residuum.runtime import generator

QUALITY = 95  # of a JPEG that is written anew because it was resized


def pack(
    data: Dataset,
    out: Path,
    *,
    per_shard: int = 1000,
    seed: int = 0,
    resize: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Writes the pictures of a data set into out/train-000000.tar, …; those of a folder without splits into out/all-….

    Args:
        per_shard: pictures in a shard.
        seed: of the order in which pictures lie in the shards (training does not depend on it).
        resize: pictures whose shorter side is longer are brought to it and written as JPEG; 0 keeps every file's bytes.

    Raises:
        DataError: a picture cannot be read, or the data lie in memory.
        RunError: `out` is not empty or cannot be written.
        UsageError: a number below its least.
    """
    if per_shard < 1 or resize < 0:
        raise UsageError(f"per_shard must be 1 or more and resize 0 or more, not {per_shard} and {resize}.")
    splits = {"all": data.whole} if data.whole is not None else data.splits
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise RunError(f"{out} is not empty; choose another folder for the shards.")
    except OSError as error:
        raise writing_error(out, error) from error
    total, done, written = sum(len(split) for split in splits.values() if split is not None), 0, []
    for name, split in splits.items():
        if not isinstance(split, Stored):
            raise DataError(f"{data.name} lies in memory; shards are packed from pictures in folders.")
        order = torch.randperm(len(split), generator=generator(seed, "pack", name)).tolist()
        for number, start in enumerate(range(0, len(order), per_shard)):
            tar = out / f"{name}-{number:06d}.tar"
            part = order[start : start + per_shard]
            _write(tar, split, part, data.classes, resize)
            written.append(tar)
            done += len(part)
            progress(done, total)
    return written


def _write(tar: Path, split: Stored, part: list[int], classes: tuple[str, ...], resize: int) -> None:
    """One shard and its index; neither is there before it is whole."""
    unfinished = tar.with_name(f".{tar.name}.part")
    samples = []
    try:
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as file:
            for i in part:
                place = int(split.where[i])
                name, label = split.source.names[place], int(split.labels[i])
                content, suffix = split.source.read(place), os.path.splitext(name)[1].lower()
                if resize:
                    content, suffix = _resized(content, suffix, split.source.label(place), resize)
                key = f"{i:08d}"
                offset = _add(file, key + suffix, content)
                _add(file, key + ".cls", str(label).encode())
                _add(file, key + ".json", json.dumps({"name": name, "class": classes[label]}).encode())
                samples.append([key, name, classes[label], offset, len(content)])
        index = {"format": FORMAT, "bytes": unfinished.stat().st_size, "classes": classes, "samples": samples}
        os.replace(unfinished, tar)
    except OSError as error:
        raise writing_error(tar, error) from error
    finally:
        unfinished.unlink(missing_ok=True)
    write_atomically(index_of(tar), json.dumps(index) + "\n")


def _add(file: tarfile.TarFile, name: str, content: bytes) -> int:
    """Adds a member without date or owner; where its content starts."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))
    return file.offset - (len(content) + 511) // 512 * 512


def _resized(content: bytes, suffix: str, name: str, side: int) -> tuple[bytes, str]:
    """A picture whose shorter side is no longer than `side`, as JPEG; the same bytes where it is so already."""
    picture = decode(content, name)
    if min(picture.size) <= side:
        return content, suffix
    scale = side / min(picture.size)
    width, height = (max(side, round(length * scale)) for length in picture.size)
    file = io.BytesIO()
    picture.resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=QUALITY)
    return file.getvalue(), ".jpg"
