"""Files over HTTP: what is kept between processes, what is requested again, and faulty servers."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

import resnetlab
from http_server import FileServer
from images import folder, photo
from resnetlab.data import download, pack
from resnetlab.data.dataset import GROUP
from resnetlab.errors import DataError, RunError, UsageError
from shard_files import files, load, members, packed
from shard_files import tar as made

OLD, NEW = bytes(3000), bytes(range(250)) * 12  # two versions of one file, of one length


class Changing(dict[str, bytes]):
    """a.tar changes after it was read once."""

    def __getitem__(self, name: str) -> bytes:
        content, self["a.tar"] = super().__getitem__(name), NEW
        return content


@pytest.mark.parametrize("careless", [False, True], ids=["If-Range", "Content-Range and ETag"])
def test_a_dropped_file_is_resumed_only_if_it_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, careless: bool
) -> None:
    with FileServer({"a.tar": NEW}, drop_after=2000, etags=True) as server:
        assert download.download_file(server.url + "a.tar", tmp_path / "same").read_bytes() == NEW
        assert [part for _, part in server.requests] == [None, "bytes=2000-"]
    monkeypatch.setattr(download, "PAUSES", (0.0,) * 3)
    with FileServer(Changing({"a.tar": OLD}), drop_after=2000, etags=True, ignore_if_range=careless) as server:
        assert download.download_file(server.url + "a.tar", tmp_path / "changed").read_bytes() == NEW


@pytest.mark.parametrize("tags", [True, False])
def test_what_another_process_left_is_resumed_if_its_version_is_known(tmp_path: Path, tags: bool) -> None:
    with FileServer({"a.tar": OLD}, drop_after=100, etags=tags) as server:
        url = server.url + "a.tar"
        with pytest.raises(DataError, match="dropped after 300 of 3,000"):
            download.download_file(url, tmp_path / "a")
        with pytest.raises(DataError, match=f"dropped after {600 if tags else 300} of 3,000"):
            download.download_file(url, tmp_path / "a")
    with FileServer({"a.tar": NEW}, etags=tags) as server:
        assert download.download_file(server.url + "a.tar", tmp_path / "a").read_bytes() == NEW
    assert download.is_complete(tmp_path / "a")


def test_a_truncated_response_without_a_length(tmp_path: Path) -> None:
    content = made(tmp_path / "s" / "x-0.tar", members()).read_bytes()
    ended = len(content.rstrip(b"\0")) // 512 * 512 + 512  # where the blocks that end the archive begin
    with FileServer({"x-0.tar": content}, drop_after=ended, ranges=False, lengths=False) as server:
        error = rf"{server.url}x-0.tar cannot be fetched: the connection was dropped after {ended:,} bytes, or .* \(3 attempts"
        with pytest.raises(DataError, match=error):
            load(server.url + "x-0.tar", tmp_path / "data")
    with FileServer({"x-0.tar": content}, drop_after=len(content) * 2 // 3, etags=True, lengths=False) as server:
        assert load(server.url + "x-0.tar", tmp_path / "data").classes == ("a", "b")
        assert server.requests[-1] == ("x-0.tar", f"bytes={len(content) * 2 // 3}-")


def test_complete_shards_need_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PAUSES", (0.0,))
    served = {
        f"x-{i}.tar": made(tmp_path / "s" / f"x-{i}.tar", members("01", start=20 * i)).read_bytes() for i in (0, 1)
    }
    served["classes.txt"] = b"cat\ndog\n"
    with FileServer(served, etags=True) as server:
        one, both = server.url + "x-0.tar", server.url + "x-{0..1}.tar"
        assert load(one, tmp_path / "data").classes == ("cat", "dog")
        asked = ["x-0.index.json", "x-0.tar", "classes.txt"]
        assert [name for name, _ in server.requests] == asked
        load(one, tmp_path / "data")
        assert [name for name, _ in server.requests] == asked
        load(both, tmp_path / "data")  # x-0.tar is validated, and has not changed
        assert [name for name, _ in server.requests[3:]] == ["x-0.tar", "x-1.index.json", "x-1.tar", "classes.txt"]
        (kept,) = (tmp_path / "data").rglob("x-1.tar")
        kept.write_bytes(kept.read_bytes()[:700])  # no longer complete
        load(both, tmp_path / "data")
        assert kept.read_bytes() == served["x-1.tar"]
    assert load(both, tmp_path / "data").classes == ("cat", "dog")  # the server is down
    with pytest.raises(DataError, match=r"x-0.index.json cannot be fetched"):
        load(one, tmp_path / "other")


def test_shards_of_two_packings_are_not_mixed(tmp_path: Path) -> None:
    root, out = packed(tmp_path, {"train": 3, "val": 3}, per_shard=100)
    served = files(out)
    with FileServer(served, etags=True) as server:
        before = load(server.url + "train-000000.tar", tmp_path / "data")
        photo(77).save(root / "train" / "alpha" / "new.jpg")
        pack.pack_shards(load(root), tmp_path / "again", per_shard=100)
        served.update(files(tmp_path / "again"))
        assert (
            len(load(server.url + "{train,val}-000000.tar", tmp_path / "data").train)
            == len(before.all_images or ()) + 1
        )


def test_an_expired_address_is_reported_without_its_signature(tmp_path: Path) -> None:
    with FileServer({}, missing_status=403) as server, pytest.raises(DataError) as caught:
        load(server.url + "x-0.tar?X-Signature=secret", tmp_path / "data")
    assert str(caught.value) == (
        f"{server.url}x-0.tar cannot be fetched: the server says 403 Forbidden: it is not there, or the address may not be "
        "read (a signed one may have expired)."
    )


def test_a_full_disk_is_not_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> Callable[..., object]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with FileServer({"a.tar": OLD}) as server:
        monkeypatch.setattr(download, "open", full, raising=False)
        with pytest.raises(RunError, match="no space left to write"):
            download.download_file(server.url + "a.tar", tmp_path / "a")
        assert len(server.requests) == 1


def test_a_quarantine_that_empties_a_class_of_shards(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"train": 3, "val": 2})
    pack.pack_shards(load(root), tmp_path / "s")
    (tmp_path / "bad.txt").write_text("".join(f"train/alpha/bild {i}.jpg\n" for i in range(3)))
    with pytest.raises(DataError, match=rf"the quarantine list leaves no image of class alpha in {tmp_path / 's'}"):
        load(tmp_path / "s", quarantine=str(tmp_path / "bad.txt"))


def test_shards_take_groups_and_a_quarantine_list_as_their_folder_does(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", {"": 20})
    pack.pack_shards(load(root), tmp_path / "s")
    ours, theirs = (load(path, groups=r"bild (\d)") for path in (tmp_path / "s", root))
    assert ours.fingerprint == theirs.fingerprint
    assert ours.train.columns[GROUP].tolist() == theirs.train.columns[GROUP].tolist()
    with pytest.raises(DataError, match="groups=patient is not found in the names of 60 images"):
        load(tmp_path / "s", groups="patient")
    (tmp_path / "bad.txt").write_text("alpha/other.jpg\n")
    with pytest.warns(UserWarning, match="no line of the quarantine list"):
        load(tmp_path / "s", quarantine=str(tmp_path / "bad.txt"))
    with pytest.raises(UsageError, match=r"quarantine=bad\.txt is for images on disk"):
        resnetlab.train(data="digits", quarantine="bad.txt", steps=1, out=tmp_path / "run", image_size=8)
