"""Data of hostile or careless makers: refused by name and within bounds; an unfinished packing is not taken for whole."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from http_server import FileServer
from resnetlab.data import archives, decode, download, pack, remote_shards, shards, tar_index
from resnetlab.errors import DataError, RunError
from resnetlab.formatting import find_name_problem
from resnetlab.run_folder import RunFolder, temporary_folder, write_atomically
from shard_files import files, jpeg, load, members, packed, tar


def stop(done: int, total: int) -> None:
    raise KeyboardInterrupt


def test_an_unfinished_packing_is_recognised_and_packed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, whole = packed(tmp_path)
    out = tmp_path / "t"
    with monkeypatch.context() as patch:  # as a kill would leave it
        patch.setattr(pack, "_remove_shards", lambda out: None)
        patch.setattr(pack.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            pack.pack_shards(load(root), out, per_shard=5, on_progress=stop)
    assert list(out.glob("*.tar"))
    for data in (out, out / "train-000000.tar"):
        with pytest.raises(DataError, match="was not packed to its end; pack it again"):
            load(data)
    with RunFolder(out / ".packing").lock(), pytest.raises(RunError, match="another process is packing"):
        pack.pack_shards(load(root), out, per_shard=5)
    assert list(out.glob("*.tar"))
    pack.pack_shards(load(root), out, per_shard=5)
    assert files(out) == files(whole)
    with pytest.raises(KeyboardInterrupt):
        pack.pack_shards(load(root), tmp_path / "u", per_shard=5, on_progress=stop)
    assert not list((tmp_path / "u").iterdir())


def test_a_packing_that_was_killed_and_then_interrupted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A temporary file of the index stayed, beside which the third start would not pack."""
    root, _ = packed(tmp_path)
    out = tmp_path / "t"
    seen: list[str] = []

    def note(temporary: Path, path: Path) -> None:
        seen.extend(file.name for file in out.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("resnetlab.run_folder.move_into_place", note)
    with pytest.raises(KeyboardInterrupt):
        pack.pack_shards(load(root), out, per_shard=5)
    assert seen == [".packing"] and not list(out.iterdir())


def test_a_folder_that_lacks_shards_is_refused(tmp_path: Path) -> None:
    _, out = packed(tmp_path)
    shards = sorted(out.glob("train-*.tar"))
    shards[-1].unlink()
    tar_index.index_path(shards[-1]).unlink()
    with pytest.raises(DataError, match=rf"holds {len(shards) - 1} of {len(shards)} shards such as train-000000.tar"):
        load(out)
    load(out / "{train,val}-000000.tar")  # on purpose


def test_folders_of_killed_processes_are_removed_those_in_use_are_not(tmp_path: Path) -> None:
    old, being_made = tmp_path / ".export-old", tmp_path / ".export-new"
    old.mkdir()
    being_made.mkdir()
    (old / ".lock").touch()
    with temporary_folder(tmp_path, ".export-") as first, temporary_folder(tmp_path, ".export-"):
        assert not old.exists() and being_made.exists() and first.exists()
    assert [p.name for p in tmp_path.iterdir()] == [".export-new"]


def test_old_temporary_files_are_removed_by_the_next_writer(tmp_path: Path) -> None:
    for name, age in ((".a.json.1.tmp", 7200), (".a.json.2.tmp", 60), (".b.json.3.tmp", 7200)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, (tmp_path / name).stat().st_mtime - age))
    write_atomically(tmp_path / "a.json", "{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.json.2.tmp", ".b.json.3.tmp", "a.json"]


def huge_label(folder: Path) -> None:
    tar(folder / "s.tar", numbers() | {"99.jpg": jpeg(1), "99.cls": b"3000000000"})


def numbers() -> dict[str, bytes]:
    return {name: (b"1" if name.endswith("cls") else content) for name, content in members().items()}


def large_text(folder: Path) -> None:
    tar(folder / "s.tar", members() | {"0.json": b" " * (tar_index.MAX_TEXT + 1)})


def nested_json(folder: Path) -> None:
    tar(folder / "s.tar", members() | {"0.json": b"[" * 100_000})


def sparse_member(folder: Path) -> None:
    tar(folder / "s.tar", members())
    header = tarfile.TarInfo("huge.jpg")
    header.size, header.pax_headers = 512, {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "huge.jpg",
                                            "GNU.sparse.realsize": str(2**40)}  # fmt: skip
    with tarfile.open(folder / "s.tar", "a", format=tarfile.PAX_FORMAT) as file:
        file.addfile(header, io.BytesIO(b"1\n0\n512\n".ljust(512, b"\0")))


def large_header(folder: Path) -> None:
    tar(folder / "s.tar", members())
    with tarfile.open(folder / "s.tar", "a", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("x")
        member.pax_headers = {"comment": "x" * (tar_index.MAX_TEXT + 1)}
        file.addfile(member)


def index_with(**values: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        content = tar(folder / "s.tar", members()).read_bytes()
        names = [["0", "0.jpg", "a", 512, 10], ["1", "1.jpg", "b", 512, 10]] * 4
        samples = [[f"{i}", f"{i}.jpg", *rest] for i, (_, _, *rest) in enumerate(names)]
        index = {"format": 1, "bytes": len(content), "classes": ["a", "b"], "samples": samples}
        (folder / "s.index.json").write_text(json.dumps(index | values))

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (huge_label, "is of class 3,000,000,000; more than 1,000,000 classes"),
        (large_text, "far more than a class needs"),
        (nested_json, "the class of 0 .* cannot be read"),
        (sparse_member, "stored as a sparse file"),
        (large_header, "a header of"),
        (index_with(classes=[["0"]]), "a class is no text"),
        (index_with(classes=["a", "b", "a"]), "two classes are called a"),
        (index_with(classes=["a", "b", " "]), "' ' is no class name"),
        (index_with(classes=["a", "b", "\ud800"]), "cannot be encoded as UTF-8"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_hostile_shards_are_refused_in_a_sentence(write: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    write(tmp_path / "s")
    with pytest.raises(DataError, match=words):
        load(tmp_path / "s")


def test_a_large_file_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i in range(5):
            (tmp_path / "d" / name / f"{i}.jpg").write_bytes(jpeg(i))
    with open(tmp_path / "d" / "a" / "0.jpg", "r+b") as file:
        file.truncate(decode.MAX_FILE_BYTES + 1)  # sparse: it takes no room
    data = load(tmp_path / "d")
    source = data.all_images.source  # type: ignore[union-attr]
    with pytest.raises(DataError, match="more than the 536,870,912 that are read"):
        source.read(list(source.names).index("a/0.jpg"))


def test_large_files_of_a_folder_of_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index, a list of classes, and an image inside a tar."""
    (tmp_path / "s").mkdir()
    tar(tmp_path / "s" / "s.tar", numbers())
    split = load(tmp_path / "s").train
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 100)
    with pytest.raises(DataError, match=r"s\.tar/.*jpg has [\d,]+ bytes, more than the 100"):
        split.read_image(0)
    (tmp_path / "s" / "classes.txt").write_text("a\nb\n" * 100)
    monkeypatch.setattr(shards, "MAX_INDEX", 100)
    with pytest.raises(DataError, match=r"classes\.txt cannot be read \(it has more than 100 bytes\)"):
        load(tmp_path / "s")
    index_with()(tmp_path / "s")
    monkeypatch.setattr(tar_index, "MAX_INDEX", 100)
    with pytest.raises(DataError, match=r"s\.index\.json cannot be read \(it has more than 100 bytes\)"):
        load(tmp_path / "s")


def test_a_zip_member_is_not_unpacked_beyond_the_size_that_it_claims(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("a", "b"):
            for i in range(5):
                file.writestr(f"{name}/{i}.png", bytes(10_000_000) if (name, i) == ("a", 0) else jpeg(i))
    content = bytearray((tmp_path / "d.zip").read_bytes())
    claimed = (10_000_000).to_bytes(4, "little")
    at = content.rindex(claimed)
    content[at : at + 4] = (100).to_bytes(4, "little")
    (tmp_path / "d.zip").write_bytes(content)
    data = load(tmp_path / "d.zip")
    assert data.all_images is not None
    source = data.all_images.source  # type: ignore[attr-defined]
    assert isinstance(source, archives.ZipSource)
    with pytest.raises(DataError, match="checksum differs"):
        source.read(list(source.names).index("a/0.png"))


def test_a_zip_member_without_a_name_is_left_out(tmp_path: Path) -> None:
    """Python 3.11's ZipInfo.is_dir raises an IndexError."""
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as file:
        for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png", "c"):
            file.writestr(name, jpeg(len(name)))
        file.infolist()[-1].filename = ""
    assert load(tmp_path / "d.zip").classes == ("a", "b")


def test_small_files_of_a_server_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, out = packed(tmp_path)
    monkeypatch.setattr(remote_shards, "MAX_INDEX", 100)
    with FileServer(files(out)) as server, pytest.raises(DataError, match=r"has more than 100 bytes, far more"):
        load(server.url + "{train,val}-000000.tar", tmp_path / "data")


def test_class_names_are_different_words() -> None:
    assert find_name_problem(("a", "größe", "<b>")) is None
    for names in (("a", 1), ("a", ""), ("a", "\udcff"), ("a", "b", "a")):
        assert find_name_problem(names)


def test_a_compressed_tar_unpacks_to_a_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tar(tmp_path / "photos.tar", {f"{name}/{i}.jpg": jpeg(i) for i in range(5) for name in "ab"})
    packed_tar = tmp_path / "photos.tar.gz"
    packed_tar.write_bytes(gzip.compress(plain.read_bytes()))
    assert len(load(packed_tar, tmp_path / "data").classes) == 2
    monkeypatch.setattr(archives, "SMALL_ARCHIVE", 10_000)
    bomb = tmp_path / "bomb.tar.gz"
    bomb.write_bytes(gzip.compress(bytes(2**24)))
    with pytest.raises(DataError, match=r"bomb.tar.gz unpacks to more than [\d,]+ bytes, far more than images do"):
        load(bomb, tmp_path / "data")
    (unpacked,) = (tmp_path / "data" / "archives").iterdir()
    assert unpacked.suffix == ".tar"
    killed, running = (unpacked.with_name(f".{unpacked.name}.{pid}.tmp") for pid in (1, 2))
    for left in (killed, running):
        left.write_bytes(bytes(9))
    os.utime(killed, (0, 0))
    unpacked.unlink()
    load(packed_tar, tmp_path / "data")
    assert sorted((tmp_path / "data" / "archives").iterdir()) == [running, unpacked]  # a killed process's is removed


@pytest.mark.parametrize(
    ("suffix", "pack_bytes"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_a_damaged_compressed_tar_is_named(suffix: str, pack_bytes: Callable[[bytes], bytes], tmp_path: Path) -> None:
    content, file = bytearray(pack_bytes(os.urandom(2**14))), tmp_path / f"photos.tar.{suffix}"
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"photos\.tar\.{suffix} is damaged .*; copy it again"):
        load(file, tmp_path / "data")


def test_a_damaged_record_of_a_download_counts_as_none(tmp_path: Path) -> None:
    for record in ("[1, 2, 3]", '["a", "b", "c"]', '"abc"', "{}", "5"):
        with FileServer({"a.tar": b"content"}) as server:
            (tmp_path / ".a.tar.origin").write_text(record)
            (tmp_path / "a.tar.part").write_bytes(b"old")
            assert download.download_file(server.url + "a.tar", tmp_path / "a.tar").read_bytes() == b"content"


def test_deeply_nested_json_in_a_shard_is_refused(tmp_path: Path) -> None:
    shard = tar(tmp_path / "train-000000.tar", {"0.jpg": jpeg(0), "0.json": b"[" * 100_000})
    with pytest.raises(DataError):
        load(shard)
