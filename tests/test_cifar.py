"""CIFAR's four published forms, and how they are fetched from a server that may fail."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cifar_files import write_binary
from http_server import FileServer
from resnetlab.data import cifar, download, sources
from resnetlab.errors import DataError

N = 4  # images per file


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cifar.RECORDS:
        monkeypatch.setitem(cifar.RECORDS, name, (N, N))


def write_python(folder: Path, name: str, records: np.ndarray) -> None:
    """The same images, pickled as Python 2 and numpy of 2009 did: byte strings, protocol 2."""
    binary, version = cifar.VERSIONS[name]
    folder.mkdir(parents=True)
    for i, file in enumerate((*version.train, *version.test)):
        part = records[i * N : (i + 1) * N]
        assert isinstance(binary.label, int)
        content = {
            b"batch_label": b"some batch",
            str(version.label).encode(): part[:, binary.label].tolist(),
            b"data": part[:, binary.labels :].copy(),
            b"filenames": [b"x.png"] * N,
        }
        (folder / file).write_bytes(pickle.dumps(content, protocol=2))
    names = {(str(version.label)[:-1] + "_names").encode(): [f"class{i}".encode() for i in range(10)]}
    (folder / version.meta).write_bytes(pickle.dumps(names, protocol=2))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_both_versions_give_the_same_images(tmp_path: Path, name: str) -> None:
    binary, python = cifar.VERSIONS[name]
    records = write_binary(tmp_path / "b" / binary.folder, name)
    write_python(tmp_path / "p" / python.folder, name, records)
    a, b = (sources.load_dataset(name, tmp_path / place) for place in ("b", "p"))
    assert a.classes == b.classes == tuple(f"class{i}" for i in range(10))
    assert a.fingerprint == b.fingerprint and len(a.train) == len(binary.train) * N
    assert isinstance(a.train, sources.Dataset) is False and torch.equal(a.train.labels, b.train.labels)
    assert isinstance(binary.label, int)
    assert a.train.labels.tolist() == records[: len(a.train), binary.label].tolist()
    assert np.array_equal(a.test.read_image(1)[:, :, 2].ravel(), records[len(a.train) + 1, binary.labels + 2048 :])
    assert a.test.names[2] == "test/2"


def test_class_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    write_python(folder, "cifar100", write_binary(tmp_path / "b", "cifar100"))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"cat", b"\xff\xfe"]}, protocol=2))
    with pytest.raises(DataError, match="meta is damaged: its names are not valid UTF-8"):
        sources.load_dataset("cifar100", tmp_path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/resnetlab-was-here",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (pickle.dumps({b"data": Evil()}, 2), r"names \w+.system, which no published file does"),
        (b"", "is not a file of CIFAR's Python version"),
        (pickle.dumps([1], 2), "is not a file of CIFAR's Python version"),
        (pickle.dumps({b"data": np.zeros((2, 3072), np.uint8)}, 2)[:-500], "is not a file of CIFAR's Python version"),
        (pickle.dumps({b"data": np.zeros((2, 3072))}, 2), "its values are f8, not bytes"),
        (
            pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [1]}, 2),
            "with as many images of 32x32",
        ),
        (pickle.dumps({b"data": np.zeros((N, 3072), np.uint8), b"fine_labels": [99] * N}, 2), "has the label 99"),
    ],
    ids=["evil", "empty", "list", "cut", "floats", "few labels", "label out of range"],
)
def test_pickles_are_not_executed(tmp_path: Path, content: bytes, sentence: str) -> None:
    folder = tmp_path / "cifar-100-python"
    write_python(folder, "cifar100", write_binary(tmp_path / "b", "cifar100"))
    (folder / "train").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        sources.load_dataset("cifar100", tmp_path)
    assert not Path("/tmp/resnetlab-was-here").exists()


def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A small CIFAR-10 archive, and its checksum as the published one."""
    version = cifar.VERSIONS["cifar10"][0]
    write_binary(tmp_path / "made" / version.folder, "cifar10")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(tmp_path / "made" / version.folder, version.folder)
    content = file.getvalue()
    small = replace(version, md5=hashlib.md5(content).hexdigest())
    monkeypatch.setitem(cifar.VERSIONS, "cifar10", (small, cifar.VERSIONS["cifar10"][1]))
    return content


def test_it_is_fetched_once_through_dropped_connections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive(tmp_path, monkeypatch)
    with FileServer({"cifar-10-binary.tar.gz": content}, drop_after=len(content) // 3 + 1) as server:
        monkeypatch.setattr(cifar, "SITE", server.url)
        data = sources.load_dataset("cifar10", tmp_path / "data")
        assert len(server.requests) == 3  # each continues where the one before was cut
        assert [r for _, r in server.requests][1:] == [f"bytes={i * (len(content) // 3 + 1)}-" for i in (1, 2)]
        assert sources.load_dataset("cifar10", tmp_path / "data").fingerprint == data.fingerprint
        assert len(server.requests) == 3


def test_a_local_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = archive(tmp_path, monkeypatch)
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "cifar-10-binary.tar.gz"
    file.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"cifar-10-binary.tar.gz is damaged or another file: its MD5 is not \w{32}"):
        sources.load_dataset("cifar10", tmp_path / "data")
    file.write_bytes(content)
    assert len(sources.load_dataset("cifar10", tmp_path / "data").train) == 5 * N


def test_an_unpacking_that_was_interrupted_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar-10-binary.tar.gz").write_bytes(archive(tmp_path, monkeypatch))

    def extract_some(tar: tarfile.TarFile, place: Path, filter: str) -> None:
        for member in tar.getmembers():
            tar.extract(member, place, filter=filter)
            if member.name.endswith("meta.txt"):
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", extract_some)
        with pytest.raises(KeyboardInterrupt):
            sources.load_dataset("cifar10", tmp_path / "data")
    assert len(sources.load_dataset("cifar10", tmp_path / "data").train) == 5 * N


def test_without_a_network_the_error_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"CIFAR-100 is not under .*: put the binary version's folder cifar-100-binary \(fine"
    ):
        sources.load_dataset("cifar100", tmp_path)


def test_server_errors_name_the_url(tmp_path: Path) -> None:
    with FileServer({"a.tar": bytes(3000)}, drop_after=10, etags=True) as server:
        with pytest.raises(
            DataError, match=rf"{server.url}a.tar cannot be fetched: .*dropped after 30 of 3,000 bytes \(3 attempts"
        ):
            download.download_file(server.url + "a.tar", tmp_path / "a.tar")
        assert len(server.requests) == 3
        with pytest.raises(DataError, match=rf"{server.url}b.tar cannot be fetched: the server says 404"):
            download.download_file(server.url + "b.tar", tmp_path / "b.tar")
        assert len(server.requests) == 4
    with FileServer({"a.tar": bytes(3000)}, etags=True) as server:
        with pytest.raises(DataError, match="is not the file that was published"):
            download.download_file(
                server.url + "a.tar", tmp_path / "c.tar", download.md5_check(server.url + "a.tar", "0" * 32)
            )
        assert not (tmp_path / "c.tar").exists()
        download.download_file(
            server.url + "a.tar", tmp_path / "a.tar"
        )  # goes on from the 30 bytes of the server before
        assert server.requests[-1][1] == "bytes=30-" and (tmp_path / "a.tar").read_bytes() == bytes(3000)
    with (
        FileServer({"a.tar": bytes(3000)}, ranges=False, drop_after=2000) as server,
        pytest.raises(DataError, match="dropped after 2,000"),
    ):
        download.download_file(server.url + "a.tar", tmp_path / "d.tar")  # it starts again every time
