"""Shards of other writers and of faulty servers: each fault is named, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from http_server import FileServer
from resnetlab.data import shards, sources, tar_index
from resnetlab.errors import DataError
from shard_files import jpeg, load, members, tar


@pytest.mark.parametrize("about", [{"class": None}, {"class": ["a"]}, {"class": True}, {"class": 1.5},
                                   {"class": "a", "name": None}, {"class": "a", "name": 3}])  # fmt: skip
def test_json_without_a_class(tmp_path: Path, about: object) -> None:
    tar(tmp_path / "s" / "x-0.tar", members() | {"77.jpg": jpeg(77), "77.json": json.dumps(about).encode()})
    with pytest.raises(DataError, match=r"the class of 77 in .*x-0.tar cannot be read"):
        load(tmp_path / "s")


@pytest.mark.parametrize(
    "sample", [["k", "n", "a", "x", 1], ["k", "n", "a", -5, 10], ["k", "n", ["a"], 0, 1], [3, "n", "a", 0, 1],
               ["k", "n", "a", 0, 10**9]])  # fmt: skip
def test_a_damaged_index(tmp_path: Path, sample: list[object]) -> None:
    path = tar(tmp_path / "s" / "x-0.tar", members())
    values = {"bytes": path.stat().st_size, "classes": ["a", "b"], "samples": [sample]}
    tar_index.index_path(path).write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"the index .*x-0.index.json cannot be read"):
        load(tmp_path / "s")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"77.jp2": jpeg(7), "77.cls": b"a"}, "77 in .* has a class and no image"),
        ({"77.jpg": jpeg(7), "77.json": b'{"class": "b", "name": "1.jpg"}'}, "two samples have the name 1.jpg"),
    ],
)
def test_nothing_is_lost_in_silence(tmp_path: Path, more: dict[str, bytes], said: str) -> None:
    tar(tmp_path / "s" / "x-0.tar", members() | more)
    with pytest.raises(DataError, match=said):
        load(tmp_path / "s")


@pytest.mark.parametrize("second", [("77.cls", b"a"), ("77.cls", b"b"), ("77.json", b'{"class": "b"}')])
def test_a_second_label_for_a_sample(tmp_path: Path, second: tuple[str, bytes]) -> None:
    one = [("77.jpg", jpeg(7)), ("77.cls", b"a"), second]
    tar(tmp_path / "s" / "x-0.tar", [*members().items(), *one])
    with pytest.raises(DataError, match=r"x-0.tar has two files 77.cls; give each|77.cls says a, 77.json b"):
        load(tmp_path / "s")


def test_splits_of_different_classes(tmp_path: Path) -> None:
    tar(tmp_path / "s" / "train-0.tar", members("abc"))
    tar(tmp_path / "s" / "val-0.tar", members("ad", start=50))
    with pytest.raises(DataError, match="only in train b, c, only in val d"):
        load(tmp_path / "s")
    with pytest.raises(DataError, match="one class only, a"):
        load(tar(tmp_path / "t" / "x-0.tar", members("a")))


def test_class_folders_go_before_a_tar_beside_them(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    tar(tmp_path / "backup.tar", {"readme": b"hi"})
    assert not shards.is_shard_pattern(str(tmp_path))


def test_signed_addresses(tmp_path: Path) -> None:
    path = tar(tmp_path / "s" / "x-0.tar", members("01"))
    with FileServer({"s/x-0.tar?sig=a/b": path.read_bytes(), "s/classes.txt?sig=a/b": b"cat\ndog\n"}) as server:
        assert load(server.url + "s/x-0.tar?sig=a/b", tmp_path / "data").classes == ("cat", "dog")
    assert sources.short_name(server.url + "s/x-0.tar?sig=a/b") == "s"


def test_half_a_shard_is_not_kept(tmp_path: Path) -> None:
    content = tar(tmp_path / "s" / "x-0.tar", members()).read_bytes()
    served = {"x-0.tar": content[: len(content) // 2]}
    with FileServer(served) as server:
        with pytest.raises(DataError, match=rf"{server.url}x-0.tar did not arrive whole"):
            load(server.url + "x-0.tar", tmp_path / "data")
        served["x-0.tar"] = content
        assert load(server.url + "x-0.tar", tmp_path / "data").classes == ("a", "b")
