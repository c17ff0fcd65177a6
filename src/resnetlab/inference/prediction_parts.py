"""Predictions in parts: processes share the images, and what was stopped goes on without a gap or a duplicate.

The images, in the order of their names, are divided into parts whose limits depend on nothing else. A part is one file, which
appears when it is complete; its name has the part's number and a hash of its images' names. The process of rank r takes the
parts r, r + N, …, and leaves out those that are there. Processes do not talk to each other: a launcher's RANK and WORLD_SIZE
are all that they need, and a later run may have another number of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from resnetlab.errors import UsageError
from resnetlab.inference.images import NamedImage
from resnetlab.process_place import read_process_place
from resnetlab.run_folder import RunFolder, hold_lock, writing

REQUEST = "predictions.json"
SMALLEST, LARGEST = 16, 8192  # images of the first parts, and of the last
DOUBLED = 256  # parts after which their size doubles


class Part(NamedTuple):
    """Some of the images, and the file that their predictions belong in."""

    file: Path
    images: list[NamedImage]


@dataclass(frozen=True)
class PartFolder:
    """A folder of parts. `rank` of `size` processes writes some of them; `suffix` is ".jsonl" or ".parquet".

    Attributes:
        request: what decides the predictions; the first process's backend is everyone's.
    """

    path: Path
    suffix: str
    request: Mapping[str, Any]
    rank: int = 0
    size: int = 1

    @staticmethod
    def open(path: Path, suffix: str, request: Mapping[str, Any]) -> PartFolder:
        """The folder, made if it is missing, with the rank that a launcher such as torchrun gives this process.

        Raises UsageError if it holds something else, or predictions of another request.
        """
        if path.exists() and not path.is_dir():
            raise UsageError(f"--parts {path} is a file; give a folder.")
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            with hold_lock(path / ".lock"):
                place = read_process_place()
                return PartFolder(path, suffix, _record_request(path, request), place.rank, place.size)

    def missing(self, images: Iterable[NamedImage]) -> Iterator[Part]:
        """This process's parts that are not there yet.

        Raises UsageError if those that are there are of other images.
        """
        there = {int(file.name[5:11]): file for file in self.path.glob(f"part-{'[0-9]' * 6}-*{self.suffix}")}
        remaining, number = iter(images), -1
        for number in count():
            group = list(islice(remaining, min(LARGEST, SMALLEST << number // DOUBLED)))
            if not group:
                break
            digest = hashlib.blake2b(
                "\0".join(name for name, _ in group).encode(errors="surrogateescape"), digest_size=6
            )
            file = self.path / f"part-{number:06d}-{digest.hexdigest()}{self.suffix}"
            if there.get(number, file) != file:
                raise self._images_changed(there[number])
            if number % self.size == self.rank and number not in there:
                yield Part(file, group)
        if extra := [there[k] for k in there if k >= number]:
            raise self._images_changed(extra[0])

    def _images_changed(self, file: Path) -> UsageError:
        return UsageError(
            f"{file} is of other images than these: some were added, removed or renamed; give another --parts."
        )


def _record_request(path: Path, request: Mapping[str, Any]) -> Mapping[str, Any]:
    """Records the request in a new folder of parts, or compares it with the recorded one, which is returned."""
    folder = RunFolder(path)
    found = folder.read_json(REQUEST)
    if found is None:
        if any(not entry.name.startswith(".") for entry in path.iterdir()):
            raise UsageError(f"--parts {path} is not empty, and holds no predictions; give another folder.")
        folder.write_json(REQUEST, request)
        return request
    changed = [f"{k} {found.get(k)!r}, not {v!r}" for k, v in request.items() if k != "backend" and found.get(k) != v]
    if changed:
        raise UsageError(
            f"--parts {path} holds predictions of another request ({'; '.join(changed)}); give another folder."
        )
    return found


def hash_weights(net: nn.Module) -> str:
    """A hash of a network's weights, 12 hex digits."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
