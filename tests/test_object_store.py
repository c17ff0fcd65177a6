"""Data behind fsspec addresses: a file system in memory, and S3 by moto's server; what goes wrong is said without secrets."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

import resnetlab
from resnetlab import migrate_v01
from resnetlab.data import download, object_store
from resnetlab.data.disk_split import ReadOptions
from resnetlab.data.sources import load_dataset, short_name, strip_signature
from resnetlab.errors import DataError, UsageError
from resnetlab.inference.images import read_image
from resnetlab.run_folder import RunFolder, list_checkpoints
from resnetlab.stopping import StopSignal
from resnetlab.tensor_file import read_tensor_file, write_tensor_file
from resnetlab.training.recipe import Recipe
from resnetlab.training.recipes import quick
from resnetlab.training.result import Progress
from resnetlab.training.train import RunOptions, resume, start_run
from shard_files import load, packed
from tiny_runs import tiny


@pytest.fixture
def store() -> Iterator[Any]:
    memory = fsspec.filesystem("memory")
    memory.rm("/", recursive=True) if memory.ls("/") else None
    yield memory
    memory.rm("/", recursive=True) if memory.ls("/") else None


def upload(store: Any, out: Path, folder: str = "/bucket/shards") -> None:
    for file in out.iterdir():
        if file.is_file():
            store.pipe(f"{folder}/{file.name}", file.read_bytes())


def test_shards_of_a_store_are_those_of_the_folder(tmp_path: Path, store: Any) -> None:
    root, out = packed(tmp_path)
    upload(store, out)
    data = load_dataset("memory://bucket/shards/", tmp_path / "data")
    assert data.fingerprint == load(root).fingerprint
    store.rm("/bucket", recursive=True)  # what was fetched needs no store
    pattern = "memory://bucket/shards/train-{000000..000004}.tar"
    again = load_dataset(pattern, tmp_path / "data")
    assert set(again.splits["all"].names) == set(data.train.names)
    assert short_name(pattern) == "shards"


def test_a_dropped_download_goes_on(tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 64
    store.pipe("/bucket/file", content)
    offsets: list[int] = []
    open_at = object_store.open_at

    def dropping(url: str, offset: int) -> Any:
        offsets.append(offset)
        if len(offsets) == 1:  # the first connection gives a part
            store.pipe("/bucket/half", content[:5000])
            return open_at("memory://bucket/half", 0)
        return open_at(url, offset)

    monkeypatch.setattr(object_store, "open_at", dropping)
    monkeypatch.setattr(download, "PAUSES", (0.0,))
    assert download.download_file("memory://bucket/file", tmp_path / "file").read_bytes() == content
    assert offsets == [0, 5000]
    assert download.is_complete(tmp_path / "file") and download.is_current("memory://bucket/file", tmp_path / "file")
    store.pipe("/bucket/file", content + b"more")
    assert not download.is_current("memory://bucket/file", tmp_path / "file")


def test_what_is_not_there_is_named_without_secrets(tmp_path: Path, store: Any) -> None:
    with pytest.raises(DataError, match=r"memory://bucket/no-0\.tar cannot be fetched: it is not there"):
        load_dataset("memory://bucket/no-{0..1}.tar", tmp_path)
    with pytest.raises(DataError, match="memory://bucket/none/ holds no tar shard"):
        load_dataset("memory://bucket/none/", tmp_path)
    with pytest.raises(UsageError, match=r"nosuch://bucket/a\.index\.json is of no known kind") as error:
        load_dataset("nosuch://me@bucket/a.tar?signature=secret", tmp_path)
    assert "secret" not in str(error.value)
    assert strip_signature("s3://me:secret@bucket/a.tar?x=secret") == "s3://bucket/a.tar"


@pytest.mark.parametrize(("url", "instead"), [
    ("s3://KEY:secret/+@bucket/x-{0..1}.tar", "AWS_SECRET_ACCESS_KEY"), ("https://me:secret@host/a.tar", "signed address"),
    ("https://secret@host:80/a.tar", "signed address"), ("ftp://me:secret@host/a.tar", "FSSPEC_FTP_PASSWORD"),
    ("hf://me:secret@datasets/a.tar", "HF_TOKEN"), ("gs://me:secret@a/b.tar", "GOOGLE_APPLICATION_CREDENTIALS"),
])  # fmt: skip
def test_passwords_in_addresses_are_refused_so_that_no_file_keeps_them(url: str, instead: str, tmp_path: Path) -> None:
    for use in (
        lambda: load_dataset(url, tmp_path),
        lambda: read_image(url),
        lambda: quick().with_values({"data": url}),
        lambda: resnetlab.train(url, out=tmp_path / "run", progress=False),
    ):
        with pytest.raises(
            UsageError, match="is given with a password, which files would keep; leave it out, and"
        ) as error:
            use()
        assert instead in str(error.value) and "secret" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    for fine in (
        "https://host:8080/a@2.tar",
        "abfs://box@account/a.tar",
        "hf://datasets/me/x@1/a.tar",
        "s3://b/2026:1@a.tar",
    ):
        object_store.refuse_password(fine)


def test_an_image_of_a_store_is_read(tmp_path: Path, store: Any) -> None:
    root, _ = packed(tmp_path)
    file = next(root.rglob("*.jpg"))
    store.put(str(file), "/bucket/image.jpg")
    assert read_image("memory://bucket/image.jpg").tobytes() == read_image(file).tobytes()
    with pytest.raises(DataError, match=r"memory://bucket/no\.jpg cannot be downloaded"):
        read_image("memory://bucket/no.jpg")


@pytest.mark.slow
def test_shards_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    root, out = packed(tmp_path)
    server = moto.ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        fsspec.filesystem("s3").mkdir("bucket")
        upload(fsspec.filesystem("s3"), out, "bucket/shards")
        data = load_dataset("s3://bucket/shards/", tmp_path / "data", ReadOptions())
        assert data.fingerprint == load(root).fingerprint
        later = load_dataset("s3://bucket/shards/", tmp_path / "data", ReadOptions(as_needed=True))
        folder = next((tmp_path / "data" / "shards").glob("*-as-needed"))
        assert later.fingerprint == data.fingerprint and not list(folder.glob("train-*.tar"))
        assert torch.equal(later.train.read_image(0), data.train.read_image(0))
        assert len(list(folder.glob("train-*.tar"))) == 1
        with pytest.raises(DataError, match="is not there") as error:
            load_dataset("s3://bucket/shards/none-{0..1}.tar", tmp_path / "data")
        assert "topsecret" not in str(error.value)
        written = b"".join(file.read_bytes() for file in (tmp_path / "data").rglob("*") if file.is_file())
        assert b"topsecret" not in written
    finally:
        server.stop()


@pytest.mark.parametrize("old", [False, True], ids=["", "0.1"])
def test_a_run_whose_recipe_holds_a_password_is_resumed_without_it(
    old: bool, tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier versions kept it there, and in the hash by which a checkpoint belongs to its recipe."""
    upload(store, packed(tmp_path)[1])
    run, address = tmp_path / "run", "memory://bucket/shards/"
    small = tiny(data=address, steps=4, batch=6, image_size=16, eval_resize=20, val_images=0, log_every=1)

    def stop(progress: Progress) -> None:
        if progress.step == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(StopSignal):
        start_run(small, run, RunOptions(data_dir=tmp_path / "data", device="cpu", on_progress=stop))
    recipe = Recipe.from_values(RunFolder(run).read_recipe())
    file = run / "recipe.toml"
    file.write_text(file.read_text().replace("memory://", "memory://me:secret@"))
    kept = RunFolder(run).read_raw_recipe()
    before = migrate_v01.recipe_key(kept) if old else recipe.key_with_data(kept["data"])
    monkeypatch.setattr(migrate_v01, "is_recipe", lambda values: old and "secret" in values["data"])
    checkpoint = list_checkpoints(RunFolder(run))[-1]
    tensors, metadata = read_tensor_file(checkpoint, "checkpoint")
    identity = metadata["identity"].replace(recipe.key, before)
    write_tensor_file(checkpoint, tensors, metadata | {"identity": identity})
    said: list[str] = []
    resume(run, RunOptions(device="cpu", report=said.append))
    assert any("recipe.toml is removed; set FSSPEC_MEMORY_USERNAME and" in sentence for sentence in said)
    assert any(sentence.startswith("resuming from step") for sentence in said)
    assert Recipe.from_values(RunFolder(run).read_recipe()) == recipe
    assert all(b"secret" not in path.read_bytes() for path in run.rglob("*") if path.is_file())
