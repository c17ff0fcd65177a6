"""Writes tar shards in WebDataset format, each with an index (data.shards reads them)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from PIL import Image

from resnetlab.data.dataset import Dataset
from resnetlab.data.decode import decode
from resnetlab.data.disk_split import DiskSplit
from resnetlab.data.shards import UNFINISHED
from resnetlab.data.tar_index import FORMAT, index_path
from resnetlab.errors import DataError, RunError, UsageError
from resnetlab.random import make_generator
from resnetlab.run_folder import RunFolder, move_into_place, write_atomically, write_error
from resnetlab.stopping import check_stop

QUALITY = 95  # of JPEGs that are written because the image was resized


def pack_shards(
    data: Dataset,
    out: Path,
    *,
    per_shard: int = 1000,
    seed: int = 0,
    resize: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Writes the images of a data set into out/train-000000.tar, …; those of a folder without splits into out/all-….

    Args:
        per_shard: images in a shard.
        seed: of the images' order in the shards (training does not depend on it).
        resize: images with a longer shorter side are resized to it and written as JPEG; 0 keeps every file's bytes.

    Raises:
        DataError: an image cannot be read, or the data are in memory.
        RunError: `out` is not empty or cannot be written.
        UsageError: a number is too small.
    """
    if per_shard < 1 or resize < 0:
        raise UsageError(f"per_shard must be 1 or more and resize 0 or more, not {per_shard} and {resize}.")
    if out.resolve().is_relative_to(Path(data.name).resolve()):
        raise UsageError(f"{out} is inside {data.name}, the images that are packed; choose a folder elsewhere.")
    splits = {"all": data.all_images} if data.all_images is not None else data.splits
    if not all(isinstance(split, DiskSplit) for split in splits.values()):
        raise DataError(f"{data.name} is in memory; shards are packed from images in folders.")
    written: list[Path] = []
    with _unfinished_folder(out) as unfinished:
        total, done = sum(len(split) for split in splits.values() if split is not None), 0
        for name, split in splits.items():
            assert isinstance(split, DiskSplit)
            order = torch.randperm(len(split), generator=make_generator(seed, "pack", name)).tolist()
            starts = range(0, len(order), per_shard)
            for number, start in enumerate(starts):
                tar = out / f"{name}-{number:06d}.tar"
                part = order[start : start + per_shard]
                index = _write_shard(unfinished / tar.name, split, part, data.classes, resize)
                # in the unfinished folder, so that a kill leaves no other file in `out`
                unfinished_index = index_path(unfinished / tar.name)
                write_atomically(unfinished_index, json.dumps(index | {"shards": len(starts)}) + "\n")
                move_into_place(unfinished_index, index_path(tar))
                move_into_place(unfinished / tar.name, tar)
                written.append(tar)
                done += len(part)
                on_progress(done, total)
    return written


def check_target(out: Path) -> None:
    """Raises RunError if a folder holds anything but an unfinished packing."""
    if out.is_dir() and not (out / UNFINISHED).is_dir() and any(out.iterdir()):
        raise RunError(f"{out} is not empty; choose another folder for the shards.")


@contextlib.contextmanager
def _unfinished_folder(out: Path) -> Iterator[Path]:
    """A folder in `out` for the shard that is being written; while it is there, `data.shards` refuses `out`.

    Shards of a packing that was killed are removed; those of one that still runs are not touched.

    Raises RunError if `out` holds anything else, or another process packs into it.
    """
    unfinished, is_ours = out / UNFINISHED, False
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_target(out)
        unfinished.mkdir(exist_ok=True)
        with RunFolder(unfinished).lock(
            f"another process is packing into {out}; wait for it, or choose another folder."
        ):
            is_ours = True
            _remove_shards(out)
            try:
                yield unfinished
            except BaseException:
                _remove_shards(out)
                raise
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        if is_ours:  # only now: Windows removes no file that is locked
            shutil.rmtree(unfinished, ignore_errors=True)


def _remove_shards(out: Path) -> None:
    for file in (*out.glob("*.tar"), *out.glob("*.index.json")):
        file.unlink()


def _write_shard(
    tar: Path, split: DiskSplit, part: list[int], classes: tuple[str, ...], resize: int
) -> dict[str, object]:
    """Writes one shard and returns its index."""
    samples = []
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as file:
        for i in part:
            check_stop()
            name, label, (content, shown) = split.name_of(i), int(split.labels[i]), split.read_file(i)
            suffix = os.path.splitext(name)[1].lower()
            if resize:
                content, suffix = _resize_image(content, suffix, shown, resize)
            key = f"{i:08d}"
            offset = _add_member(file, key + suffix, content)
            _add_member(file, key + ".cls", str(label).encode())
            _add_member(file, key + ".json", json.dumps({"name": name, "class": classes[label]}).encode())
            samples.append([key, name, classes[label], offset, len(content)])
    return {"format": FORMAT, "bytes": tar.stat().st_size, "classes": classes, "samples": samples}


def _add_member(file: tarfile.TarFile, name: str, content: bytes) -> int:
    """Adds a member without date or owner and returns the offset of its content."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))
    return file.offset - (len(content) + 511) // 512 * 512


def _resize_image(content: bytes, suffix: str, name: str, side: int) -> tuple[bytes, str]:
    """Resizes an image to a shorter side of `side`, as JPEG; returns its own bytes if it is not larger."""
    image = decode(content, name)
    if min(image.size) <= side:
        return content, suffix
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    file = io.BytesIO()
    image.resize((width, height), Image.Resampling.BILINEAR).save(file, "JPEG", quality=QUALITY)
    return file.getvalue(), ".jpg"
