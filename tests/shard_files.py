"""Tar shards for tests: written from folders of images or member by member, and loaded."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from images import folder, photo
from resnetlab.data import pack, sources
from resnetlab.data.dataset import Dataset
from resnetlab.data.disk_split import ReadOptions


def load(data: Path | str, data_dir: Path = Path("data"), **reading: object) -> Dataset:
    return sources.load_dataset(str(data), data_dir, ReadOptions(**reading))  # type: ignore[arg-type]


def packed(tmp_path: Path, splits: dict[str, int] | None = None, **values: int) -> tuple[Path, Path]:
    root = folder(tmp_path / "my d", splits)
    pack.pack_shards(load(root), tmp_path / "s", **({"per_shard": 5} | values))
    return root, tmp_path / "s"


def files(out: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in out.iterdir()}


def tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members.items() if isinstance(members, dict) else members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    photo(seed).save(file, "JPEG")
    return file.getvalue()


def members(classes: str = "ab", each: int = 5, start: int = 0) -> dict[str, bytes]:
    return {
        f"{start + i}.{kind}": content
        for i in range(each * len(classes))
        for kind, content in (("jpg", jpeg(start + i)), ("cls", classes[i % len(classes)].encode()))
    }
